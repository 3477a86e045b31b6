"""Preference data as it is published: which format a data set has, and what a row of it says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import jsonl
from ..errors import GenarmError

Row = dict[str, Any]
Messages = list[dict[str, Any]]

USELESS = {
    "empty": "an empty response",
    "equal": "equal responses",
    "tied": "a tie",
    "contradicted": "scores that contradict the order",
    "no_prompt": "no prompt",
    "equal_tokens": "responses that are equal as tokens",
    "boundary": "responses that the tokenizer cannot tell from the prompt",
}
"""Why a row is left out: the name that counts have, and how it is told."""


class UselessRowError(Exception):
    """A row that is well formed, but that nothing can be learned from; its argument is a key of USELESS."""


class Format(NamedTuple):
    """A way to write preferences down. The functions raise GenarmError for a value that they cannot read."""

    name: str
    columns: tuple[str, ...]
    """Those that every row must have."""
    prompt: Callable[[Row], Any]
    """Text, messages, or None where the responses contain the prompt."""
    responses: Callable[[Row], tuple[Any, Any]]
    """The chosen and the rejected one; UselessRowError where neither is."""
    question: bool
    """Whether a prompt that is text is what a user says, not a text to be continued as it is."""


def recognise(row: Row, objective: str | None) -> Format:
    """The format of a data set whose first row is given.

    Raises:
        GenarmError: no format has these columns, or `objective` chooses nothing in the one that has.
    """
    published = _published(objective or "better")
    found = next((one for one in published if row.keys() >= set(one.columns)), None) or _ordered(row)
    if found is None and row.keys() & {"better_response_id", "safer_response_id"}:
        raise GenarmError(f"has no {objective or 'better'}_response_id; choose another --objective")
    if found is None:
        raise GenarmError(
            f"columns of no known format: {', '.join(row)}; expected prompt, chosen and rejected, "
            f"whole transcripts chosen and rejected, or the columns of {', '.join(one.name for one in published)}"
        )
    if objective and found.name != "PKU-SafeRLHF":
        raise GenarmError(f"objective chooses between labels of PKU-SafeRLHF, but the format is {found.name}")
    return found


def read(row: Row, form: Format) -> tuple[Any, Any, Any, bool]:
    """Prompt, chosen, rejected, all three text or all three messages, and whether it is a question that a tokenizer
    without a chat template can be asked as text.

    Raises:
        UselessRowError: nothing can be learned from the row.
        GenarmError: a column is missing or cannot be read.
    """
    if missing := [column for column in form.columns if column not in row]:
        raise GenarmError(f"has no {' and no '.join(missing)}; the format by the first row: {form.name}")
    prompt, (chosen, rejected) = form.prompt(row), form.responses(row)
    system = row.get("system") or None
    if any(_blank(response) for response in (chosen, rejected)):
        raise UselessRowError("empty")
    if any(isinstance(value, list | dict) for value in (prompt, chosen, rejected)):
        return *_conversation(system, prompt, chosen, rejected), False
    if prompt is not None and not isinstance(prompt, str):
        raise GenarmError(f"prompt is neither a string nor a list of messages: {prompt!r}")
    for name, text in (("prompt", prompt or ""), ("chosen", chosen), ("rejected", rejected), ("system", system or "")):
        jsonl.check_text(text, name)
    if chosen == rejected:
        raise UselessRowError("equal")
    if prompt is None:
        prompt, chosen, rejected = _split_transcripts(chosen, rejected)
    elif form.question:
        asked = _said(system, "system") + _said(prompt, "user")
        return asked, _said(chosen, "assistant"), _said(rejected, "assistant"), True
    return prompt, chosen, rejected, False


# --- the formats


def _published(objective: str) -> list[Format]:
    """Those that are told by columns of their own."""
    return [
        Format(
            "PKU-SafeRLHF",
            ("prompt", "response_0", "response_1", f"{objective}_response_id"),
            _column("prompt"),
            _judged("response_0", "response_1", lambda row: _first_of(row, f"{objective}_response_id", 0, 1)),
            True,
        ),
        Format(
            "Stanford SHP",
            ("history", "human_ref_A", "human_ref_B", "labels"),
            _column("history"),
            _judged("human_ref_A", "human_ref_B", lambda row: _first_of(row, "labels", 1, 0)),
            True,
        ),
        Format(
            "WebGPT comparisons",
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
            lambda row: row["question"].get("full_text") if isinstance(row["question"], dict) else row["question"],
            _judged("answer_0", "answer_1", lambda row: _number(row, "score_0") - _number(row, "score_1")),
            True,
        ),
        Format(
            "AlpacaFarm",
            ("instruction", "output_1", "output_2", "preference"),
            _instruction,
            _judged("output_1", "output_2", lambda row: _first_of(row, "preference", 1, 2)),
            True,
        ),
        Format(
            "HelpSteer2",
            ("prompt", "response_1", "response_2", "preference_strength"),
            _column("prompt"),
            _judged("response_1", "response_2", lambda row: -_number(row, "preference_strength")),
            True,
        ),
        Format(
            "HelpSteer3",
            ("context", "response1", "response2", "overall_preference"),
            _column("context"),
            _judged("response1", "response2", lambda row: -_number(row, "overall_preference")),
            True,
        ),
        Format(
            "Chatbot Arena",
            ("conversation_a", "conversation_b", "winner"),
            lambda row: None,
            _judged("conversation_a", "conversation_b", lambda row: _first_of(row, "winner", "model_a", "model_b")),
            True,
        ),
        Format(
            "summarize_from_feedback",
            ("info", "summaries", "choice"),
            _post,
            _summaries,
            True,
        ),
        Format(
            "Nectar", ("prompt", "answers"), _column("prompt"), _best_and_worst("answers", "answer", "rank", -1), False
        ),
        Format(
            "Stack Exchange preferences",
            ("question", "answers"),
            _column("question"),
            _best_and_worst("answers", "text", "pm_score", 1),
            True,
        ),
        Format(
            "UltraFeedback",
            ("instruction", "completions"),
            _column("instruction"),
            _best_and_worst("completions", "response", "overall_score", 1),
            True,
        ),
    ]


_PROMPTS = ["prompt", "question", "instruction", "input", "query", "messages", "conversations", "conversation"]
_PROMPTS += ["context", "trajectory"]
_RESPONSES = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"))
_SCORES = [("score_chosen", "score_rejected")]
_SCORES += [(f"chosen{end}", f"rejected{end}") for end in ("_score", "_rating", "-rating", "_avg_rating")]


def _ordered(row: Row) -> Format | None:
    """Rows that have the better and the worse response in columns of those names, with the prompt or around it."""
    columns = next((pair for pair in _RESPONSES if row.keys() >= set(pair)), None)
    if columns is None:
        return None
    prompt = next((name for name in _PROMPTS if name in row), None)
    messages = isinstance(row[columns[0]], list)
    if prompt is None:
        name = f"{'whole conversations' if messages else 'whole transcripts, as HH-RLHF'}: {', '.join(columns)}"
        return Format(name, columns, lambda row: None, _scored(*columns), False)
    names = [*(["system"] if "system" in row else []), prompt, *columns]
    read_prompt = _instruction if prompt == "instruction" else _column(prompt)
    name = ", ".join(names) + (" (messages)" if messages else "")
    return Format(name, (prompt, *columns), read_prompt, _scored(*columns), prompt != "prompt" or "system" in row)


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _instruction(row: Row) -> Any:
    """Alpaca's two columns: what to do, and with what."""
    return f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]


def _judged(first: str, second: str, verdict: Callable[[Row], float]) -> Callable[[Row], tuple[Any, Any]]:
    return lambda row: _better(row[first], row[second], verdict(row))


def _better(first: Any, second: Any, verdict: float) -> tuple[Any, Any]:
    """Chosen and rejected: the first is better where the verdict is above 0."""
    if not verdict:
        raise UselessRowError("tied")
    return (first, second) if verdict > 0 else (second, first)


def _scored(chosen: str, rejected: str) -> Callable[[Row], tuple[Any, Any]]:
    def responses(row: Row) -> tuple[Any, Any]:
        if row.get("status") == "tie":
            raise UselessRowError("tied")
        for better, worse in _SCORES:
            if row.get(better) is not None and row.get(worse) is not None:
                margin = _number(row, better) - _number(row, worse)
                if margin <= 0:
                    raise UselessRowError("contradicted" if margin else "tied")
        return row[chosen], row[rejected]

    return responses


def _best_and_worst(column: str, text: str, score: str, sign: int) -> Callable[[Row], tuple[Any, Any]]:
    """Of a list of answers with scores, or with ranks where `sign` is -1."""

    def responses(row: Row) -> tuple[Any, Any]:
        answers = _objects(row[column], column, text, score)
        if len(answers) < 2:
            raise UselessRowError("empty")
        ordered = sorted(answers, key=lambda answer: sign * _number(answer, score))
        margin = _number(ordered[-1], score) - _number(ordered[0], score)
        return _better(ordered[-1][text], ordered[0][text], abs(margin))

    return responses


def _summaries(row: Row) -> tuple[Any, Any]:
    summaries = _objects(row["summaries"], "summaries", "text")
    if len(summaries) != 2:
        raise GenarmError(f"summaries has {len(summaries)} instead of 2")
    return _better(summaries[0]["text"], summaries[1]["text"], _first_of(row, "choice", 0, 1))


def _post(row: Row) -> Any:
    (info,) = _objects([row["info"]], "info")
    return info.get("post") or info.get("article")


def _objects(value: Any, name: str, *keys: str) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise GenarmError(f"{name} is not made of objects")
    if missing := [key for key in keys for one in value if key not in one]:
        raise GenarmError(f"{name} has one without {missing[0]}")
    return value


def _first_of(row: Row, column: str, first: Any, second: Any) -> float:
    """The verdict of a label: 1 or -1 for one of two values, 0 for none, -1 or a word with "tie", which say neither."""
    value = row[column]
    for verdict, one in ((1, first), (-1, second)):
        if value in (one, str(one)):
            return verdict
    if value in (None, -1, "-1") or "tie" in str(value):
        return 0
    raise GenarmError(f"{column} is neither {first!r} nor {second!r}: {value!r}")


def _number(row: Row, column: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError) as error:
        raise GenarmError(f"{column} is not a number: {row[column]!r}") from error
    if not math.isfinite(value):
        raise GenarmError(f"{column} is not finite: {value}")
    return value


# --- where a response begins

# How published transcripts and rendered chat templates open a turn of the assistant.
_ASSISTANT = re.compile(
    r"(?:^|\n)\s*Assistant:|ASSISTANT:|###\s?(?:Response|Assistant):\n*|<\|assistant\|>\n*|<\|im_start\|>assistant\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n|\[/INST\]"
)


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt goes to the last opening of a turn of the assistant that both transcripts share."""
    openings = [match.end() for match in _ASSISTANT.finditer(chosen[: _shared(chosen, rejected)])]
    if not openings:
        raise UselessRowError("no_prompt")
    return _cut(chosen[: openings[-1]], chosen, rejected)


def without_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Of two responses of which at least one repeats the prompt; UselessRowError when nothing else is in it.

    >>> without_prompt("Human: hi", "Human: hi\\n\\nAssistant: hello", "Human: hi\\n\\nAssistant: no")
    ('Human: hi\\n\\nAssistant:', ' hello', ' no')
    """
    prompt, chosen, rejected = _cut(prompt, chosen, rejected)
    opening = _ASSISTANT.match(chosen)
    if opening and rejected.startswith(opening[0]):  # the prompt ended before the assistant's turn was opened
        prompt, chosen, rejected = _cut(prompt + opening[0], prompt + chosen, prompt + rejected)
    return prompt, chosen, rejected


def _cut(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if not chosen.strip() or not rejected.strip():
        raise UselessRowError("empty")
    return prompt, chosen, rejected


def _conversation(system: Any, prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """The prompt goes to the last turn before one of the assistant that both conversations share."""
    before = _messages(system, "system", "system") + _messages(prompt, "prompt", "user")
    if prompt is not None and not _messages(prompt, "prompt", "user"):
        raise GenarmError("prompt has no messages")
    wholes = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        turns = _messages(response, name, "assistant")
        # A response may be its conversation from the beginning: it then opens as no response does, and holds the
        # prompt's last turn, if the prompt is not a text that the conversation may have in other words.
        opens = turns[0]["role"] not in ("assistant", "tool")
        if opens and (not isinstance(prompt, list) or before[-1] in turns):
            wholes.append(turns if turns[0]["role"] == "system" else _messages(system, "system", "system") + turns)
        else:
            wholes.append(before + turns)
    one, other = wholes
    if one == other:
        raise UselessRowError("equal")
    if any(whole[-1]["role"] != "assistant" for whole in wholes):
        raise UselessRowError("empty")
    shared = _shared(one, other)
    starts = [i for i in range(1, shared + 1) if all(i < len(w) and w[i]["role"] == "assistant" for w in wholes)]
    if not starts:
        raise UselessRowError("no_prompt")
    responses = [whole[starts[-1] :] for whole in wholes]
    if not all(any(turn["content"].strip() or "tool_calls" in turn for turn in turns) for turns in responses):
        raise UselessRowError("empty")
    return one[: starts[-1]], responses[0], responses[1]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two sequences have in common from the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ShareGPT's names, and those of tools in the sets that go by it.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool", "function_response": "tool"}
_KEPT = ("tool_calls", "tool_call_id", "name")  # that chat templates read, beside role and content


def _messages(value: Any, name: str, role: str) -> Messages:
    """Text (said by `role`), a message or some, with "role" and "content", or ShareGPT's "from" and "value"."""
    if value is None:
        return []
    if isinstance(value, str):
        value = _said(value, role)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise GenarmError(f"{name} is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise GenarmError(f"{name} has a message that is not an object")
        kept = {key: message[key] for key in _KEPT if message.get(key)}
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(str(part.get("text")) for part in content if part.get("type") == "text")
        if content is None and kept:
            content = ""
        for key, text in (("role", speaker), ("content", content)):
            if not isinstance(text, str):
                raise GenarmError(f"{name} has a message whose {key} is missing or not a string")
        messages.append({"role": _ROLES.get(str(speaker), speaker), "content": content, **kept})
    jsonl.check_unicode(messages, name)
    return messages


def _said(text: str | None, role: str) -> Messages:
    return [] if text is None else [{"role": role, "content": text}]


def _blank(response: Any) -> bool:
    return not response.strip() if isinstance(response, str) else response in (None, [], {})


def tools(row: Row) -> list[Any] | None:
    """The tools that a conversation may call: a column beside it, a list or its JSON."""
    value = row.get("tools")
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise GenarmError(f"tools is not JSON: {error}") from error
    if value and not isinstance(value, list):
        raise GenarmError("tools is not a list")
    return value or None

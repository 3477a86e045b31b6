"""Preference pairs: reading them from data sets, and turning them into token ids that a trainer can use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GenarmError
from ..tokens import encode_prompt
from . import data_files
from . import formats as preference_formats
from .formats import USELESS, UselessRowError

OBJECTIVES = ("better", "safer")
_NO_ACCIDENT = 20  # characters of a prompt with which two responses begin only because they repeat it
# Texts that a response can follow in its own tokens: a tokenizer may open a text by a space, or join a response to
# what stands before it.
_ANCHORS = ("\n", "a", ".", "0", ")")


@dataclass(frozen=True)
class Preference:
    """One row of the data: two responses to one prompt, of which a person (or a model) preferred ``chosen``.

    Either all three are strings, or all three are lists of chat messages. ``where`` is "path:line", for errors.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    where: str
    question: bool = False
    """Whether a tokenizer without a chat template can be given the messages as plain text."""
    tools: list[Any] | None = None
    """For the chat template."""


class Preferences(list[Preference]):
    """The rows of a data set that can be trained on; the others are in ``dropped``."""

    format: str
    """What was recognised, in words."""
    dropped: dict[str, list[str]]
    """By reason, a key of ``preference_formats.USELESS``: where the rows that were left out stand."""

    def summary(self) -> str:
        """One line for the screen.

        >>> rows = Preferences([Preference("p", "c", "r", "prefs.jsonl:1")])
        >>> rows.format, rows.dropped = "prompt, chosen, rejected", {"equal": ["prefs.jsonl:2"]}
        >>> rows.summary()
        'prompt, chosen, rejected; 1 of 2 rows, left out: 1 with equal responses'
        """
        total = len(self) + sum(map(len, self.dropped.values()))
        counted = [f"{len(places)} with {USELESS[reason]}" for reason, places in self.dropped.items()]
        return f"{self.format}; {len(self)} of {total} rows" + (f", left out: {', '.join(counted)}" if counted else "")

    def sha256(self) -> str:
        """Of the rows as they are trained on, whatever file they came from."""
        digest = hashlib.sha256()
        for row in self:
            fields = [row.prompt, row.chosen, row.rejected, row.question, row.tools]
            digest.update(json.dumps(fields, default=str).encode() + b"\n")
        return digest.hexdigest()


def read_preferences(source: str | Path, *, objective: str | None = None, strict: bool = False) -> Preferences:
    """Read a data set of preferences, in the format that its first row is recognised to have.

    The plain format is ``{"prompt": ..., "chosen": ..., "rejected": ...}``: strings, or ``prompt`` is a list of chat
    messages ``{"role": str, "content": str}`` and the responses are lists of messages or strings (one message of the
    assistant). Prompt and responses are separated where the responses hold both: whole transcripts as in HH-RLHF,
    whole conversations as in UltraFeedback, texts that all begin with the prompt. ``genarm.preferences.formats`` has
    the other formats; where the prompt is a column of its own in one of these, it is what a user says.

    Args:
        source: file, folder or hub name, see ``genarm.preferences.data_files.rows``.
        objective: "better" (if not given) or "safer": the label of PKU-SafeRLHF that says which response is chosen.
        strict: refuse a data set that has rows which nothing can be learned from: with equal or empty responses, a
            tie, no prompt. Else they are left out, and are in the result's ``dropped``.

    Raises:
        GenarmError: the data cannot be read or has no rows that can be trained on; "path:line: ..." for the first
            malformed row.
    """
    if objective not in (None, *OBJECTIVES):
        raise GenarmError(f"objective: expected {' or '.join(map(repr, OBJECTIVES))}, got {objective!r}")
    rows, form = Preferences(), None
    rows.dropped = {}
    for where, row in data_files.rows(source):
        form = form or _recognise(where, row, objective)
        preference = _preference(where, row, form)
        if isinstance(preference, str):
            rows.dropped.setdefault(preference, []).append(where)
        else:
            rows.append(preference)
    if form is None:
        raise GenarmError(f"{source}: has no rows")
    rows.format = form.name
    _take_prompts_off(rows)
    check_dropped(source, len(rows), rows.dropped, strict)
    return rows


def _recognise(where: str, row: dict[str, Any], objective: str | None) -> preference_formats.Format:
    try:
        return preference_formats.recognise(row, objective)
    except GenarmError as error:
        raise GenarmError(f"{where}: {error}") from error


def _preference(where: str, row: dict[str, Any], form: preference_formats.Format) -> Preference | str:
    """The row, or a key of USELESS."""
    try:
        prompt, chosen, rejected, question = preference_formats.read(row, form)
        return Preference(prompt, chosen, rejected, where, question, preference_formats.tools(row))
    except UselessRowError as useless:
        return str(useless)
    except GenarmError as error:
        raise GenarmError(f"{where}: {error}") from error


def check_dropped(source: str | Path, kept: int, dropped: Mapping[str, list[str]], strict: bool) -> None:
    """GenarmError when nothing is kept, or when `strict` and something was dropped; it names ten rows a reason."""
    if kept and not (strict and dropped):
        return
    named = []
    for reason, places in dropped.items():
        rows = [place.rpartition(":")[2] for place in places]
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        named.append(f"{USELESS[reason]} in row {', '.join(rows[:10])}{more}")
    what = "strict: there are rows to be left out" if kept else "has no rows that can be trained on"
    raise GenarmError(f"{source}: {what}: {'; '.join(named)}")


def _take_prompts_off(rows: Preferences) -> None:
    """Texts that are prompt + answer become answers, where most are so, or a long prompt in both is no accident."""
    texts = [i for i, row in enumerate(rows) if isinstance(row.prompt, str) and row.prompt]
    chosen, rejected = (
        {i for i in texts if getattr(rows[i], side).startswith(rows[i].prompt)} for side in ("chosen", "rejected")
    )
    repeating = {i for i in chosen & rejected if len(rows[i].prompt) >= _NO_ACCIDENT}
    for side in (chosen, rejected):
        if 2 * len(side) > len(texts):
            repeating |= side
    if repeating:
        rows.format += f" (responses that repeat the prompt in {len(repeating)} rows, taken off)"
    for i in sorted(repeating, reverse=True):
        row = rows[i]
        try:
            rows[i] = Preference(*preference_formats.without_prompt(*_parts(row)), row.where)
        except UselessRowError as useless:
            rows.dropped.setdefault(str(useless), []).append(rows.pop(i).where)


def encode_preferences(
    rows: list[Preference], tokenizer: Any, max_length: int, *, strict: bool = False
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Tokenise each row to the ids of its prompt and of its two responses, ``max_length`` tokens at most together.

    A string prompt has the ids that it has in decoding (``tokens.encode_prompt``): one BOS, no EOS; a response ends in
    one EOS. Chat rows are rendered with the chat template: the response is what the whole
    conversation's rendering adds to that of the prompt, up to its EOS. The prompt's tokens are those of the prompt
    alone, as in decoding, and the response's tokens are those that go on from there.

    What does not fit is cut first from the left of the prompt (a leading BOS stays), the same for both responses so
    that their log-probabilities condition on one prompt; only a response of ``max_length`` tokens or more loses its
    end. Nothing is cut silently: the second result counts. Rows whose responses are then equal are left out, and
    counted; with ``strict`` they are refused.

    Returns:
        ``[{"prompt": ids, "chosen": ids, "rejected": ids}, ...]``, in the order of ``rows``, and
        ``{"prompts": N, "prompts_truncated": ..., "responses": 2 N, "responses_truncated": ...}``, with
        "dropped_..." by reason where rows were left out, here or when they were read.

    Raises:
        GenarmError: "path:line: ..." for a row that the tokenizer cannot render, a tokenizer without EOS, or no row
            is left.
    """
    if tokenizer.eos_token_id is None:
        raise GenarmError("the tokenizer has no end-of-sequence token, which ends every response")
    pairs = []
    dropped: dict[str, list[str]] = {}
    counts = {"prompts": 0, "prompts_truncated": 0, "responses": 0, "responses_truncated": 0}
    for row in rows:
        try:
            prompt, *responses = _encode(row, tokenizer)
        except UselessRowError as useless:
            dropped.setdefault(str(useless), []).append(row.where)
            continue
        chosen, rejected = (response[: max_length - 1] for response in responses)
        if chosen == rejected:
            dropped.setdefault("equal_tokens", []).append(row.where)
            continue
        room = max(1, max_length - max(map(len, responses)))
        if len(prompt) > room:
            counts["prompts_truncated"] += 1
            bos = prompt[:1] if room > 1 and prompt[0] == tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - room + len(bos) :]
        counts["responses_truncated"] += sum(len(response) >= max_length for response in responses)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if rows:
        check_dropped(rows[0].where.rpartition(":")[0], len(pairs), dropped, strict)
    counts |= {"prompts": len(pairs), "responses": 2 * len(pairs)}
    for reason, places in (*getattr(rows, "dropped", {}).items(), *dropped.items()):
        counts[f"dropped_{reason}"] = counts.get(f"dropped_{reason}", 0) + len(places)
    return pairs, counts


def _encode(row: Preference, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    special = True
    if isinstance(row.prompt, list) and not (row.question and not tokenizer.chat_template):
        prompt, *responses = _render(row, tokenizer)
        special = False  # a chat template has written the special tokens already
    elif isinstance(row.prompt, list):
        prompt, *responses = ("\n\n".join(turn["content"] for turn in part) for part in _parts(row))
    else:
        prompt, *responses = _parts(row)
    texts = [prompt, *(prompt + response for response in responses)]
    prompt_ids, *whole_ids = [encode_prompt(tokenizer, text, special) for text in texts]
    if not prompt_ids:
        raise GenarmError(f"{row.where}: prompt has no tokens")
    chosen, rejected = (
        _ended(_continuation(prompt_ids, whole, response, tokenizer), tokenizer)
        for whole, response in zip(whole_ids, responses, strict=True)
    )
    return prompt_ids, chosen, rejected


def _parts(row: Preference) -> tuple[Any, Any, Any]:
    return row.prompt, row.chosen, row.rejected


def _continuation(prompt: list[int], whole: list[int], response: str, tokenizer: Any) -> list[int]:
    """The response's tokens after the prompt's own, which in decoding are fixed before the response begins."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # A token spans the boundary. Then the response's tokens are those that it has within a text.
    text = _text(whole, tokenizer)
    for anchor in _ANCHORS:
        before, after = tokenizer([anchor, anchor + response], add_special_tokens=False, verbose=False)["input_ids"]
        ids = after[len(before) :]
        if after[: len(before)] == before and _text(prompt + ids, tokenizer) == text:
            return ids
    raise UselessRowError("boundary")


def _text(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _ended(response: list[int], tokenizer: Any) -> list[int]:
    """With one EOS at the end. What follows a last EOS is never decoded: others, a template's line break after it."""
    eos = tokenizer.eos_token_id
    last = len(response) - response[::-1].index(eos) if eos in response else 0
    if last and not tokenizer.decode(response[last:]).strip():
        response = response[:last]
        while response[-1:] == [eos]:
            response = response[:-1]
    return [*response, eos]


def _render(row: Preference, tokenizer: Any) -> tuple[str, str, str]:
    if not tokenizer.chat_template:
        raise GenarmError(f"{row.where}: has chat messages, but the tokenizer has no chat template")
    options = {"tokenize": False} | ({"tools": row.tools} if row.tools else {})
    try:
        prompt = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, **options)
        wholes = [tokenizer.apply_chat_template(row.prompt + r, **options) for r in (row.chosen, row.rejected)]
    except Exception as error:  # a template is a program of its own and may raise anything
        raise GenarmError(f"{row.where}: the chat template rejects the messages: {error}") from error
    for whole in wholes:
        if not whole.startswith(prompt) or whole == prompt:
            raise GenarmError(
                f"{row.where}: the chat template renders the prompt differently with a response after it, "
                "so the response's tokens cannot be told apart"
            )
    return prompt, wholes[0][len(prompt) :], wholes[1][len(prompt) :]

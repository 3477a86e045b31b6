"""Preference pairs: reading them from JSON lines, and turning them into token ids that a trainer can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import jsonl
from .errors import GenarmError


@dataclass(frozen=True)
class Preference:
    """One row of the data: two responses to one prompt, of which a person (or a model) preferred ``chosen``.

    Either all three are strings, or all three are lists of chat messages. ``where`` is "path:line", for errors.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    where: str


def read_preferences(path: str | Path) -> list[Preference]:
    """Read and check a JSONL file of rows ``{"prompt": ..., "chosen": ..., "rejected": ...}``.

    The three are strings, or ``prompt`` is a list of chat messages ``{"role": str, "content": str}`` and the
    responses are lists of messages or strings (one message of the assistant). Other keys and blank lines are ignored.

    Raises:
        GenarmError: the file cannot be read or has no rows; "path:line: ..." for the first malformed row.
    """
    rows = [_preference(where, row) for where, row in jsonl.rows(path)]
    if not rows:
        raise GenarmError(f"{path}: has no rows")
    return rows


def _preference(where: str, row: dict[str, Any]) -> Preference:
    if missing := [key for key in ("prompt", "chosen", "rejected") if key not in row]:
        raise GenarmError(f"{where}: has no {' and no '.join(missing)}")
    prompt = row["prompt"]
    if not isinstance(prompt, str | list):
        raise GenarmError(f"{where}: prompt is neither a string nor a list of messages")
    chat = isinstance(prompt, list)
    check = jsonl.check_messages if chat else jsonl.check_text
    check(prompt, f"{where}: prompt")
    responses = []
    for key in ("chosen", "rejected"):
        response = row[key]
        if chat and isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        check(response, f"{where}: {key}")
        if not (any(message["content"] for message in response) if chat else response):
            raise GenarmError(f"{where}: {key} is empty")
        responses.append(response)
    chosen, rejected = responses
    if chosen == rejected:
        raise GenarmError(f"{where}: chosen and rejected are the same")
    return Preference(prompt, chosen, rejected, where)


def encode_preferences(
    rows: list[Preference], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Tokenise each row to the ids of its prompt and of its two responses, ``max_length`` tokens at most together.

    A string prompt gets the tokenizer's special tokens (BOS), a response ends in EOS. Chat rows are rendered with
    the chat template: the response is what the whole conversation's rendering adds to that of the prompt.

    What does not fit is cut first from the left of the prompt (a leading BOS stays), the same for both responses so
    that their log-probabilities condition on one prompt; only a response of ``max_length`` tokens or more loses its
    end. Nothing is cut silently: the second result counts.

    Returns:
        ``[{"prompt": ids, "chosen": ids, "rejected": ids}, ...]``, in the order of ``rows``, and
        ``{"prompts": N, "prompts_truncated": ..., "responses": 2 N, "responses_truncated": ...}``.

    Raises:
        GenarmError: "path:line: ..." for a row that the tokenizer cannot render, or a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise GenarmError("the tokenizer has no end-of-sequence token, which ends every response")
    pairs = []
    counts = {"prompts": len(rows), "prompts_truncated": 0, "responses": 2 * len(rows), "responses_truncated": 0}
    for row in rows:
        prompt, chosen, rejected = _encode(row, tokenizer)
        room = max(1, max_length - max(len(chosen), len(rejected)))
        if len(prompt) > room:
            counts["prompts_truncated"] += 1
            bos = prompt[:1] if room > 1 and prompt[0] == tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - room + len(bos) :]
        counts["responses_truncated"] += sum(len(response) >= max_length for response in (chosen, rejected))
        chosen, rejected = chosen[: max_length - 1], rejected[: max_length - 1]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs, counts


def _encode(row: Preference, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    chat = isinstance(row.prompt, list)
    prompt, chosen, rejected = _render(row, tokenizer) if chat else (row.prompt, row.chosen, row.rejected)
    # A chat template has written the special tokens already. verbose: we truncate, so no warning of long sequences.
    encoded = tokenizer([prompt, prompt + chosen, prompt + rejected], add_special_tokens=not chat, verbose=False)
    prompt_ids, *whole_ids = encoded["input_ids"]
    if not prompt_ids:
        raise GenarmError(f"{row.where}: prompt has no tokens")
    responses = []
    for text, whole in zip((chosen, rejected), whole_ids, strict=True):
        ids = whole[len(prompt_ids) :]
        if whole[: len(prompt_ids)] != prompt_ids:
            # A token spans the boundary. In decoding the prompt's tokens are fixed before the response begins.
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # A template may write something after its end of turn ("<eos>\n").
        ended = text.rstrip().endswith(tokenizer.eos_token) if chat else ids[-1:] == [tokenizer.eos_token_id]
        responses.append(ids if ended else [*ids, tokenizer.eos_token_id])
    return prompt_ids, responses[0], responses[1]


def _render(row: Preference, tokenizer: Any) -> tuple[str, str, str]:
    if not tokenizer.chat_template:
        raise GenarmError(f"{row.where}: has chat messages, but the tokenizer has no chat template")
    try:
        prompt = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        wholes = [tokenizer.apply_chat_template(row.prompt + r, tokenize=False) for r in (row.chosen, row.rejected)]
    except Exception as error:  # a template is a program of its own and may raise anything
        raise GenarmError(f"{row.where}: the chat template rejects the messages: {error}") from error
    for whole in wholes:
        if not whole.startswith(prompt) or whole == prompt:
            raise GenarmError(
                f"{row.where}: the chat template renders the prompt differently with a response after it, "
                "so the response's tokens cannot be told apart"
            )
    return prompt, wholes[0][len(prompt) :], wholes[1][len(prompt) :]

"""What ids stand for in a tokenizer: prompts as ids, and the ids that are not plain text."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple


def encode_prompt(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The ids of a text that is to be continued; `[]` for an empty text where the tokenizer adds no BOS.

    Args:
        special: whether the tokenizer adds its special tokens. A text that a chat template made has them already.

    What is to be continued has not ended, and begins once: an EOS that the tokenizer appends is left out, and BOS
    stands at the beginning once, also where the text spells it and the tokenizer adds it. What the text itself spells
    stays.
    """
    own: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not special:
        return own
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    appended = _leading(ids[::-1], eos) - _leading(own[::-1], eos)
    # Of an empty text with one token for both, one is left: the BOS.
    ids = ids[: max(len(ids) - appended, int(bos == eos))]
    return ids[max(0, _leading(ids, bos) - max(1, _leading(own, bos))) :]


class Kinds(NamedTuple):
    """The ids that are not plain text."""

    special: Mapping[int, str]
    """What a text is shown without, each with its name."""
    bytes: Mapping[int, int]
    """By id, a byte of a character that the vocabulary lacks ("byte fallback": <0x00> to <0xFF>)."""


def kinds(tokenizer: Any) -> Kinds:
    """The special tokens and the bytes of a tokenizer."""
    return _kinds(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)  # it is asked for every prompt; a tokenizer that has been given tokens since has another size
def _kinds(tokenizer: Any, size: int) -> Kinds:
    special = {
        token: tokenizer.convert_ids_to_tokens(token)
        for token in {*tokenizer.all_special_ids, *added_tokens(tokenizer)}
        if not tokenizer.decode([token], skip_special_tokens=True) and tokenizer.decode([token])
    }
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    found = [*zip(tokenizer.convert_tokens_to_ids(names), names, range(256), strict=True)]
    in_bytes = {
        token: byte
        for token, name, byte in found
        if token is not None and tokenizer.convert_ids_to_tokens(token) == name  # not the id of what is unknown
    }
    letter_a = found[ord("A")][0]
    if letter_a not in in_bytes or tokenizer.decode([letter_a]) != "A":  # the names do not mean bytes
        in_bytes = {}
    return Kinds(special, in_bytes)


def added_tokens(tokenizer: Any) -> set[int]:
    """The ids that stand beside the vocabulary proper: special tokens, and what was added later."""
    with suppress(NotImplementedError):  # by transformers' wrapper of mistral-common
        return set(tokenizer.added_tokens_decoder)
    return set(tokenizer.all_special_ids)


def _leading(ids: Sequence[int], token: int | None) -> int:
    """How many times `token` stands at the beginning."""
    return sum(1 for _ in takewhile(lambda one: one == token, ids))

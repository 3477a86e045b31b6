"""The bitmask of allowed tokens that `guided_step` takes: made, and read.

An int32 tensor `[B, W]` with W = ceil(V / 32): token v is allowed where bit v % 32 of word v // 32 is set. xgrammar and
llguidance fill masks of this layout, theirs or those made here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import validation

_BITS = 32  # of a word


def allocate(
    batch_size: int, vocab_size: int, *, allowed: bool = True, device: str | torch.device | None = None
) -> Tensor:
    """Makes a mask `[batch_size, W]` that allows every token, or none.

    Args:
        allowed: whether every token is allowed. A grammar engine overwrites the rows that it constrains.
        device: of the mask; torch's default device when left out. Grammar engines fill masks on the CPU.

    Raises:
        ValueError, TypeError: a number is not an int, `batch_size` is below 0 or `vocab_size` below 1, or `allowed` is
            not a bool.

    >>> allocate(2, 40)
    tensor([[-1, -1],
            [-1, -1]], dtype=torch.int32)
    """
    rows, width = _at_least(0, "batch_size", batch_size), _at_least(1, "vocab_size", vocab_size)
    word = -1 if validation.flag("allowed", allowed) else 0
    return torch.full((rows, -(-width // _BITS)), word, dtype=torch.int32, device=device)


def from_bools(allowed: Tensor) -> Tensor:
    """Packs a bool tensor `[B, V]`, True where a token is allowed, into a mask `[B, W]` on its device.

    The bits past the vocabulary are 0.

    Raises:
        ValueError, TypeError: `allowed` is not a bool tensor `[B, V]` with V of at least 1.

    >>> from_bools(torch.tensor([[True, False, True], [False, False, False]]))
    tensor([[5],
            [0]], dtype=torch.int32)
    """
    _check_matrix("allowed", allowed, torch.bool, "V")
    words = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % _BITS)).unflatten(1, (-1, _BITS))
    return (words.int() << _places(allowed.device)).sum(2, dtype=torch.int32)


def from_allowed_ids(
    allowed_ids: Sequence[Sequence[int]], vocab_size: int, *, device: str | torch.device | None = None
) -> Tensor:
    """Makes a mask `[B, W]` that allows in each row the ids of its list, in any order, and no other token.

    Args:
        allowed_ids: B lists of ids. A row with an empty list allows no token.
        vocab_size: V, above every id.
        device: of the mask; torch's default device when left out.

    Raises:
        ValueError, TypeError: `allowed_ids` is not a sequence of sequences of ints from 0 to vocab_size - 1, or
            `vocab_size` is not an int of at least 1.

    >>> to_bools(from_allowed_ids([[0, 2], [1]], vocab_size=3), vocab_size=3)
    tensor([[ True, False,  True],
            [False,  True, False]])
    """
    width = _at_least(1, "vocab_size", vocab_size)
    _check_sequence("allowed_ids", allowed_ids, "one list of ids for each row")
    allowed = torch.zeros(len(allowed_ids), width, dtype=torch.bool, device="cpu")
    for b, ids in enumerate(allowed_ids):
        _check_sequence(f"allowed_ids[{b}]", ids, "a list of ids")
        for i, token in enumerate(ids):
            if not 0 <= validation.counter(f"allowed_ids[{b}][{i}]", token) < width:
                raise ValueError(f"allowed_ids[{b}][{i}]: expected an id from 0 to {width - 1}, got {token}")
        allowed[b, list(ids)] = True
    return from_bools(allowed).to(torch.get_default_device() if device is None else device)


def to_bools(token_mask: Tensor, vocab_size: int) -> Tensor:
    """Unpacks a mask `[B, W]`: a bool tensor `[B, V]` on its device, True where a token is allowed.

    Args:
        token_mask: int32, with words enough for the vocabulary; further words are left out.
        vocab_size: V.

    Raises:
        ValueError, TypeError: `token_mask` is not such a tensor, or `vocab_size` is not an int of at least 1.

    >>> to_bools(torch.tensor([[5]], dtype=torch.int32), vocab_size=4)
    tensor([[ True, False,  True, False]])
    """
    width = _at_least(1, "vocab_size", vocab_size)
    words = -(-width // _BITS)
    _check_matrix("token_mask", token_mask, torch.int32, f">= {words}", words)
    return (token_mask[:, :words, None] >> _places(token_mask.device) & 1).bool().flatten(1)[:, :width]


def _places(device: torch.device) -> Tensor:
    return torch.arange(_BITS, dtype=torch.int32, device=device)


def _at_least(low: int, name: str, value: Any) -> int:
    number = validation.counter(name, value)
    if number < low:
        raise ValueError(f"{name}: expected an integer of at least {low}, got {value}")
    return number


def _check_matrix(name: str, x: Any, dtype: torch.dtype, width: str, least: int = 1) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] < least:
        raise ValueError(f"{name}: expected {dtype} [B, {width}], got {x.dtype} {list(x.shape)}")


def _check_sequence(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")

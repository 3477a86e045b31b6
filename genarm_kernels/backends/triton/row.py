"""Pass 2 begins: the tiles' summaries together, and z of any of the row's tokens."""

import triton
import triton.language as tl

from .board import TILE_SUM, TILE_TOP, allowed_of
from .numbers import INF, LOG2E, finite_or_zero, reference_of, relative
from .tile import combine, in_mask, load


@triton.jit
def merge(workspace, tiles, scale, pairs, OPERANDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles' summaries of a row together, for the first `pairs` of segments (z, then the operands) at once.

    Returns, `[ROWS]` each, the largest, the sum in float64 and what that is relative to; then how many tokens are
    allowed in all, and how many in the tile that allows the fewest. BLOCK is at most the number of a program's threads:
    more fails an assertion in Triton 3.7 (OptimizeThreadLocality).
    """
    pair = tl.arange(0, ROWS)[:, None]
    scales = tl.where(pair == 0, scale, LOG2E)
    tops = tl.full([ROWS], -INF, tl.float32)
    allowed = tl.full([], 0, tl.int32)
    fewest = tl.full([], 0, tl.int32)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        counts = tl.load(allowed_of(workspace, tiles, OPERANDS) + tile, mask=tile < tiles, other=0)
        inside = (tile[None, :] < tiles) & (pair < pairs)
        top = tl.load(workspace + (2 * pair + TILE_TOP) * tiles + tile[None, :], mask=inside, other=-INF)
        tops = tl.maximum(tops, tl.max(top, 1))
        allowed += tl.sum(counts)
        fewest = tl.minimum(fewest, tl.min(counts))
    references = reference_of(finite_or_zero(tops)[:, None], scales)
    total = tl.zeros([ROWS], tl.float64)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        inside = (tile[None, :] < tiles) & (pair < pairs)
        at = workspace + 2 * pair * tiles + tile[None, :]
        top = finite_or_zero(tl.load(at + TILE_TOP * tiles, mask=inside, other=0.0))
        each = tl.load(at + TILE_SUM * tiles, mask=inside, other=0.0)
        total += tl.sum(relative(each, reference_of(top, scales) - references), 1)
    return tops, total, tl.sum(references, 1), allowed, fewest


@triton.jit
def pick(x, INDEX: tl.constexpr):
    """An element of a short vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == INDEX, x, 0.0))


@triton.jit
def z_of(source, v, inside, OPERANDS: tl.constexpr):
    """z of the tokens `v`; `source` is the row's operands, their weights, its mask and the vocabulary."""
    x_rows, row_weights, mask_row, mask_stride, masked, vocab = source
    inside = inside & (v < vocab)
    may = inside & in_mask(mask_row, mask_stride, masked, v, v)
    z, _ = combine(load(x_rows, v, inside, 0, OPERANDS), row_weights, may, OPERANDS)
    return z

"""The whole distribution, guided_log_softmax: pass 1 as for a step without filters, then this."""

import triton
import triton.language as tl

from .arguments import TEMPERATURE, parameter, rows_of, scale_of, weights_of
from .board import TILE
from .numbers import INF, LN2, NAN, log_probability
from .row import merge, pick
from .tile import combine, in_mask, load

TILES = tl.constexpr(128)  # tiles at a time, one per thread
TILES_A_PROGRAM = tl.constexpr(4)  # share one merge of the row's summaries


@triton.jit
def whole_row_pass(
    x_ptrs,
    x_strides,
    weights,
    numbers,
    row_ptrs,
    row_strides,
    given,
    mask_ptr,
    mask_strides,
    masked,
    vocab,
    workspace_ptr,
    workspace_stride,
    logp_ptr,
    width,
    OPERANDS: tl.constexpr,
):
    """log p of every token, as wide as the base.

    Grid (B ceil(T / TILES_A_PROGRAM),), where T is the tiles of `width`. Reads the logits a second time and writes 4
    bytes per token.
    """
    tiles = tl.cdiv(vocab, TILE)
    parts = tl.cdiv(width, TILE * TILES_A_PROGRAM)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    workspace = workspace_ptr + row * workspace_stride
    x_rows = rows_of(x_ptrs, x_strides, row, OPERANDS, False)
    mask_row = mask_ptr + row * mask_strides[0]
    row_weights = weights_of(row, weights, row_ptrs, row_strides, given, OPERANDS)
    temperature = parameter(row, numbers[0], row_ptrs, row_strides, given, TEMPERATURE)

    # 1. The row's largest and its log-probability, from the summaries.
    valid = (temperature > 0) & (temperature < INF)
    for i in tl.static_range(OPERANDS):
        valid = valid & (tl.abs(row_weights[i]) < INF)
    scale = scale_of(temperature)
    tops, masses, references, _allowed, fewest = merge(workspace, tiles, scale, 1, OPERANDS, 1, TILES)
    top = pick(tops, 0)
    spoilt = (fewest < 0) | (valid == 0)
    far = pick(references, 0) - top.to(tl.float64) * scale.to(tl.float64)
    log_largest = log_probability(-tl.log(pick(masses, 0)) - far * LN2)

    # 2. log p.
    for tile in range(part * TILES_A_PROGRAM, part * TILES_A_PROGRAM + TILES_A_PROGRAM):
        v = tile * TILE + tl.arange(0, TILE)
        inside = v < vocab
        may = inside & in_mask(mask_row, mask_strides[1], masked, v, v)
        z, _ = combine(load(x_rows, v, inside, 0, OPERANDS), row_weights, may, OPERANDS)
        # In halves: the difference of two float32 may be twice the largest.
        logp = tl.div_rn(z * 0.5 - top * 0.5, temperature) * 2.0 + log_largest.to(tl.float32)
        logp = tl.where(spoilt, NAN, tl.where(z == -INF, -INF, logp))
        tl.store(logp_ptr + row * width + v, logp, mask=v < width)

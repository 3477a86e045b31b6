"""How a kernel reads its arguments: the parameters, a number or one value per row each, and the operands' rows."""

import triton
import triton.language as tl

from ... import rng
from .numbers import MAX_FLOAT

# Bits of `given`: which parameters come as tensors, one value per row. In the order of `row_ptrs`.
BASE_WEIGHT = tl.constexpr(0)
TEMPERATURE = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
TOP_K = tl.constexpr(4)
SEED = tl.constexpr(5)
POSITION = tl.constexpr(6)
WEIGHTS = tl.constexpr(7)

SEED_STEP = tl.constexpr(rng.SEED_STEP)


@triton.jit
def parameter(row, number, row_ptrs, row_strides, given, INDEX: tl.constexpr):
    """A parameter of the row: from its tensor if there is one, otherwise the number."""
    return tl.load(row_ptrs[INDEX] + row * row_strides[INDEX], mask=(given >> INDEX) & 1 != 0, other=number)


@triton.jit
def weights_of(row, weights, row_ptrs, row_strides, given, OPERANDS: tl.constexpr):
    """The operands' weights, the base's first."""
    row_weights = (parameter(row, weights[0], row_ptrs, row_strides, given, BASE_WEIGHT),)
    for i in tl.static_range(1, OPERANDS):
        weight_ptr = row_ptrs[WEIGHTS] + row * row_strides[WEIGHTS] + (i - 1) * row_strides[WEIGHTS + 1]
        row_weights = row_weights + (tl.load(weight_ptr, mask=(given >> WEIGHTS) & 1 != 0, other=weights[i]),)
    return row_weights


@triton.jit
def rows_of(x_ptrs, x_strides, row, OPERANDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the operands' rows begin. ALIGNED: every row of every operand begins at a multiple of 16 bytes."""
    x_rows = ()
    for i in tl.static_range(OPERANDS):
        x_row = x_ptrs[i] + row * x_strides[i]
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
        x_rows = x_rows + (x_row,)
    return x_rows


@triton.jit
def scale_of(temperature):
    """p is 2^(scale (z - top)); temperature 0 has the log-probabilities of temperature 1."""
    log2e = tl.full([], 1.4426950408889634, tl.float32)
    return tl.minimum(tl.div_rn(log2e, tl.where(temperature == 0, 1.0, temperature)), MAX_FLOAT)

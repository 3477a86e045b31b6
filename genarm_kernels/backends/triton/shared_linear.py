"""A linear layer for rows of several models: the base, and ARMs that are LoRA adapters of it."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ...parameters import WholeLayer
from . import interpreted

if interpreted():
    from .interpreter import mend

    mend()

# By reckoning, not measured on a GPU yet (bench/results/README.md): the smallest layers of a 7B model make a program an
# SM, which has 4 tiles of 8 KB of weights on their way.
BLOCK_N, BLOCK_K, WARPS, MOST_STAGES = 32, 128, 4, 5


@triton.jit(do_not_specialize=["rows", "operands", "ranks"])
def shared_linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    down_ptr,
    up_ptr,
    owners_ptr,
    rows,
    operands,
    width,
    height,
    ranks,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m] = W x[m] + bias + the sum, over the ranks r that m's operand owns, of up[r] (down[r] . x[m]).

    A program makes BLOCK_N numbers of every row, and down x for itself: W is read once, in all 2 width height bytes;
    down, 2 ranks width, once a program, from the L2 cache.
    """
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = n.to(tl.int64)[:, None] * width

    # 1. W x, and down x from the same tiles of x.
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inner = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        inside = k < width
        weight = tl.load(weight_ptr + offsets + k, (n < height)[:, None] & inside, 0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + m[:, None] * width + k, (m < rows)[:, None] & inside, 0.0)
        down = tl.load(down_ptr + r[:, None] * width + k, (r < ranks)[:, None] & inside, 0.0)
        y = tl.dot(x, tl.trans(weight), y)
        inner = tl.dot(x, tl.trans(down), inner)

    # 2. To each row what its own operand adds.
    owner = tl.load(owners_ptr + r, r < ranks, -1)
    inner = tl.where(owner[None, :] == (m % operands)[:, None], inner, 0.0)
    up = tl.load(up_ptr + r[:, None] * height + n[None, :], (r < ranks)[:, None] & (n < height)[None, :], 0.0)
    y = tl.dot(inner.to(up.dtype), up, y)
    if BIAS:
        y += tl.load(bias_ptr + n, n < height, 0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * height + n[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), (m < rows)[:, None] & (n < height)[None, :])


def constants(rows: int, ranks: int, bias: bool) -> dict[str, Any]:
    block_m, block_r = (max(16, triton.next_power_of_2(count)) for count in (rows, ranks))
    return {"BIAS": bias, "BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}


def options(values: dict[str, Any], most_shared: int) -> dict[str, int]:
    """For a GPU whose blocks have up to `most_shared` bytes of shared memory."""
    stage = 2 * BLOCK_K * (values["BLOCK_M"] + values["BLOCK_R"] + BLOCK_N)
    return {"num_warps": WARPS, "num_stages": max(1, min(MOST_STAGES, (most_shared - 1024) // stage))}


@functools.cache
def _most_shared(device: int) -> int:
    if interpreted():
        return 1 << 20
    most: int = driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return most


def shared_linear(x: Tensor, layer: WholeLayer) -> Tensor:
    for name, tensor in zip(("x", *layer._fields[:4]), (x, *layer[:4]), strict=True):
        if tensor is not None and (tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {x.dtype}, like x, got {tensor.dtype}, {tensor.stride()}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected bfloat16 or float16, got {x.dtype}")
    y = x.new_empty((*x.shape[:-1], len(layer.weight)))
    launch(y, x, layer)
    return y


def launch(y: Tensor, x: Tensor, layer: WholeLayer) -> None:
    weight, bias, down, up, owners, operands = layer
    (height, width), ranks = weight.shape, len(down)
    values = constants(len(x), ranks, bias is not None)
    with torch.cuda.device_of(x):  # nothing on a CPU
        shared_linear_kernel[(triton.cdiv(height, BLOCK_N),)](
            y,
            x,
            weight,
            weight if bias is None else bias,
            down,
            up,
            owners,
            len(x),
            operands,
            width,
            height,
            ranks,
            **values,
            **options(values, _most_shared(x.get_device())),
        )

"""Linear layers of a base for rows of its own and of ARMs that are LoRA adapters of it."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from . import ops
from .backends import cpu, why_unavailable
from .validation import OPERAND_DTYPES

# Rows up to which the CPU core takes less time than torch's products (rank 8, 1024 to 1024, two threads).
_FEW = 32
# Rows, and ranks of all adapters together, up to which one Triton kernel does the whole layer.
_MOST_ROWS, _MOST_RANKS = 64, 64

shared_linear = ops.shared_linear


def fits_shared_linear(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether `shared_linear` runs at x `[R, T, in]`, and is meant for it: a step of decoding on a GPU, in 16 bits."""
    return (
        x.is_cuda
        and x.shape[1] == 1
        and len(x) <= _MOST_ROWS
        and len(down) <= _MOST_RANKS
        and x.dtype == weight.dtype == down.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and why_unavailable("triton") is None
    )


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, first: int, step: int) -> None:
    """y[first::step] += (x[first::step] down^T) up, in place.

    Args:
        y, x: the layer's output `[R, T, out]` and input `[R, T, in]`.
        down: `[r, in]`; its dtype, which `up` shares, is that of the products.
        up: `[r, out]`.
    """
    step_of_decoding = x.shape[1] == 1
    if step_of_decoding and len(x) <= _FEW * step and _suits_core(y, x, down, up):
        cpu.add_low_rank(y, x, down, up, first, step)
        return
    own = y[first::step]
    # As matrices: of a strided batch, torch makes batched products, which cost four times as much on a CPU.
    inner = F.linear(x[first::step].flatten(0, 1).to(down.dtype), down)
    if step_of_decoding and y.dtype == up.dtype:
        own.squeeze(1).addmm_(inner, up)
    else:
        own += torch.mm(inner, up).view(own.shape)


def _suits_core(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> bool:
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and down.dtype == torch.float32
        and x.dtype == y.dtype
        and x.dtype in OPERAND_DTYPES
        and not y.requires_grad
        and y.shape[1:] == (1, up.shape[1])
        and x.shape[2] == down.shape[1]
        and x.is_contiguous()
        and y.is_contiguous()
        and down.is_contiguous()
        and up.is_contiguous()
        and why_unavailable("cpu") is None
    )

"""Linear layers of a base, for rows of its own and of ARMs that are LoRA adapters of it."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from . import ops
from .backends import cpu, why_unavailable
from .validation import OPERAND_DTYPES

# Multiply-adds up to which the CPU core takes less time than torch's products, which split them over threads and make
# more of many rows: 1.5 us in place of 15 for one row of 1024 to 1024, rank 8 (2 cores).
_LITTLE_WORK = 1 << 18
# Rows, and ranks of all adapters together, up to which one Triton kernel does the whole layer: by reckoning, since the
# rows are read again by every program. `bench/gpu_linear.py` measures it.
_MOST_ROWS, _MOST_RANKS = 16, 64

shared_linear = ops.shared_linear


def can_share(weight: Tensor) -> bool:
    """Whether `shared_linear` runs on the weight's device: to be asked once a layer, for `fits_shared_linear`."""
    return weight.is_cuda and why_unavailable("triton") is None


def fits_shared_linear(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether `shared_linear` takes x `[R, T, in]`, and is meant for it: a step of decoding in 16 bits."""
    return (
        x.shape[1] == 1
        and len(x) <= _MOST_ROWS
        and len(down) <= _MOST_RANKS
        and x.dtype == weight.dtype == down.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
    )


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, first: int, step: int) -> None:
    """y[first::step] += (x[first::step] down^T) up, in place.

    Args:
        y, x: the layer's output `[R, T, out]` and input `[R, T, in]`.
        down: `[r, in]`; its dtype, which `up` shares, is that of the products.
        up: `[r, out]`.
    """
    if _suits_core(y, x, down, up, step):
        cpu.add_low_rank(y, x, down, up, first, step)
        return
    own = y[first::step]
    # As matrices: of a strided batch, torch makes batched products, which cost four times as much on a CPU.
    inner = F.linear(x[first::step].flatten(0, 1).to(down.dtype), down)
    if x.shape[1] == 1 and y.dtype == up.dtype:
        own.squeeze(1).addmm_(inner, up)
    else:
        own += torch.mm(inner, up).view(own.shape)


def _suits_core(y: Tensor, x: Tensor, down: Tensor, up: Tensor, step: int) -> bool:
    """A step of decoding on the CPU, which nothing but the core is to see; sizes that are safe to read and write."""
    (ranks, width), height = down.shape, up.shape[1]
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and x.shape == (len(y), 1, width)
        and y.shape[1:] == (1, height)
        and len(up) == ranks
        and len(x) * ranks * (width + height) < _LITTLE_WORK * step
        and x.dtype == y.dtype
        and x.dtype in OPERAND_DTYPES
        and down.dtype == up.dtype == torch.float32
        and y.is_cpu
        and down.is_cpu
        and up.is_cpu
        and y.is_contiguous()
        and x.is_contiguous()
        and down.is_contiguous()
        and up.is_contiguous()
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and why_unavailable("cpu") is None
    )

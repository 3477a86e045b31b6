"""`shared_linear`: a linear layer of a base, for rows of its own and of ARMs that are LoRA adapters of it."""

from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import cpu, reference, triton
from .dispatch import LIBRARY
from .parameters import SharedLayer, WholeLayer, flatten, schema, take


def shared_linear(x: Tensor, layer: SharedLayer, backend: str = "auto") -> Tensor:
    """Computes a layer for rows of several models: W x[m] + bias, and for an ARM its own up (down x[m]) on top.

    Row m belongs to operand m % operands; operand 0 is the base.

    Args:
        x: `[R, T, in]`: the base's row, ARM 1's, ..., ARM N's, the base's, and so on.
        backend: "auto", "reference", "cpu" or "triton"; a named backend runs or raises. "cpu" leaves to PyTorch what
            its core is not meant for, "triton" is one launch for a step of decoding (T = 1).

    Returns:
        `[R, T, out]`.

    Raises:
        ValueError: `backend` is none of these, or "triton" finds another dtype or tensors that are not contiguous.
        RuntimeError: the named backend cannot run here.
    """
    if backend == "auto":
        backend = _fastest(x, layer)
    elif backend in ("reference", "cpu", "triton"):
        backends.load(backend, x.device.type, len(x))
    else:
        raise ValueError(f"backend: expected 'auto', 'reference', 'cpu' or 'triton', got {backend!r}")
    if backend == "triton":
        if layer.whole is None:
            raise ValueError("layer: expected one with `whole` for backend 'triton', got None")
        y: Tensor = torch.ops.genarm_kernels.shared_linear.default(x, *flatten(layer.whole))
        return y
    return (cpu if backend == "cpu" else reference).shared_linear(x, layer)


def _fastest(x: Tensor, layer: SharedLayer) -> str:
    if layer.whole is not None and triton.suits_shared_linear(x, layer.whole):
        return "triton"
    return "cpu" if cpu.suits_shared_linear(x) else "reference"


def can_fuse(weight: Tensor) -> bool:
    """Whether a kernel may take a layer of this weight whole: to be asked once a layer."""
    return weight.is_cuda and backends.why_unavailable("triton") is None


# PyTorch's own operators do for the other backends: a compiler may fuse them with what is around.
LIBRARY.define(f"shared_linear(Tensor x, {schema(WholeLayer)}) -> Tensor")


@torch.library.impl(LIBRARY, "shared_linear", "CompositeExplicitAutograd")
def _operator(x: Tensor, *flat: Any) -> Tensor:
    backends.load("triton", x.device.type, len(x))  # or an error that says why not
    from .backends.triton.shared_linear import shared_linear

    return shared_linear(x, take(WholeLayer, iter(flat)))


@torch.library.register_fake("genarm_kernels::shared_linear", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))

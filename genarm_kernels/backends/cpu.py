"""The CPU core (csrc/) as a backend: hands tensors' addresses to `_cpu` and makes the outputs."""

from pathlib import Path

import torch
from torch import Tensor

from ..outputs import GuidedStep
from ..parameters import Inputs, LayerPart, Sampling, SharedLayer
from . import compiled, reference

# Multiply-adds up to which the core takes less time than torch's products, which split them over threads and make more
# of many rows: 1.5 us in place of 15 for one row of 1024 to 1024, rank 8 (2 cores).
_LITTLE_WORK = 1 << 18

_import_error: ImportError | None = None
try:
    from .. import _cpu
except ImportError as error:
    _import_error = error


def why_unavailable() -> str | None:
    """None when the core is there and runs on this machine, otherwise the reason in words."""
    if _import_error is not None:
        reason = Path(__file__).parents[1] / "_cpu.error"
        return reason.read_text().strip() if reason.exists() else f"the compiled core cannot be loaded: {_import_error}"
    if _cpu.isa() is None:
        return f"GENARM_CPU_ISA names none of what this machine runs: {', '.join(_cpu.supported_isas())}"
    return None


def instruction_set() -> str | None:
    """The fastest of "avx512", "avx2" and "portable" that this machine runs, or what GENARM_CPU_ISA names."""
    return _cpu.isa()


def guided_step(inputs: Inputs, sampling: Sampling) -> GuidedStep:
    return compiled.guided_step(_cpu.guided_step, torch.get_num_threads(), inputs, sampling)


def guided_log_softmax(inputs: Inputs) -> Tensor:
    return compiled.guided_log_softmax(_cpu.guided_log_softmax, torch.get_num_threads(), inputs)


def suits_shared_linear(x: Tensor) -> bool:
    """A CPU's, where no compiler would rather see PyTorch's own operators."""
    return x.is_cpu and not torch.compiler.is_compiling() and why_unavailable() is None


def shared_linear(x: Tensor, layer: SharedLayer) -> Tensor:
    y = layer.linear(x)
    for part in layer.parts:
        add = add_part if suits_part(y, x, part, layer.operands) else reference.add_part
        add(y, x, part, layer.operands)
    return y


def suits_part(y: Tensor, x: Tensor, part: LayerPart, operands: int) -> bool:
    """A small step of decoding, which nothing but the core is to see; sizes that are safe to read and write."""
    down, up = part.down, part.up
    (ranks, width), height = down.shape, up.shape[1]
    return (
        x.shape == (len(y), 1, width)
        and y.shape[1:] == (1, height)
        and len(up) == ranks
        and len(x) * ranks * (width + height) < _LITTLE_WORK * operands
        and x.dtype == y.dtype
        and x.dtype in compiled.DTYPES
        and down.dtype == up.dtype == torch.float32
        and x.is_cpu
        and y.is_cpu
        and down.is_cpu
        and up.is_cpu
        and y.is_contiguous()
        and x.is_contiguous()
        and down.is_contiguous()
        and up.is_contiguous()
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def add_part(y: Tensor, x: Tensor, part: LayerPart, operands: int) -> None:
    """What an ARM adds to its rows of y, in place; x and the part must suit."""
    rank, width = part.down.shape
    _cpu.add_low_rank(
        dtype=compiled.DTYPES[x.dtype],
        y=y,
        x=x,
        down=part.down,
        up=part.up,
        rows=len(range(part.operand, len(x), operands)),
        first=part.operand,
        step=operands,
        width=width,
        height=part.up.shape[1],
        rank=rank,
    )

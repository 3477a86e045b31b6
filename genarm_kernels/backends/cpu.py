"""The CPU core (csrc/) as a backend: hands tensors' addresses to `_cpu` and makes the outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import compiled

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


def guided_step(*args: Any) -> tuple[Tensor, ...]:
    return compiled.guided_step(_cpu, torch.get_num_threads(), *args)


def guided_log_softmax(*args: Any) -> Tensor:
    return compiled.guided_log_softmax(_cpu, torch.get_num_threads(), *args)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, first: int, step: int) -> None:
    """`genarm_kernels.low_rank.add_low_rank` for T = 1, all contiguous, the adapter in float32: checked there."""
    sizes = (len(range(first, len(x), step)), first, step, down.shape[1], up.shape[1], len(down))
    _cpu.add_low_rank(compiled.DTYPES[x.dtype], y, x, down, up, *sizes)

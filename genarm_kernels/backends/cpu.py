"""The CPU core (csrc/) as a backend: hands tensors' addresses to `_cpu` and makes the outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_import_error: ImportError | None = None
try:
    from .. import _cpu
except ImportError as error:
    _import_error = error

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # genarm_dtype


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


def guided_step(
    base_logits: Tensor, arm_logits: list[Tensor], vocab_size: int, logprobs: bool, *parameters: Any
) -> tuple[Tensor, ...]:
    rows = base_logits.shape[0]
    some = rows if logprobs else 0
    empty = base_logits.new_empty
    token, status = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.int32)
    logprob, log_mass = empty(some, dtype=torch.float32), empty(some, dtype=torch.float32)
    kept, base_logprob = empty(rows, dtype=torch.int32), empty(some, dtype=torch.float32)
    arm_logprobs = empty(some, len(arm_logits), dtype=torch.float32) if logprobs else empty(0, dtype=torch.float32)
    outputs = token, logprob, log_mass, kept, base_logprob, arm_logprobs, status
    _cpu.guided_step(
        _DTYPES[base_logits.dtype],
        torch.get_num_threads(),
        rows,
        *outputs,
        base_logits,
        arm_logits,
        vocab_size,
        logprobs,
        *parameters,
    )
    return outputs


def guided_log_softmax(base_logits: Tensor, arm_logits: list[Tensor], vocab_size: int, *parameters: Any) -> Tensor:
    rows = base_logits.shape[0]
    logp = torch.empty_like(base_logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    _cpu.guided_log_softmax(
        _DTYPES[base_logits.dtype],
        torch.get_num_threads(),
        rows,
        logp,
        base_logits,
        arm_logits,
        vocab_size,
        *parameters,
    )
    if vocab_size < logp.shape[1]:
        logp[:, vocab_size:] = torch.where(logp[:, :1].isnan(), torch.nan, -torch.inf)  # a bad row is NaN throughout
    return logp

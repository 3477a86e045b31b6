"""The CPU core (csrc/) as a backend: hands tensors' addresses to `_cpu` and makes the outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_step, empty_whole

_import_error: ImportError | None = None
try:
    from .. import _cpu
except ImportError as error:
    _import_error = error

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # genarm_dtype


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
    outputs = empty_step(base_logits, len(arm_logits), logprobs)
    _cpu.guided_step(
        DTYPES[base_logits.dtype],
        torch.get_num_threads(),
        base_logits.shape[0],
        *outputs,
        base_logits,
        arm_logits,
        vocab_size,
        logprobs,
        *parameters,
    )
    return outputs


def guided_log_softmax(base_logits: Tensor, arm_logits: list[Tensor], vocab_size: int, *parameters: Any) -> Tensor:
    logp = empty_whole(base_logits)
    _cpu.guided_log_softmax(
        DTYPES[base_logits.dtype],
        torch.get_num_threads(),
        base_logits.shape[0],
        logp,
        base_logits,
        arm_logits,
        vocab_size,
        *parameters,
    )
    if vocab_size < logp.shape[1]:
        logp[:, vocab_size:] = torch.where(logp[:, :1].isnan(), torch.nan, -torch.inf)  # a bad row is NaN throughout
    return logp

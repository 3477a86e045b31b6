"""What the compiled backends share: their modules (csrc/bindings.h) take the same calls, each at a place of its own."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_step, empty_whole

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # genarm_dtype


def guided_step(
    module: ModuleType,
    place: Any,
    base_logits: Tensor,
    arm_logits: list[Tensor],
    vocab_size: int,
    logprobs: bool,
    *parameters: Any,
) -> tuple[Tensor, ...]:
    outputs = empty_step(base_logits, len(arm_logits), logprobs)
    module.guided_step(
        DTYPES[base_logits.dtype],
        place,
        base_logits.shape[0],
        *outputs,
        base_logits,
        arm_logits,
        vocab_size,
        logprobs,
        *parameters,
    )
    return outputs


def guided_log_softmax(
    module: ModuleType, place: Any, base_logits: Tensor, arm_logits: list[Tensor], vocab_size: int, *parameters: Any
) -> Tensor:
    logp = empty_whole(base_logits)
    module.guided_log_softmax(
        DTYPES[base_logits.dtype],
        place,
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

"""The Triton backend: two launches a step, `tile_pass` over all the logits and `row_pass` over what it found.

Runs on NVIDIA GPUs, and for tests on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from ...outputs import empty_step, empty_whole


def why_unavailable() -> str | None:
    """None when the kernels can run here, otherwise the reason in words."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    if not interpreted() and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _launch() -> ModuleType:
    return importlib.import_module(f"{__name__}.launch")


def guided_step(
    base_logits: Tensor,
    arm_logits: list[Tensor],
    vocab_size: int,
    logprobs: bool,
    weights: list[float],
    base_weight: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
    token_mask: Tensor | None,
    weights_rows: Tensor | None,
    base_weight_rows: Tensor | None,
    temperature_rows: Tensor | None,
    top_k_rows: Tensor | None,
    top_p_rows: Tensor | None,
    min_p_rows: Tensor | None,
    seed_rows: Tensor | None,
    position_rows: Tensor | None,
) -> tuple[Tensor, ...]:
    outputs = empty_step(base_logits, len(arm_logits), logprobs)
    if len(base_logits):
        in_tensors = (top_k_rows, top_p_rows, min_p_rows)
        filtered = any(x is not None for x in in_tensors) or 0 < top_k < vocab_size or top_p < 1 or min_p > 0
        _launch().guided_step(
            outputs,
            base_logits,
            arm_logits,
            vocab_size,
            logprobs,
            filtered,
            (base_weight, *(weights or (0.0,) * len(arm_logits))),
            (temperature, top_p, min_p, top_k, seed, position),
            token_mask,
            (base_weight_rows, temperature_rows, top_p_rows, min_p_rows, top_k_rows, seed_rows, position_rows),
            weights_rows,
        )
    return outputs


def guided_log_softmax(
    base_logits: Tensor,
    arm_logits: list[Tensor],
    vocab_size: int,
    weights: list[float],
    base_weight: float,
    temperature: float,
    token_mask: Tensor | None,
    weights_rows: Tensor | None,
    base_weight_rows: Tensor | None,
    temperature_rows: Tensor | None,
) -> Tensor:
    logp = empty_whole(base_logits)
    if len(logp):
        _launch().guided_log_softmax(
            logp,
            base_logits,
            arm_logits,
            vocab_size,
            (base_weight, *(weights or (0.0,) * len(arm_logits))),
            (temperature, 1.0, 0.0, 0, 0, 0),
            token_mask,
            (base_weight_rows, temperature_rows, None, None, None, None, None),
            weights_rows,
        )
    return logp

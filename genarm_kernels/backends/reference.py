"""The reference as a backend: spreads the operators' numbers over rows and calls `genarm_kernels.reference`."""

import torch
from torch import Tensor

from .. import reference, rng


def why_unavailable() -> None:
    """Plain PyTorch runs wherever PyTorch does."""


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
    in_tensors = (top_k_rows, top_p_rows, min_p_rows)
    filtered = any(rows is not None for rows in in_tensors) or top_k > 0 or top_p < 1 or min_p > 0
    if seed_rows is None:
        seed_rows = rng.row_seeds(seed, base_logits.shape[0], base_logits.device)
    return reference.guided_step(
        base_logits,
        arm_logits,
        _weights(base_logits, weights, weights_rows),
        _rows(base_logits, base_weight, base_weight_rows),
        _rows(base_logits, temperature, temperature_rows),
        _rows(base_logits, top_k, top_k_rows, torch.int64),
        _rows(base_logits, top_p, top_p_rows),
        _rows(base_logits, min_p, min_p_rows),
        seed_rows,
        _rows(base_logits, position, position_rows, torch.int64),
        token_mask,
        vocab_size,
        filtered,
        logprobs,
    )


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
    return reference.guided_log_softmax(
        base_logits,
        arm_logits,
        _weights(base_logits, weights, weights_rows),
        _rows(base_logits, base_weight, base_weight_rows),
        _rows(base_logits, temperature, temperature_rows),
        token_mask,
        vocab_size,
    )


def _rows(base: Tensor, number: float, rows: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((base.shape[0],), number, dtype=dtype, device=base.device) if rows is None else rows


def _weights(base: Tensor, numbers: list[float], rows: Tensor | None) -> Tensor:
    if rows is not None:
        return rows
    if not numbers:
        return torch.empty(base.shape[0], 0, device=base.device)
    # One fill an ARM: copying a list of numbers to a GPU would wait for it.
    return torch.stack([_rows(base, number, None) for number in numbers], 1)

"""What an operator returns, made once for every backend and for the compiler's shapes."""

import torch
from torch import Tensor


def empty_step(base: Tensor, n_arms: int, logprobs: bool) -> tuple[Tensor, ...]:
    """The fields of `GuidedStep` in their order, unfilled.

    What `logprobs=False` leaves out is an empty tensor each: the outputs of an operator must not alias.
    """
    rows, empty = base.shape[0], base.new_empty
    some = rows if logprobs else 0
    return (
        empty(rows, dtype=torch.int64),
        empty(some, dtype=torch.float32),
        empty(some, dtype=torch.float32),
        empty(rows, dtype=torch.int32),
        empty(some, dtype=torch.float32),
        empty((some, n_arms) if logprobs else 0, dtype=torch.float32),
        empty(rows, dtype=torch.int32),
    )


def empty_whole(base: Tensor) -> Tensor:
    """log p, unfilled: float32, as wide as the base, contiguous."""
    return torch.empty_like(base, dtype=torch.float32, memory_format=torch.contiguous_format)

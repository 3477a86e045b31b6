"""What the operations return, made once for every backend and for the compiler's shapes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .parameters import Inputs

DRAWN, BAD_ROW, NO_ALLOWED_TOKEN = 0, 1, 2  # a row's status


class GuidedStep(NamedTuple):
    """What one step drew; tensors on the operands' device."""

    token: Tensor
    """`[B]` int64: the drawn token, or -1."""
    logprob: Tensor | None
    """`[B]` float32, nats: log p(token) at `temperature`, before the filters; p is over the allowed tokens."""
    log_mass: Tensor | None
    """`[B]` float32, nats: log of the mass of p that survived the filters; `logprob - log_mass` is the draw's own."""
    kept: Tensor
    """`[B]` int32: how many tokens survived the filters."""
    base_logprob: Tensor | None
    """`[B]` float32, nats: the base's own log-softmax at the token, temperature 1, no mask: the lowest finite number,
    which is not allowed, stands here for itself."""
    arm_logprobs: Tensor | None
    """`[B, N]` float32, nats: each ARM's own log-softmax at the token: the token-level rewards."""
    status: Tensor
    """`[B]` int32: 0 drawn; 1 an operand held NaN or +inf (or a parameter or z is out of range); 2 no allowed token."""

    def raise_for_status(self) -> None:
        """One ValueError that names the rows which drew no token, and why. Waits for the device."""
        status = self.status.tolist()
        reasons = {
            BAD_ROW: "NaN or +inf in an operand in use, or a parameter or a sum of operands out of range",
            NO_ALLOWED_TOKEN: "no allowed token",
        }
        failed = [(text, [b for b, s in enumerate(status) if s == code]) for code, text in reasons.items()]
        if any(rows for _, rows in failed):
            raise ValueError(
                "guided_step drew no token: " + "; ".join(f"{text} in rows {rows}" for text, rows in failed if rows)
            )


def empty_step(inputs: Inputs, logprobs: bool) -> GuidedStep:
    """A step's fields, unfilled.

    What `logprobs=False` leaves out is an empty tensor each: the outputs of an operator must not alias, nor be None.
    """
    rows, empty = inputs.base_logits.shape[0], inputs.base_logits.new_empty
    some = rows if logprobs else 0
    return GuidedStep(
        token=empty(rows, dtype=torch.int64),
        logprob=empty(some, dtype=torch.float32),
        log_mass=empty(some, dtype=torch.float32),
        kept=empty(rows, dtype=torch.int32),
        base_logprob=empty(some, dtype=torch.float32),
        arm_logprobs=empty((some, len(inputs.arm_logits)) if logprobs else 0, dtype=torch.float32),
        status=empty(rows, dtype=torch.int32),
    )


def empty_whole(inputs: Inputs) -> Tensor:
    """log p, unfilled: float32, as wide as the base, contiguous."""
    return torch.empty_like(inputs.base_logits, dtype=torch.float32, memory_format=torch.contiguous_format)

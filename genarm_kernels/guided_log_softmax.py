"""`guided_log_softmax`: the whole guided distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, validation
from .calls import to_its_end


@to_its_end
def guided_log_softmax(
    base_logits: Tensor,
    arm_logits: Sequence[Tensor] | Tensor = (),
    weights: float | Sequence[float] | Tensor = 1.0,
    *,
    base_weight: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    token_mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p `[B, V]`, nats, float32, for every token of the base's width: -inf where not allowed.

    The arguments are those of `guided_step`; temperature must be above 0. A row with no allowed token is -inf
    throughout, a row that `guided_step` would give status 1 is NaN. The likeliest token's is exactly 0 where the others
    have no mass. Differentiable with respect to every operand on the
    reference backend, which "auto" takes when a gradient is asked for; parameters get no gradient.

    Raises:
        ValueError, TypeError: As `guided_step`.
        RuntimeError: Likewise, and when a named backend other than the reference is asked for a gradient.

    >>> guided_log_softmax(torch.zeros(1, 2), [torch.tensor([[3.0, 1.0]]).log()]).exp()
    tensor([[0.7500, 0.2500]])
    """
    base, arms, vocab = validation.operands(base_logits, arm_logits, vocab_size)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (base, *arms)):
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"backend {backend!r} has no gradient; use backend='reference', or torch.no_grad()")
        backend = "reference"
    weight_numbers, weights_rows = validation.weights(weights, base, len(arms))
    base_weight, base_weight_rows = validation.float_rows("base_weight", base_weight, base)
    temperature, temperature_rows = validation.float_rows("temperature", temperature, base, validation.ABOVE_ZERO)
    return ops.guided_log_softmax(
        validation.backend(backend),
        base,
        arms,
        vocab,
        weight_numbers,
        base_weight,
        temperature,
        validation.token_mask(token_mask, base, vocab),
        weights_rows,
        base_weight_rows,
        temperature_rows,
    )

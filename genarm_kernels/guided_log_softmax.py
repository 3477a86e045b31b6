"""`guided_log_softmax`: the whole guided distribution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, validation
from .calls import counting_denormals, to_its_end
from .dispatch import LIBRARY
from .outputs import empty_whole
from .parameters import Inputs, flatten, names, schema, take


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
    have no mass. Differentiable with respect to every operand on the reference backend, which "auto" takes when a
    gradient is asked for; parameters get no gradient.

    Raises:
        ValueError, TypeError: As `guided_step`.
        RuntimeError: Likewise, and when a named backend other than the reference is asked for a gradient.

    >>> guided_log_softmax(torch.zeros(1, 2), [torch.tensor([[3.0, 1.0]]).log()]).exp()
    tensor([[0.7500, 0.2500]])
    """
    inputs = validation.inputs(
        base_logits=base_logits,
        arm_logits=arm_logits,
        weights=weights,
        base_weight=base_weight,
        temperature=temperature,
        token_mask=token_mask,
        vocab_size=vocab_size,
        lowest_temperature=validation.ABOVE_ZERO,
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.base_logits, *inputs.arm_logits)):
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"backend {backend!r} has no gradient; use backend='reference', or torch.no_grad()")
        backend = "reference"
    logp: Tensor = torch.ops.genarm_kernels.guided_log_softmax.default(validation.backend(backend), *flatten(inputs))
    return logp


LIBRARY.define(f"guided_log_softmax(str backend, {schema(Inputs)}) -> Tensor")


@torch.library.impl(LIBRARY, "guided_log_softmax", "CompositeExplicitAutograd")
def _operator(backend: str, *flat: Any) -> Tensor:
    inputs = take(Inputs, iter(flat))
    base = inputs.base_logits
    implementation = backends.load(backend, base.device.type, base.shape[0])
    return counting_denormals(implementation.guided_log_softmax, inputs)


@torch.library.register_fake("genarm_kernels::guided_log_softmax", lib=LIBRARY)
def _fake(backend: str, *flat: Any) -> Tensor:
    return empty_whole(take(Inputs, iter(flat)))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *flat = inputs
    given = take(Inputs, iter(flat))
    parameters = (given.base_weight, given.weights, given.temperature)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in parameters]
    ctx.operands = [(x.shape[1], x.dtype) for x in (given.base_logits, *given.arm_logits)]
    ctx.save_for_backward(output, *(x for x in parameters if isinstance(x, Tensor)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """d log p / dz is (1 - p) / temperature on the allowed tokens, and dz / dx_i the operand's weight."""
    logp, *rows = ctx.saved_tensors
    base_weight, weights, temperature = (rows.pop(0)[..., None] if x is None else x for x in ctx.numbers)

    grad = grad.where(logp != -torch.inf, 0.0)
    grad_z = grad - logp.exp() * grad.sum(1, keepdim=True)
    grad_z = grad_z / temperature
    coefficients = [base_weight, *(weights.unbind(1) if isinstance(weights, Tensor) else weights)]
    grads = [
        torch.nn.functional.pad(coefficient * grad_z, (0, width - grad_z.shape[1])).to(dtype)
        for coefficient, (width, dtype) in zip(coefficients, ctx.operands, strict=True)
    ]
    beside_rows: list[float] | None = None if ctx.numbers[1] else []  # torch wants an empty list back
    of_arguments = {"base_logits": grads[0], "arm_logits": grads[1:], "weights": beside_rows}
    return None, *(of_arguments.get(name) for name in names(Inputs))


torch.library.register_autograd(
    "genarm_kernels::guided_log_softmax", _backward, setup_context=_save_for_backward, lib=LIBRARY
)

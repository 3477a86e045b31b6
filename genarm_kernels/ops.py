"""The registered operators: one schema, one fake and one implementation each, under `torch.ops.genarm_kernels`.

A parameter travels as a number; a tensor `*_rows`, where given, overrides it row by row. A call with Python numbers
launches nothing to carry them to the device. Fields that `logprobs=False` leaves out are empty tensors here.
"""

from typing import Any

import torch
from torch import Tensor

from . import backends
from .calls import counting_denormals
from .outputs import empty_step, empty_whole

_LIBRARY = torch.library.Library("genarm_kernels", "DEF")

_LIBRARY.define(
    "guided_step(str backend, Tensor base_logits, Tensor[] arm_logits, int vocab_size, bool logprobs,"
    " float[] weights, float base_weight, float temperature, int top_k, float top_p, float min_p,"
    " SymInt seed, SymInt position, Tensor? token_mask, Tensor? weights_rows,"
    " Tensor? base_weight_rows, Tensor? temperature_rows, Tensor? top_k_rows, Tensor? top_p_rows,"
    " Tensor? min_p_rows, Tensor? seed_rows, Tensor? position_rows)"
    " -> (Tensor token, Tensor logprob, Tensor log_mass, Tensor kept,"
    " Tensor base_logprob, Tensor arm_logprobs, Tensor status)"
)
_LIBRARY.define(
    "guided_log_softmax(str backend, Tensor base_logits, Tensor[] arm_logits, int vocab_size,"
    " float[] weights, float base_weight, float temperature, Tensor? token_mask, Tensor? weights_rows,"
    " Tensor? base_weight_rows, Tensor? temperature_rows) -> Tensor"
)

_LIBRARY.define(
    "shared_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor owners, int operands)"
    " -> Tensor"
)

guided_log_softmax = torch.ops.genarm_kernels.guided_log_softmax.default


def guided_step(backend: str, base_logits: Tensor, arm_logits: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """`torch.ops.genarm_kernels.guided_step`, whose dispatch costs 7 us, a third of a call on a CPU; or straight its
    implementation where nothing is there to see the operator: no compiler, tracer, transform or dispatch mode, and no
    tensors but plain ones.
    """
    tensors = (base_logits, *arm_logits, *args[-9:])  # 9: those of the schema's end
    plain = (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not base_logits.is_meta
        and not [x for x in tensors if x is not None and (type(x) is not Tensor or x.is_neg())]
    )
    operator = _guided_step if plain else torch.ops.genarm_kernels.guided_step.default
    return operator(backend, base_logits, arm_logits, *args)


@torch.library.impl(_LIBRARY, "guided_step", "CompositeExplicitAutograd")
def _guided_step(backend: str, base_logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    module = backends.load(backend, base_logits.device.type, len(base_logits))
    return counting_denormals(module.guided_step, base_logits, *args)


@torch.library.register_fake("genarm_kernels::guided_step", lib=_LIBRARY)
def _guided_step_fake(
    backend: str, base_logits: Tensor, arm_logits: list[Tensor], vocab_size: int, logprobs: bool, *args: Any
) -> tuple[Tensor, ...]:
    return empty_step(base_logits, len(arm_logits), logprobs)


@torch.library.impl(_LIBRARY, "guided_log_softmax", "CompositeExplicitAutograd")
def _guided_log_softmax(backend: str, base_logits: Tensor, *args: Any) -> Tensor:
    module = backends.load(backend, base_logits.device.type, len(base_logits))
    return counting_denormals(module.guided_log_softmax, base_logits, *args)


@torch.library.register_fake("genarm_kernels::guided_log_softmax", lib=_LIBRARY)
def _guided_log_softmax_fake(backend: str, base_logits: Tensor, *args: Any) -> Tensor:
    return empty_whole(base_logits)


def shared_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, owners: Tensor, operands: int
) -> Tensor:
    """y[m] = W x[m] + bias + the sum of up[r] (down[r] . x[m]) over the ranks r that m's operand, m % operands, owns.

    Args:
        x: `[R, 1, in]`, bfloat16 or float16 like all that follows, R up to 64; contiguous, as all are.
        weight, bias: `[out, in]`, `[out]`.
        down, up: of all adapters, `[r, in]` and `[r, out]`, r up to 64.
        owners: `[r]` int32, an ARM's number, 1 and up; the base, 0, owns none.
        operands: 1 + N.

    Raises:
        ValueError: of another dtype, or not contiguous.
    """
    y: Tensor = torch.ops.genarm_kernels.shared_linear.default(x, weight, bias, down, up, owners, operands)
    return y


@torch.library.impl(_LIBRARY, "shared_linear", "CompositeExplicitAutograd")
def _shared_linear(x: Tensor, *args: Any) -> Tensor:
    from .backends.triton.shared_linear import shared_linear  # where Triton is

    weight, bias, down, up, *_ = args
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "down": down, "up": up}.items():
        if tensor is not None and (tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {x.dtype}, like x, got {tensor.dtype}, {tensor.stride()}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected bfloat16 or float16, got {x.dtype}")
    return shared_linear(x, *args)


@torch.library.register_fake("genarm_kernels::shared_linear", lib=_LIBRARY)
def _shared_linear_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, base, arms, _, weights, base_weight, temperature, _, weights_rows, base_weight_rows, temperature_rows = inputs
    rows = [base_weight_rows, weights_rows, temperature_rows]
    ctx.numbers = (base_weight, weights, temperature)
    ctx.present = [tensor is not None for tensor in rows]
    ctx.operands = [(x.shape[1], x.dtype) for x in (base, *arms)]
    ctx.save_for_backward(output, *(tensor for tensor in rows if tensor is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """d log p / dz is (1 - p) / temperature on the allowed tokens, and dz / dx_i the operand's weight."""
    logp, *saved = ctx.saved_tensors
    base_weight_rows, weights_rows, temperature_rows = [saved.pop(0) if there else None for there in ctx.present]
    base_weight, weights, temperature = ctx.numbers

    grad = grad.where(logp != -torch.inf, 0.0)
    grad_z = grad - logp.exp() * grad.sum(1, keepdim=True)
    grad_z = grad_z / (temperature if temperature_rows is None else temperature_rows[:, None])
    coefficients = [base_weight if base_weight_rows is None else base_weight_rows[:, None]]
    coefficients += weights if weights_rows is None else weights_rows[:, :, None].unbind(1)
    grads = [
        torch.nn.functional.pad(coefficient * grad_z, (0, width - grad_z.shape[1])).to(dtype)
        for coefficient, (width, dtype) in zip(coefficients, ctx.operands, strict=True)
    ]
    return None, grads[0], grads[1:], None, None if weights else [], *[None] * 6  # torch wants the empty list back


torch.library.register_autograd(
    "genarm_kernels::guided_log_softmax", _backward, setup_context=_save_for_backward, lib=_LIBRARY
)

"""`guided_step`: one token a row from a weighted sum of models' logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, rng, validation
from .calls import counting_denormals, to_its_end
from .dispatch import LIBRARY, is_unseen
from .outputs import GuidedStep, empty_step
from .parameters import Inputs, Sampling, flatten, schema, take


def row_seed(seed: int, row: int) -> int:
    """The seed, an int64, that `guided_step(..., seed=seed)` gives a row of its batch.

    It is seed + row * 0x9E3779B97F4A7C15 modulo 2^64. A row drawn alone with it is drawn as in the batch.

    Raises:
        ValueError, TypeError: `seed` is not an int from -2^63 to 2^64 - 1, or `row` not one from 0 on.

    >>> row_seed(7, 0), row_seed(7, 1)
    (7, -7046029254386353124)
    >>> import torch
    >>> base = torch.zeros(2, 1000)
    >>> torch.equal(guided_step(base, seed=7).token[1:], guided_step(base[1:], seed=row_seed(7, 1)).token)
    True
    """
    number, row = validation.counter("seed", seed), validation.counter("row", row)
    if row < 0:
        raise ValueError(f"row: expected an integer from 0 on, got {row}")
    return (number + row * rng.SEED_STEP + 2**63) % 2**64 - 2**63


@to_its_end
def guided_step(
    base_logits: Tensor,
    arm_logits: Sequence[Tensor] | Tensor = (),
    weights: float | Sequence[float] | Tensor = 1.0,
    *,
    base_weight: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    token_mask: Tensor | None = None,
    vocab_size: int | None = None,
    logprobs: bool = True,
    backend: str = "auto",
) -> GuidedStep:
    """Draws one token a row from softmax((base_weight * base + sum_i weights_i * arm_i) / temperature).

    The decoding distribution of GenARM (Xu et al. 2024, arXiv 2410.08193); the same sum serves proxy tuning,
    contrastive decoding and classifier-free guidance with other coefficients. No host synchronisation.

    A token is not allowed where an operand of weight other than 0 is -inf or its dtype's lowest finite number, which
    many models write in its place, whatever the weight's sign. Any other number counts as it is: -1e9 of a base and an
    ARM of weight -1 cancel, and the token may be drawn. There a token mask is the way, as in the last example.

    Args:
        base_logits: `[B, V]` float32, bfloat16 or float16; last dimension contiguous, any row stride.
        arm_logits: N tensors `[B, V_i]`, or one `[N, B, V]`, of the base's dtype and device. N = 0: plain sampling.
        weights: the ARMs' coefficients: a float (for every ARM), N floats, or a tensor `[N]` or `[B, N]`. Any sign,
            never normalised. An ARM of weight 0 has no influence, and still reports its log-probability: NaN or +inf
            in its logits can make that NaN, never the draw.
        base_weight: the base's coefficient, a float or a tensor `[B]`.
        temperature: float or `[B]`, >= 0. 0 is greedy: the largest, the lowest index among equals.
        top_k: int or `[B]`: keep tokens with fewer than top_k above them. <= 0 is off.
        top_p: float or `[B]`, in [0, 1]: then keep tokens with less than this share of the mass above them. 1 is off.
        min_p: float or `[B]`, in [0, 1]: then keep tokens of at least this share of the largest p. 0 is off.
        seed: int, or int64 tensor `[B]`. An int s gives row b the seed `row_seed(s, b)`: calls with different seeds
            have no row's seed in common, and row 0 has s.
        position: int, or int64 tensor `[B]`: index of the token being drawn. The draw is a pure function of (the row,
            seed, position): the caller advances it.
        token_mask: int32 `[B, W]` bitmask, bit v % 32 of word v // 32 set = allowed (as grammar engines emit it). The
            examples make one of bools.
        vocab_size: tokens from here on are never drawn; needed when the operands differ in width.
        logprobs: False leaves the four float fields None and spares their cost.
        backend: "auto" or a name of `available_backends()`; a named backend runs or raises.

    Returns:
        `GuidedStep`, without gradient. Rows that cannot be drawn have token -1, NaN in the float fields and a status;
        see `raise_for_status`.

    Raises:
        ValueError: a shape, dtype, device, stride or number is wrong. TypeError: a Python value has the wrong type.
            Either names the argument, what was expected and what came. RuntimeError: the named backend cannot run here.

    >>> import torch
    >>> base, arm = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    >>> guided_step(base, [arm], weights=0.5, temperature=0).token
    tensor([2])
    >>> guided_step(base, [arm], weights=2.0, temperature=0).token
    tensor([0])
    >>> allowed = torch.tensor([[False, True, False]])  # [B, V]
    >>> bits = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32))
    >>> token_mask = (bits << torch.arange(32, dtype=torch.int32)).sum(2, dtype=torch.int32)
    >>> guided_step(base, [arm], token_mask=token_mask).token
    tensor([1])
    >>> masked = torch.tensor([[-1e9, 0.0, -1e9]])
    >>> guided_step(masked, [masked], weights=-1.0, token_mask=token_mask).kept
    tensor([1], dtype=torch.int32)
    """
    inputs = validation.inputs(
        base_logits=base_logits,
        arm_logits=arm_logits,
        weights=weights,
        base_weight=base_weight,
        temperature=temperature,
        token_mask=token_mask,
        vocab_size=vocab_size,
    )
    sampling = validation.sampling(
        inputs.base_logits,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        position=position,
        logprobs=logprobs,
    )
    backend = validation.backend(backend)
    if any(x.requires_grad for x in (inputs.base_logits, *inputs.arm_logits)):
        arms = [arm.detach() for arm in inputs.arm_logits]
        inputs = inputs._replace(base_logits=inputs.base_logits.detach(), arm_logits=arms)
    if is_unseen(inputs, sampling):
        outputs = _run(backend, inputs, sampling)
    else:
        outputs = GuidedStep(*torch.ops.genarm_kernels.guided_step.default(backend, *flatten(inputs, sampling)))
    if logprobs:
        return outputs
    return GuidedStep(outputs.token, None, None, outputs.kept, None, None, outputs.status)


def _run(backend: str, inputs: Inputs, sampling: Sampling) -> GuidedStep:
    base = inputs.base_logits
    implementation = backends.load(backend, base.device.type, base.shape[0])
    return counting_denormals(implementation.guided_step, inputs, sampling)


LIBRARY.define(
    f"guided_step(str backend, {schema(Inputs, Sampling)})"
    f" -> ({', '.join(f'Tensor {field}' for field in GuidedStep._fields)})"
)


@torch.library.impl(LIBRARY, "guided_step", "CompositeExplicitAutograd")
def _operator(backend: str, *flat: Any) -> GuidedStep:
    """Fields that `logprobs=False` leaves out are empty tensors here."""
    values = iter(flat)
    return _run(backend, take(Inputs, values), take(Sampling, values))


@torch.library.register_fake("genarm_kernels::guided_step", lib=LIBRARY)
def _fake(backend: str, *flat: Any) -> GuidedStep:
    values = iter(flat)
    inputs, sampling = take(Inputs, values), take(Sampling, values)
    return empty_step(inputs, sampling.logprobs)

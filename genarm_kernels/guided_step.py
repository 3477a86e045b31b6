"""`guided_step`: one token a row from a weighted sum of models' logits."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import ops, reference, validation


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
    """`[B]` float32, nats: the base's own log-softmax at the token, temperature 1, no mask."""
    arm_logprobs: Tensor | None
    """`[B, N]` float32, nats: each ARM's own log-softmax at the token: the token-level rewards."""
    status: Tensor
    """`[B]` int32: 0 drawn; 1 an operand held NaN or +inf (or a parameter was out of range); 2 no allowed token."""

    def raise_for_status(self) -> None:
        """One ValueError that names the rows which drew no token, and why. Waits for the device."""
        status = self.status.tolist()
        reasons = {
            reference.BAD_ROW: "NaN or +inf in an operand in use, or a parameter out of range",
            reference.NO_ALLOWED_TOKEN: "no allowed token",
        }
        failed = [(text, [b for b, s in enumerate(status) if s == code]) for code, text in reasons.items()]
        if any(rows for _, rows in failed):
            raise ValueError(
                "guided_step drew no token: " + "; ".join(f"{text} in rows {rows}" for text, rows in failed if rows)
            )


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
        seed: int, or int64 tensor `[B]`. An int s gives row b the seed s + b.
        position: int, or int64 tensor `[B]`: index of the token being drawn. The draw is a pure function of (the row,
            seed, position): the caller advances it.
        token_mask: int32 `[B, W]` bitmask, bit v % 32 of word v // 32 set = allowed (as grammar engines emit it). The
            last example makes one of bools.
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
    """
    base, arms, vocab = validation.operands(base_logits, arm_logits, vocab_size)
    weight_numbers, weights_rows = validation.weights(weights, base, len(arms))
    base_weight, base_weight_rows = validation.float_rows("base_weight", base_weight, base)
    temperature, temperature_rows = validation.float_rows("temperature", temperature, base, 0.0)
    top_k, top_k_rows = validation.int_rows("top_k", top_k, base)
    top_p, top_p_rows = validation.float_rows("top_p", top_p, base, 0.0, 1.0)
    min_p, min_p_rows = validation.float_rows("min_p", min_p, base, 0.0, 1.0)
    seed, seed_rows = validation.counter_rows("seed", seed, base, per_row=True)
    position, position_rows = validation.counter_rows("position", position, base)
    outputs = ops.guided_step(
        validation.backend(backend),
        base.detach() if base.requires_grad else base,
        [arm.detach() if arm.requires_grad else arm for arm in arms],
        vocab,
        validation.flag("logprobs", logprobs),
        weight_numbers,
        base_weight,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        validation.token_mask(token_mask, base, vocab),
        weights_rows,
        base_weight_rows,
        temperature_rows,
        top_k_rows,
        top_p_rows,
        min_p_rows,
        seed_rows,
        position_rows,
    )
    if logprobs:
        return GuidedStep(*outputs)
    token, _, _, kept, _, _, status = outputs
    return GuidedStep(token, None, None, kept, None, None, status)

"""The law: guided sampling in plain PyTorch. Every other backend must give what this file gives.

What the contract leaves open is decided here, in words:

- z is a float32 number: `acc = fma(weight, x, acc)` for every operand in use, in the order base, ARM 1, ARM 2, ...,
  from acc = 0, weights rounded to float32. "Equal in z" means equal as such numbers: ties are the same everywhere.
- A z above float32's range at an allowed token makes the row bad (status 1), as an infinite operand would; where z is
  below it the token is not allowed.
- An operand's own log-softmax takes the lowest finite number of its dtype for what it is.
- Denormal numbers count, whatever mode the calling thread is in; torch's own threads, to which it hands shares of a
  large tensor, keep theirs.
- Everything behind z is computed in float64 and returned as float32.
- A row that uses no operand at all (every weight 0) is uniform over the tokens that its mask allows.
- A bad parameter of a row in a tensor wins over "no allowed token": status 1.
- Every float parameter is rounded to float32 (a temperature below 2^-150 is thus greedy); top_p and min_p are then
  compared in float64.

Rows are `B`, ARMs `N`, the vocabulary (already cut to vocab_size) `V`, its tiles `T`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import rng
from .outputs import BAD_ROW, DRAWN, NO_ALLOWED_TOKEN, GuidedStep, empty_step
from .parameters import Floats, Inputs, Ints, Sampling

_INF = float("inf")


def guided_step(inputs: Inputs, sampling: Sampling) -> GuidedStep:
    base_logits, vocab_size = inputs.base_logits, inputs.vocab_size
    temperature, top_p, min_p = (_rows(base_logits, x) for x in (inputs.temperature, sampling.top_p, sampling.min_p))
    top_k, position = (_rows(base_logits, x, torch.int64) for x in (sampling.top_k, sampling.position))
    seed = sampling.seed
    if not isinstance(seed, Tensor):
        seed = rng.row_seeds(seed, base_logits.shape[0], base_logits.device)

    operands = [base_logits, *inputs.arm_logits]
    z, allowed, bad = combine(operands, _coefficients(inputs), inputs.token_mask, vocab_size)
    valid = (temperature >= 0) & (temperature < _INF) & (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    status = _status(allowed, bad | ~valid)
    drawn = status == DRAWN

    # Rows that are not drawn go through the same arithmetic as a harmless row of zeros and are overwritten at the end.
    z = torch.where(drawn[:, None], z, 0.0)
    greedy = drawn & (temperature == 0)
    temperature = torch.where(drawn & ~greedy, temperature, 1.0).double()
    scaled = (z.double() - z.max(1, keepdim=True).values.double()) / temperature[:, None]
    p = scaled.exp()
    log_total = _row_sum(p).log()

    # Filters that are off in every row spare the sort.
    keep = _filter(z, p, top_k, top_p, min_p) if sampling.filters(vocab_size) else z > -_INF
    token = torch.where(greedy, z.argmax(1), _draw(scaled.where(keep, -_INF), seed, position))
    kept = torch.where(greedy, 1, keep.sum(1))

    token = torch.where(drawn, token, -1)
    kept = torch.where(drawn, kept, 0).int()
    if not sampling.logprobs:
        return empty_step(inputs, False)._replace(token=token, kept=kept, status=status)
    logprob = _at(scaled, token) - log_total
    log_mass = (_row_sum(p.where(keep, 0.0)).log() - log_total).maximum(logprob)
    own = torch.stack([_at(x[:, :vocab_size].double().log_softmax(1), token) for x in operands], 1)

    def of_drawn(field: Tensor) -> Tensor:
        return torch.where(drawn if field.dim() == 1 else drawn[:, None], field, torch.nan).float()

    return GuidedStep(
        token=token,
        logprob=of_drawn(logprob),
        log_mass=of_drawn(torch.where(kept == 1, logprob, log_mass)),
        kept=kept,
        base_logprob=of_drawn(own[:, 0]),
        arm_logprobs=of_drawn(own[:, 1:]),
        status=status,
    )


def guided_log_softmax(inputs: Inputs) -> Tensor:
    """log p `[B, V]` of the guided distribution, float32, as wide as the base."""
    base_logits, vocab_size = inputs.base_logits, inputs.vocab_size
    operands, temperature = [base_logits, *inputs.arm_logits], _rows(base_logits, inputs.temperature)
    z, allowed, bad = combine(operands, _coefficients(inputs), inputs.token_mask, vocab_size)
    status = _status(allowed, bad | ~((temperature > 0) & (temperature < _INF)))
    z = torch.where((status == DRAWN)[:, None], z, 0.0)
    temperature = torch.where(status == DRAWN, temperature, 1.0)
    logp = ((z.double() - z.max(1, keepdim=True).values.double()) / temperature.double()[:, None]).log_softmax(1)
    logp = pad(logp, (0, base_logits.shape[1] - vocab_size), value=-_INF)
    logp = torch.where((status == NO_ALLOWED_TOKEN)[:, None], -_INF, logp)
    return torch.where((status == BAD_ROW)[:, None], torch.nan, logp).float()


def combine(
    operands: Sequence[Tensor], coefficients: Tensor, token_mask: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z `[B, V]` float32 (-inf where not allowed), allowed `[B, V]`, and bad `[B]`: rows with status 1.

    `coefficients` is `[B, 1 + N]` float32. An operand whose coefficient is 0 is not looked at.
    """
    shape, device = (operands[0].shape[0], vocab_size), operands[0].device
    blocked = torch.zeros(shape, dtype=torch.bool, device=device)
    bad = torch.zeros_like(blocked)
    in_mask = torch.ones_like(blocked) if token_mask is None else _unpack(token_mask, vocab_size)
    z = torch.zeros(shape, dtype=torch.float32, device=device)
    for operand, weight in zip(operands, coefficients.split(1, dim=1), strict=True):
        x, in_use = operand[:, :vocab_size], weight != 0
        blocked |= in_use & (x <= torch.finfo(x.dtype).min)
        bad |= in_use & (x.isnan() | (x == _INF))
        z = torch.where(in_use, _fma(weight, x, z), z)
    allowed = in_mask & ~blocked & (z != -_INF)
    bad_row = (in_mask & bad).any(1) | (allowed & ~z.isfinite()).any(1) | ~coefficients.isfinite().all(1)
    return z.where(allowed, -_INF), allowed, bad_row


def _fma(weight: Tensor, x: Tensor, acc: Tensor) -> Tensor:
    """weight * x + acc, rounded once to float32, as the instruction does.

    The product of two 24-bit numbers is exact in float64, the sum is not: rounding it to odd (Boldo and Melquiond 2008)
    keeps the second rounding, to float32, from seeing a tie that is none. `error` is the sum's own (Knuth's TwoSum).
    """
    product, acc = weight.double() * x.double(), acc.double()
    total = product + acc
    part = total - product
    error = (product - (total - part)) + (acc - part)
    odd = (total.view(torch.int64) & 1).bool()
    toward = torch.where(error > 0, _INF, -_INF).double()
    inexact = (error != 0) & error.isfinite()
    return torch.where(inexact & ~odd, total.nextafter(toward), total).float()


def _rows(base: Tensor, value: Floats | Ints, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter as `[B]`."""
    if isinstance(value, Tensor):
        return value
    return torch.full((base.shape[0],), value, dtype=dtype, device=base.device)


def _coefficients(inputs: Inputs) -> Tensor:
    """The operands' weights `[B, 1 + N]`, the base's first."""
    base, weights = inputs.base_logits, inputs.weights
    # One fill an ARM: copying a list of numbers to a GPU would wait for it.
    of_arms = weights.unbind(1) if isinstance(weights, Tensor) else [_rows(base, number) for number in weights]
    return torch.stack([_rows(base, inputs.base_weight), *of_arms], 1)


def _status(allowed: Tensor, bad: Tensor) -> Tensor:
    nothing = torch.where(allowed.any(1), DRAWN, NO_ALLOWED_TOKEN)
    return torch.where(bad, BAD_ROW, nothing).int()


def _unpack(token_mask: Tensor, vocab_size: int) -> Tensor:
    """The bitmask `[B, W]` int32 as bools `[B, V]`."""
    v = torch.arange(vocab_size, device=token_mask.device)
    return (token_mask[:, v // 32] >> (v % 32) & 1).bool()


def _filter(z: Tensor, p: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The kept set `[B, V]`: top-k, then top-p on its mass, then min-p; p is relative to the largest, which has p = 1.

    Sorted by falling z, `start` is where the group of equals of each token begins: the number of tokens above it.
    """
    z, order = z.sort(dim=1, descending=True, stable=True)
    p = p.gather(1, order)
    index = torch.arange(z.shape[1], device=z.device).expand_as(z)
    new_group = pad(z[:, 1:] != z[:, :-1], (1, 0), value=True)
    start = torch.where(new_group, index, 0).cummax(1).values
    mass_above = pad(p.cumsum(1)[:, :-1], (1, 0)).gather(1, start)

    in_top_k = (start < top_k[:, None]) | (top_k <= 0)[:, None]
    top_k_mass = _row_sum(p.where(in_top_k, 0.0))[:, None]
    top_p, min_p = top_p.double()[:, None], min_p.double()[:, None]
    in_top_p = (mass_above < top_p * top_k_mass) | (top_p >= 1)
    keep = ((in_top_k & in_top_p & (p >= min_p)) | (start == 0)) & (z > -_INF)
    return torch.zeros_like(keep).scatter(1, order, keep)


def _draw(scaled: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """One token a row from logits `[B, V]`, -inf where not kept: a tile by Gumbel-max, then a token by inverse CDF."""
    tiles = _tiles(scaled, -_INF)
    top = tiles.max(-1, keepdim=True).values
    mass = torch.where(top > -_INF, (tiles - top).exp(), 0.0)
    log_mass = mass.sum(-1).log() + top[..., 0]
    tile_index = torch.arange(tiles.shape[1], device=scaled.device)
    noise = rng.gumbel(seed[:, None], position[:, None], tile_index)
    tile = (log_mass + noise).argmax(1)

    cdf = mass[torch.arange(len(tile), device=tile.device), tile].cumsum(-1)
    threshold = rng.uniform(seed, position) * cdf[:, -1]
    return tile * rng.TILE + (cdf <= threshold[:, None]).sum(-1)


def _tiles(x: Tensor, fill: float) -> Tensor:
    """`[B, V]` as `[B, T, TILE]`."""
    return pad(x, (0, -x.shape[1] % rng.TILE), value=fill).unflatten(1, (-1, rng.TILE))


def _row_sum(x: Tensor) -> Tensor:
    """`[B]`; tile by tile, since PyTorch's order of summing a long row depends on how many rows there are."""
    return _tiles(x, 0.0).sum(-1).sum(-1)


def _at(x: Tensor, token: Tensor) -> Tensor:
    return x.gather(1, token.clamp_min(0)[:, None])[:, 0]

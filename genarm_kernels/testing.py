"""For whoever writes a backend or embeds the library: inputs that find mistakes, and the test of a distribution.

>>> case = random_case(seed=1)
>>> mine, law = (guided_step(**case, backend=name) for name in ("auto", "reference"))
>>> torch.equal(mine.token, law.token)
True
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .guided_step import guided_step as guided_step  # for the example above
from .validation import OPERAND_DTYPES

KINDS = ("normal", "peaked", "flat", "equal", "one_hot")
_GRID = 64  # exact cases hold multiples of 1 / _GRID


def make_logits(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Tensor:
    """Logits `shape` = `[..., V]` of one of `KINDS`; the same numbers on every device.

    normal: standard normal. peaked: normal of deviation 3, 20 tokens a row raised by 10, like a language model's. flat:
    normal of deviation 0.05. equal: one number throughout. one_hot: zeros, and one token a row at 30.

    >>> make_logits("one_hot", (2, 3), seed=5)
    tensor([[30.,  0.,  0.],
            [30.,  0.,  0.]])
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, device="cpu")
    order = torch.rand(shape, generator=generator, device="cpu").argsort(-1)  # a random permutation a row
    if kind == "normal":
        x = noise
    elif kind == "peaked":
        x = 3 * noise + 10 * (order < 20)
    elif kind == "flat":
        x = 0.05 * noise
    elif kind == "equal":
        x = torch.full_like(noise, 1.25)
    elif kind == "one_hot":
        x = 30.0 * (order == 0)
    else:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return x.to(torch.get_default_device() if device is None else device, dtype)


def pooled_chi_squared(counts: Tensor, probabilities: Tensor, min_expected: float = 8.0) -> float:
    """p-value of the hypothesis that `counts` `[V]` were drawn from `probabilities` `[V]` (normalised here).

    Bins are pooled, the rarest first, until at least `min_expected` draws are expected in each, as chi-squared needs.
    One draw of an impossible token gives 0. Compare with a small threshold divided by the number of tests.

    >>> fair = torch.full((6,), 1 / 6)
    >>> round(pooled_chi_squared(torch.tensor([16, 18, 16, 14, 12, 24]), fair), 2)
    0.4
    >>> pooled_chi_squared(torch.tensor([20, 20, 20, 20, 20, 0]), fair) < 0.01
    True
    """
    observed, p = counts.double().cpu(), probabilities.double().cpu()
    if observed.shape != p.shape or p.dim() != 1:
        raise ValueError(f"counts: expected [V] as probabilities {list(p.shape)}, got {list(observed.shape)}")
    if (observed[p == 0] > 0).any():
        return 0.0
    expected = p / p.sum() * observed.sum()
    bins: list[list[float]] = [[0.0, 0.0]]
    order = expected.argsort()
    for e, o in zip(expected[order].tolist(), observed[order].tolist(), strict=True):
        if bins[-1][0] >= min_expected:
            bins.append([0.0, 0.0])
        bins[-1][0] += e
        bins[-1][1] += o
    if len(bins) > 1 and bins[-1][0] < min_expected:
        rest = bins.pop()
        bins[-1] = [bins[-1][0] + rest[0], bins[-1][1] + rest[1]]
    if len(bins) == 1:
        return 1.0
    statistic = sum((o - e) ** 2 / e for e, o in bins)
    return torch.special.gammaincc(*torch.tensor([[len(bins) - 1], [statistic]], dtype=torch.float64) / 2).item()


def random_case(seed: int, exact: bool = False, device: str | torch.device | None = None) -> dict[str, Any]:
    """Keyword arguments of `guided_step` that mix everything its contract allows; a pure function of `seed`.

    Widths, dtypes, strides, masks, -inf and lowest numbers, NaN and +inf, parameters as numbers and as every kind of
    tensor, also out of range where they are in tensors. Two backends must give the same `token`, `kept` and `status`
    (but for fewer than one row in 10,000). `exact`: every sum of the operands is exact in float32 in any order, so that
    an oracle in float64 knows which tokens are equal; there are many.
    """
    draw = random.Random(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device
    rows, arms = draw.randint(1, 6), draw.choice((0, 1, 1, 2, 3, 9))
    vocab, dtype = draw.choice((1, 7, 111, 1000, 1024, 1025, 3000)), draw.choice(OPERAND_DTYPES)
    ragged, masked = draw.random() < 0.4, draw.random() < 0.4

    def operand(index: int) -> Tensor:
        width = vocab + (draw.choice((0, 1, 64)) if ragged else 0)
        margin = draw.choice((0, 0, 1, 5))  # a view that starts off the row's beginning: strided and misaligned
        x = make_logits(draw.choice(KINDS), (rows, margin + width), seed=seed * 100 + index, device="cpu")
        if exact:
            x = (x * _GRID).round() / _GRID
        if draw.random() < 0.2:
            nothing = draw.choice((-torch.inf, torch.finfo(dtype).min))
            x[torch.rand(x.shape, generator=generator, device="cpu") < 0.1] = nothing
        if draw.random() < 0.1:
            x[draw.randrange(rows), draw.randrange(margin + width)] = draw.choice((torch.nan, torch.inf))
        return x.to(device, dtype)[:, margin:]

    def parameter(values: Callable[[], float], dtypes: tuple[torch.dtype, ...], bad: tuple[float, ...] = ()) -> Any:
        form = draw.choice(("number", "number", "0-dim", "rows", "strided"))
        if form == "number":
            return values()
        drawn = [draw.choice(bad) if bad and draw.random() < 0.04 else values() for _ in range(rows)]
        tensor = torch.tensor(drawn, dtype=draw.choice(dtypes), device=device)
        return {"0-dim": tensor[0], "rows": tensor, "strided": tensor.repeat_interleave(3)[::3]}[form]

    def weight() -> float:
        return draw.choice((0.0, 0.0, 1.0, 0.125, 0.5, 2.0, -0.375) if exact else (0.0, 1.0, draw.uniform(-1, 2)))

    floats, ints = (torch.float32, torch.float64), (torch.int32, torch.int64)
    outside = (-0.5, torch.nan, torch.inf)
    case: dict[str, Any] = {
        "base_logits": operand(0),
        "arm_logits": [operand(1 + i) for i in range(arms)],
        "weights": [weight() for _ in range(arms)],
        "base_weight": parameter(lambda: draw.choice((1.0, weight())), floats, (torch.nan, -torch.inf)),
        "temperature": parameter(lambda: draw.choice((0.0, 1.0, draw.uniform(0.3, 2.0))), floats, outside),
        "top_k": parameter(lambda: draw.choice((0, -1, 1, 2, 5, 50, vocab, 10**6)), ints),
        "top_p": parameter(lambda: draw.choice((1.0, 0.0, draw.random())), floats, (*outside, 1.5)),
        "min_p": parameter(lambda: draw.choice((0.0, 0.0, 1.0, draw.random() ** 4)), floats, (*outside, 1.5)),
        "seed": parameter(lambda: draw.randrange(-(2**63), 2**63), (torch.int64,)),
        "position": parameter(lambda: draw.choice((draw.randrange(4096), draw.randrange(2**62))), (torch.int64,)),
    }
    if draw.random() < 0.5:
        table = torch.tensor([[weight() for _ in range(arms)] for _ in range(rows)], dtype=draw.choice(floats))
        case["weights"] = table.reshape(rows, arms).to(device)
    if ragged:
        case["vocab_size"] = draw.choice((vocab, max(1, vocab - 1)))
    if masked:
        shape = (rows, vocab // 32 + draw.choice((1, 4)))
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, device="cpu")
        words[torch.rand(rows, generator=generator, device="cpu") < 0.25] = 0  # nothing allowed
        if draw.random() < 0.5:  # a few tokens allowed, as grammars do
            words[torch.rand(shape, generator=generator, device="cpu") > 2 / shape[1]] = 0
        case["token_mask"] = words.to(device, torch.int32)
    return case

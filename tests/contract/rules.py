"""What the contract's tests share: its rules written a second time, in float64 NumPy and plain Python.

No code here comes from `genarm_kernels.reference`. It shares none with tests/decoding/oracle.py either, which decodes
whole texts one row at a time: this one gives, of a whole batch, every field of a step and where rounding leaves room.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from genarm_kernels import (
    GuidedStep,
    available_backends,
    guided_step,
)

INF, NAN = math.inf, math.nan
VOCABULARIES = (1, 7, 111, 1000, 32000, 128256, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST = {  # finite numbers
    torch.float32: -(2.0**128 - 2.0**104),
    torch.bfloat16: -(2.0**128 - 2.0**120),
    torch.float16: -65504.0,
}
DRAWN, BAD_ROW, NO_ALLOWED_TOKEN = 0, 1, 2
TILE = 1024
large = pytest.mark.large
Few = Callable[[Sequence[Any], int], Sequence[Any]]  # the fixture of conftest.py
on_gpu = pytest.mark.parametrize("name", [name for name in available_backends() if name in ("triton", "cuda")])


class Row(NamedTuple):
    """What the contract says of one row."""

    status: int
    logp: np.ndarray  # float64, before the filters
    least: np.ndarray  # tokens kept for certain
    most: np.ndarray  # and those within float32's rounding of a boundary of top-p or min-p
    token: int  # by rule 6, for `least`
    own: list[np.ndarray]  # each operand's own log-softmax


SEED_STEP = 0x9E3779B97F4A7C15  # what a number adds a row


def at(value: Any, b: int, per_row: int = 0) -> Any:
    """A parameter of row b as a Python number; `per_row` is what a number adds a row (SEED_STEP for seeds)."""
    if isinstance(value, Tensor):
        return value[b].item() if value.dim() else value.item() + per_row * b
    return value + per_row * b


def log_softmax(z: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        top = z.max()
        return z - top - np.log(np.exp(z - top).sum())


def oracle(
    base_logits: Tensor,
    arm_logits: Any = (),
    weights: Any = 1.0,
    *,
    base_weight: Any = 1.0,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    position: Any = 0,
    token_mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> list[Row]:
    vocab = vocab_size or base_logits.shape[1]
    n = len(arm_logits)
    if not isinstance(weights, Tensor):
        weights = torch.tensor([weights] * n if isinstance(weights, (int, float)) else list(weights))
    weights = weights.expand(len(base_logits), n).cpu()
    rows = []
    for b in range(len(base_logits)):
        operands = [x[b, :vocab].cpu().double().numpy() for x in (base_logits, *arm_logits)]
        numbers = [at(value, b) for value in (base_weight, *weights[b], temperature, top_p, min_p)]
        *w, t, p, m = (float(np.float32(number)) for number in numbers)
        allowed = np.ones(vocab, dtype=bool)
        if token_mask is not None:
            mask = [int(word) & 0xFFFFFFFF for word in token_mask[b].tolist()]
            allowed = np.array([mask[v // 32] >> v % 32 & 1 for v in range(vocab)], dtype=bool)
        in_use = [(x, c) for x, c in zip(operands, w, strict=True) if c != 0]
        bad = not (all(map(math.isfinite, w)) and 0 <= t < INF and 0 <= p <= 1 and 0 <= m <= 1)
        bad |= any((np.isnan(x[allowed]) | (x[allowed] == INF)).any() for x, _ in in_use)
        for x, _ in in_use:
            allowed &= x > LOWEST[base_logits.dtype]
        z = np.full(vocab, -INF)
        with np.errstate(all="ignore"):
            z[allowed] = sum((c * x[allowed] for x, c in in_use), np.zeros(allowed.sum()))
            bad |= (z >= 2.0**128 - 2.0**103).any()  # what float32 rounds to infinity
            z[z <= 2.0**103 - 2.0**128] = -INF
            allowed &= z > -INF
            logp = log_softmax(z / (t or 1.0))
        status = BAD_ROW if bad else DRAWN if allowed.any() else NO_ALLOWED_TOKEN
        least, most = (kept_set(z, t, at(top_k, b), p, m, s) for s in (-4e-6, 4e-6)) if status == DRAWN else (z, z)
        token = draw(np.where(least, logp, -INF), at(seed, b, SEED_STEP), at(position, b)) if status == DRAWN else -1
        rows.append(Row(status, logp, least, most, token, [log_softmax(x) for x in operands]))
    return rows


def kept_set(z: np.ndarray, t: float, top_k: int, top_p: float, min_p: float, slack: float) -> np.ndarray:
    """Rule 4, level of equal z by level. `slack` moves the boundaries of mass, for float32's sake."""
    if t == 0:
        return np.arange(len(z)) == z.argmax()
    levels, level, size = np.unique(-z, return_inverse=True, return_counts=True)
    p = np.exp((levels[0] - levels) / t)
    tokens_above = size.cumsum() - size
    mass_above = np.concatenate([[0.0], (size * p).cumsum()[:-1]])
    in_k = (tokens_above < top_k) | (top_k <= 0)
    in_p = (mass_above < top_p * (1 + slack) * (size * p)[in_k].sum()) | (top_p >= 1)
    keep = in_k & in_p & (p >= min_p * (1 - slack)) & (levels != INF)
    keep[0] = True
    return keep[level]


def philox(seed: int, position: int, tile: int, purpose: int) -> int:
    """The 64 random bits of rule 6, from Salmon et al. 2011."""
    word = 0xFFFFFFFF
    k0, k1 = seed & word, seed >> 32 & word
    c0, c1, c2, c3 = position & word, position >> 32 & word, tile, purpose
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & word, a >> 32 ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0 << 32 | c1


def gumbel(seed: int, position: int, tile: int) -> float:
    r = philox(seed, position, tile, 0)
    c, rest = (2 * r + 1) / 2**65, (2**65 - 2 * r - 1) / 2**65  # true division of ints rounds once
    return -math.log(-math.log1p(-c) if c < 0.5 else -math.log(rest))


def draw(logp: np.ndarray, seed: int, position: int) -> int:
    """Rule 6 from logits that are -inf where not kept."""
    scores = {}
    for tile in range(-(-len(logp) // TILE)):
        part = logp[tile * TILE : (tile + 1) * TILE]
        if part.max() > -INF:
            scores[tile] = part.max() + math.log(np.exp(part - part.max()).sum()) + gumbel(seed, position, tile)
    tile = max(scores, key=lambda t: scores[t])
    part = logp[tile * TILE : (tile + 1) * TILE]
    mass = np.exp(part - part.max())
    u = (philox(seed, position, 0, 1) >> 11 or 0.5) / 2**53
    return tile * TILE + int((mass.cumsum() <= u * mass.sum()).sum())


def check(result: GuidedStep, rows: list[Row], tight: bool = True) -> None:
    """Every field of every row against the oracle. `tight`: the oracle is to know the kept set exactly."""
    assert result.token.dtype == torch.int64 and result.kept.dtype == result.status.dtype == torch.int32
    assert len(result.token) == len(rows)
    fields = [field.tolist() for field in result]
    for b, (row, token, logprob, log_mass, kept, base_logprob, arm_logprobs, status) in enumerate(
        zip(rows, *fields, strict=True)
    ):
        assert status == row.status, b
        if status != DRAWN:
            assert token == -1 and kept == 0, b
            assert all(map(math.isnan, (logprob, log_mass, base_logprob, *arm_logprobs))), b
            continue
        sure = row.least.sum() == row.most.sum()
        assert sure or not tight, "the oracle is in doubt: choose other numbers"
        assert row.most[token] and row.least.sum() <= kept <= row.most.sum(), b
        assert token == row.token or not sure, b
        with np.errstate(divide="ignore"):
            least, most = (np.log(np.exp(row.logp[keep]).sum()) for keep in (row.least, row.most))
        assert max(logprob, log_mass, base_logprob, *arm_logprobs) <= 0 or math.isnan(
            base_logprob + sum(arm_logprobs)
        ), b
        assert logprob <= log_mass and (kept > 1 or logprob == log_mass), b
        assert logprob == pytest.approx(row.logp[token], abs=bound(row.logp)), b
        assert least - bound(row.logp) <= log_mass <= most + bound(row.logp), b
        for own, expected in zip((base_logprob, *arm_logprobs), row.own, strict=True):
            np.testing.assert_allclose(own, expected[token], rtol=0, atol=bound(expected), err_msg=f"row {b}")


def bound(logp: np.ndarray) -> float:
    """Rule 7: twice the error of PyTorch's float32 log_softmax, plus 1e-6, for logits that have this result."""
    finite = logp[np.isfinite(logp)]
    if not len(finite):
        return 1e-6
    logits = torch.tensor(finite - finite.max(), dtype=torch.float32, device="cpu")
    error = (logits.log_softmax(0).double() - logits.double().log_softmax(0)).abs().max().item()
    # What rounding z to float32 costs its largest numbers is PyTorch's error too.
    return 2 * (error + float(np.abs(finite).max()) * 2**-23) + 1e-6


def check_whole(whole: Tensor, rows: list[Row]) -> None:
    assert whole.dtype == torch.float32
    for row, logp in zip(rows, whole.cpu().double().numpy(), strict=True):
        vocab = len(row.logp)
        if row.status == DRAWN:
            np.testing.assert_allclose(logp[:vocab], row.logp, rtol=0, atol=bound(row.logp))
            assert logp.max() <= 0
        else:
            np.testing.assert_array_equal(logp[:vocab], NAN if row.status == BAD_ROW else -INF)
        assert row.status == BAD_ROW or (logp[vocab:] == -INF).all()


def assert_same(one: GuidedStep, other: GuidedStep, rows: Any = slice(None)) -> None:
    """The draw to the bit; the log-probabilities up to how the work is split."""
    for name, mine, theirs in zip(GuidedStep._fields, one, other, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs[rows], rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(mine, theirs[rows]), name


def draws(backend: str, row: Tensor, n: int, arms: tuple = (), vary: str = "position", **kwargs: Any) -> Tensor:
    """n tokens of one row `[V]`: at positions 0 to n - 1 of one seed, or with seeds 0 to n - 1 at one position."""
    tokens = []
    for numbers in torch.arange(n).split(max(1, 4_000_000 // max(len(row), TILE))):
        case = {
            "seed": torch.full_like(numbers, 12345),
            "position": torch.full_like(numbers, 6),
            vary: numbers,
            **kwargs,
        }
        base, *others = (x.expand(len(numbers), -1) for x in (row, *arms))
        tokens.append(guided_step(base, others, **case, logprobs=False, backend=backend).token)
    return torch.cat(tokens)


def law(row: Tensor, arms: tuple = (), **kwargs: Any) -> Tensor:
    """The probabilities that the contract gives `draws`."""
    (truth,) = oracle(row[None], [arm[None] for arm in arms], **kwargs)
    return torch.from_numpy(np.where(truth.least, np.exp(truth.logp), 0.0))


def bitmask(rows: list[list[int]], words: int) -> Tensor:
    """int32 `[B, words]` with exactly these bits set."""
    numbers = [[sum(1 << v % 32 for v in row if v // 32 == w) for w in range(words)] for row in rows]
    return torch.tensor([[n - (n >> 31 << 32) for n in row] for row in numbers], dtype=torch.int32)

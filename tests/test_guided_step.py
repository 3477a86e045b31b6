# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""The contract of the public operations, checked on every backend that this machine can run.

The oracle below is written from the contract's words in float64 NumPy and plain Python, and shares no code with
`genarm_kernels.reference`. Tests say which rule of the contract they hold.
"""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import genarm_kernels
from genarm_kernels import (
    GuidedStep,
    available_backends,
    guided_log_softmax,
    guided_step,
    row_seed,
    run_concurrently,
)
from genarm_kernels.backends import interpreted
from genarm_kernels.parameters import Inputs, Sampling, flatten, names, take
from genarm_kernels.testing import make_logits, pooled_chi_squared, random_case

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
on_gpu = pytest.mark.parametrize("name", [name for name in available_backends() if name in ("triton", "cuda")])


# --- The oracle -------------------------------------------------------------------------------------------------------


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


# --- Everything at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2, *(pytest.param(n, marks=large) for n in (3, 4, 5))])
def test_random_cases(backend: str, block: int) -> None:
    """Rules 1-7 and every kind of argument: token by token what the contract says."""
    statuses, doubtful, rows = set(), 0, 0
    for seed in range(block * 25, block * 25 + 25):
        case = random_case(seed, exact=True)
        truth = oracle(**case)
        result = guided_step(**case, backend=backend)
        check(result, truth, tight=False)
        statuses |= set(result.status.tolist())
        doubtful += sum(row.status == DRAWN and row.least.sum() != row.most.sum() for row in truth)
        rows += len(truth)
        whole = guided_log_softmax(
            *(case[name] for name in ("base_logits", "arm_logits", "weights")),
            **{name: case[name] for name in ("base_weight", "token_mask", "vocab_size") if name in case},
            backend=backend,
        )
        at_one = oracle(**{k: v for k, v in case.items() if k not in ("temperature", "top_k", "top_p", "min_p")})
        check_whole(whole, at_one)
    assert statuses == {DRAWN, BAD_ROW, NO_ALLOWED_TOKEN} and doubtful < rows / 50


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


@pytest.mark.parametrize("block", range(2))
def test_same_as_the_reference(backend: str, block: int) -> None:
    """Rule 5, on logits whose sums round: the same order of the same roundings, so the same ties and tokens.

    For the reference itself this says that a call repeats.
    """
    for seed in range(1000 + block * 40, 1040 + block * 40):
        case = random_case(seed)
        mine, law = (guided_step(**case, backend=name) for name in (backend, "reference"))
        for field in ("token", "kept", "status"):
            assert torch.equal(getattr(mine, field), getattr(law, field)), (seed, field)


@large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_widths_and_types(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Rule 8, V = 1 to 151,936; one row of each shape, each under another filter, with equal tokens everywhere."""
    kinds = ("flat", "peaked", "one_hot", "equal")
    x = torch.cat([make_logits(kind, (1, vocab), seed=i) for i, kind in enumerate(kinds * 2)])
    x = ((x * 64).round() / 64).to(dtype)  # sums are exact
    case = dict(
        base_logits=x[:4],
        arm_logits=[x[4:], x[[5, 4, 7, 6]]],
        weights=[0.5, -0.25],
        temperature=torch.tensor([0.7, 1.3, 1.0, 1.0]),
        top_k=torch.tensor([0, 50, 2, 10]),
        top_p=torch.tensor([0.8, 0.9, 1.0, 0.5]),
        min_p=torch.tensor([0.0, 0.001, 0.0, 0.5]),
        seed=3,
        position=2**40 + vocab,
    )
    check(guided_step(**case, backend=backend), oracle(**case))


@pytest.mark.parametrize("arms", [0, 1, 2, 3, 9])
def test_number_of_arms(backend: str, arms: int) -> None:
    base, stacked = make_logits("peaked", (3, 111)), make_logits("normal", (arms, 3, 111), seed=1)
    case = dict(base_logits=base, weights=[0.25 * i - 0.5 for i in range(arms)], temperature=2.0, seed=5)
    result = guided_step(arm_logits=stacked, **case, backend=backend)
    check(result, oracle(arm_logits=stacked, **case))
    assert result.arm_logprobs.shape == (3, arms)
    for same in (list(stacked), tuple(stacked)):
        assert_same(guided_step(arm_logits=same, **case, backend=backend), result)


def assert_same(one: GuidedStep, other: GuidedStep, rows: Any = slice(None)) -> None:
    """The draw to the bit; the log-probabilities up to how the work is split."""
    for name, mine, theirs in zip(GuidedStep._fields, one, other, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs[rows], rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(mine, theirs[rows]), name


# --- Layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    """Views with gaps between rows, off any alignment, of one row repeated, in reverse order of operands and rows."""
    x = make_logits("peaked", (4, 2 * 1000 + 1), dtype)
    sentinel = torch.full((4, 3000), NAN).to(dtype)
    sentinel[:, 77:1077] = x[:, 1:1001]
    views = {
        "gaps": x[::2, :1000],
        "misaligned": x[1:3, 1:1001],
        "expanded": x[:1, 3:1003].expand(2, -1),
        "transposed rows": x.as_strided((2, 1000), (1000, 1), 1),
        "between NaN": sentinel[1:3, 77:1077],
    }
    for name, view in views.items():
        for arm in views.values():
            got, expected = (
                guided_step(base, [other], 0.5, top_p=0.9, seed=11, backend=backend)
                for base, other in ((view, arm), (view.contiguous(), arm.contiguous()))
            )
            assert expected.status.tolist() == [0, 0], name
            assert_same(got, expected)


def test_offsets_past_32_bits(backend: str) -> None:
    """Rule 8. Three rows, 2^31 elements apart; only the pages that are touched take memory."""
    rows = make_logits("peaked", (3, 111), torch.bfloat16)
    try:
        memory = torch.empty(2**32 + 111, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2^32 elements: {error}")
    far = memory.as_strided((3, 111), (2**31, 1))
    far.copy_(rows)
    got, expected = (guided_step(x, [x], top_k=5, seed=1, backend=backend) for x in (far, rows))
    assert_same(got, expected)


def test_empty_batch(backend: str) -> None:
    """Rule 8."""
    base, mask = torch.empty(0, 7), torch.empty(0, 1, dtype=torch.int32)
    result = guided_step(base, [base, base], torch.empty(0, 2), top_p=torch.empty(0), token_mask=mask, backend=backend)
    shapes = {name: tuple(field.shape) for name, field in zip(GuidedStep._fields, result, strict=True)}
    assert shapes.pop("arm_logprobs") == (0, 2) and set(shapes.values()) == {(0,)}
    assert result.token.dtype == torch.int64
    assert guided_log_softmax(base, [base], backend=backend).shape == (0, 7)
    result.raise_for_status()


def test_widths_that_differ(backend: str) -> None:
    """Padding is never drawn, never counted, never read: it holds what would win or spoil the row."""
    base, arm = make_logits("normal", (3, 100)), make_logits("normal", (3, 104), seed=1)
    base[:, 97:], arm[:, 97:] = 100.0, NAN
    for kwargs in (dict(), dict(top_p=0.9), dict(temperature=0.0)):
        got = guided_step(base, [arm], 0.5, vocab_size=97, seed=1, **kwargs, backend=backend)
        cut = guided_step(base[:, :97], [arm[:, :97]], 0.5, seed=1, **kwargs, backend=backend)
        assert_same(got, cut)
    whole = guided_log_softmax(base, [arm], 0.5, vocab_size=97, backend=backend)
    assert whole.shape == base.shape and (whole[:, 97:] == -INF).all()
    torch.testing.assert_close(whole[:, :97].exp().sum(1), torch.ones(3))
    for whose, width in ((base, 97), (arm, 100)):  # an operand alone may have padding
        assert (guided_step(whose, vocab_size=width, seed=2, backend=backend).token < width).all()


# --- Parameters -------------------------------------------------------------------------------------------------------

ROW_VALUES = {
    "weights": [0.5, -1.0, 0.0, 2.0],
    "base_weight": [1.0, 0.0, -0.5, 2.0],
    "temperature": [0.5, 1.0, 0.0, 3.0],
    "top_k": [0, 1, 5, 100],
    "top_p": [0.0, 0.5, 0.9, 1.0],
    "min_p": [0.0, 0.01, 0.3, 1.0],
    "seed": [7, -1, 2**40, 2**63 - 1],
    "position": [0, 1, 2**33, -(2**63)],
}


def forms(name: str, values: list[Any]) -> list[Tensor]:
    """The tensors that may carry a parameter: each dtype that holds it, and a strided one."""
    if name in ("seed", "position"):
        tensors = [torch.tensor(values)]
    elif name == "top_k":
        tensors = [torch.tensor(values), torch.tensor(values, dtype=torch.int32)]
    else:
        tensors = [torch.tensor(values, dtype=dtype) for dtype in (*DTYPES, torch.float64)]
    return [*tensors, torch.stack([tensors[0]] * 3, 1)[:, 1], tensors[0].flip(0).contiguous().flip(0)]


@pytest.mark.parametrize("name", ROW_VALUES)
def test_parameters_per_row(backend: str, name: str) -> None:
    """A tensor of one value a row gives each row what that value gives it alone, as a number and as a 0-dim tensor."""
    values = ROW_VALUES[name]
    base, arm = make_logits("normal", (1, 300)).expand(4, -1), make_logits("normal", (1, 300), seed=1).expand(4, -1)
    fixed = dict(seed=torch.tensor([5] * 4), min_p=0.001)
    alone = []
    for b, value in enumerate(values):
        kwargs = {**fixed, "seed": 5, name: value}
        alone.append(guided_step(base[b : b + 1], [arm[b : b + 1]], **kwargs, backend=backend))
        tensor = torch.tensor(value, dtype=forms(name, values)[0].dtype)
        kwargs[name] = tensor
        assert_same(guided_step(base[b : b + 1], [arm[b : b + 1]], **kwargs, backend=backend), alone[b])
    assert len({tuple(map(str, (r.token, r.logprob, r.log_mass))) for r in alone}) > 2, "the rows must differ"
    for tensor in forms(name, values):
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.double().tolist() != values:
            continue  # this type rounds these values
        together = guided_step(
            base, [arm], **{**fixed, name: tensor[:, None] if name == "weights" else tensor}, backend=backend
        )
        for b in range(4):
            assert_same(alone[b], together, slice(b, b + 1))


@pytest.mark.parametrize("vocab", [1111, 1112])
def test_a_row_alone_and_in_a_batch(backend: str, vocab: int) -> None:
    """To the last bit, also where rows begin on no boundary: what a request draws is not its neighbours' affair."""
    base, arm = (make_logits("normal", (5, vocab), torch.bfloat16, seed) for seed in range(2))
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        together = guided_step(base, [arm], 0.7, **filters, seed=3, backend=backend)
        for b in range(5):
            for row in ((base[b : b + 1], arm[b : b + 1]), (base[b : b + 1].clone(), arm[b : b + 1].clone())):
                alone = guided_step(row[0], [row[1]], 0.7, **filters, seed=row_seed(3, b), backend=backend)
                for name, mine, theirs in zip(GuidedStep._fields, alone, together, strict=True):
                    assert torch.equal(mine, theirs[b : b + 1]), (name, b, mine, theirs)


def test_int32_seed_and_position(backend: str) -> None:
    base = make_logits("flat", (3, 300))
    wide, narrow = (
        guided_step(
            base, seed=torch.tensor([-1, 0, 9], dtype=d), position=torch.tensor([5, -7, 0], dtype=d), backend=backend
        )
        for d in (torch.int64, torch.int32)
    )
    assert_same(wide, narrow)


def test_forms_of_weights(backend: str) -> None:
    base, arms = make_logits("normal", (3, 300)), make_logits("normal", (3, 3, 300), seed=1)
    w = torch.tensor([0.5, 0.5, 0.5])
    ways = [
        0.5,
        [0.5] * 3,
        (0.5,) * 3,
        w,
        torch.tensor(0.5),
        w.double(),
        w.expand(3, 3),
        torch.full((3, 6), 0.5)[:, ::2],
    ]
    results = [guided_step(base, arms, way, seed=4, backend=backend) for way in ways]
    for result in results[1:]:
        assert_same(result, results[0])
    # With B = N a tensor [N] is still one weight an ARM.
    check(
        guided_step(base, arms, torch.tensor([0.25, 0.0, -1.0]), backend=backend),
        oracle(base, arms, [0.25, 0.0, -1.0]),
    )


def test_every_seed_and_position_is_read(backend: str) -> None:
    """Equal rows draw each by its own seed and position, the tile as well as the token in it."""
    base = make_logits("flat", (1, 5000)).expand(8, -1)
    for name, other in (("seed", "position"), ("position", "seed")):
        fixed = {other: torch.full((8,), 3)}
        tokens = guided_step(base, **{name: torch.arange(8)}, **fixed, backend=backend).token.tolist()
        alone = [guided_step(base[:1], **{name: i, other: 3}, backend=backend).token.item() for i in range(8)]
        assert tokens == alone and len(set(tokens)) > 4
        assert len(set(guided_step(base, **{name: torch.full((8,), 3)}, **fixed, backend=backend).token.tolist())) == 1


@pytest.mark.parametrize("s", [0, 41, -3, 2**32 - 2, 2**63 - 2, 2**64 - 2, -(2**63)])
def test_a_number_seeds_row_b_with_its_step(backend: str, s: int) -> None:
    base = make_logits("flat", (4, 5000))
    wrapped = [(s + b * SEED_STEP + 2**63) % 2**64 - 2**63 for b in range(4)]
    assert [row_seed(s, b) for b in range(4)] == wrapped
    expected = guided_step(base, seed=torch.tensor(wrapped), backend=backend)
    assert_same(guided_step(base, seed=s, backend=backend), expected)
    assert_same(guided_step(base, seed=torch.tensor(wrapped[0]), backend=backend), expected)


def test_batches_of_neighbouring_seeds_share_no_draw(backend: str) -> None:
    """Of 50,000 tokens two of 80 are the same by chance once in 16 times; rows of one seed would always be."""
    base = torch.zeros(8, 50_000)
    tokens = torch.cat([guided_step(base, seed=s, logprobs=False, backend=backend).token for s in range(10)])
    assert len(set(tokens.tolist())) >= 78


@pytest.mark.parametrize("seed, row, error", [(2**64, 0, ValueError), (0, -1, ValueError), (1.0, 0, TypeError)])
def test_row_seed_refuses(seed: Any, row: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{'row' if row else 'seed'}: expected an .+, got "):
        row_seed(seed, row)


@pytest.mark.parametrize("name", ["seed", "position"])
def test_counters_have_64_bits_and_wrap(backend: str, name: str) -> None:
    base = make_logits("flat", (1, 5000))

    def tokens(value: int) -> tuple[Any, ...]:
        steps = [guided_step(base, **{"seed": 1, "position": p, name: value}, backend=backend) for p in range(3)]
        return tuple(step.token.item() for step in steps)

    if name == "seed":
        assert tokens(-1) == tokens(2**64 - 1) and tokens(-(2**63)) == tokens(2**63)
    else:
        step = [guided_step(base, position=p, backend=backend).token for p in (-1, 2**64 - 1, 2**32 - 1)]
        assert step[0] == step[1] != step[2]
    values = (0, 2**32, 2**63, 1)
    draws = [guided_step(base, **{name: value}, backend=backend).token.item() for value in values]
    assert len(set(draws)) == 4, "the high bits are in use"


# --- Rule 1 and 2: what is allowed, and rows that cannot be drawn -----------------------------------------------------


def bitmask(rows: list[list[int]], words: int) -> Tensor:
    """int32 `[B, words]` with exactly these bits set."""
    numbers = [[sum(1 << v % 32 for v in row if v // 32 == w) for w in range(words)] for row in rows]
    return torch.tensor([[n - (n >> 31 << 32) for n in row] for row in numbers], dtype=torch.int32)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, *(pytest.param(n, marks=large) for n in (64, 100))])
def test_token_mask_allows_exactly_its_bits(backend: str, vocab: int) -> None:
    """One allowed token a row, all others better; bits past the vocabulary and words past the last one mean nothing."""
    logits = -torch.arange(float(vocab)).abs().expand(vocab, -1)
    words = -(-vocab // 32)
    for extra in (0, 3):
        beyond = list(range(vocab, 32 * (words + extra)))
        mask = bitmask([[v, *beyond] for v in range(vocab)], words + extra)
        result = guided_step(logits, top_p=0.9, token_mask=mask, backend=backend)
        assert result.token.tolist() == list(range(vocab)) and result.kept.tolist() == [1] * vocab
        torch.testing.assert_close(result.logprob, torch.zeros(vocab))
        assert guided_step(logits, temperature=0, token_mask=mask, backend=backend).token.tolist() == list(range(vocab))
        nothing = guided_step(logits, token_mask=bitmask([beyond] * vocab, words + extra), backend=backend)
        assert nothing.status.tolist() == [NO_ALLOWED_TOKEN] * vocab
        strided = torch.stack([mask, torch.zeros_like(mask)], 2)[:, :, 0]
        assert_same(guided_step(logits, top_p=0.9, token_mask=strided, backend=backend), result)


def test_the_softmax_runs_over_allowed_tokens(backend: str) -> None:
    """p is normalised over what the mask allows; the operands' own log-probabilities over the whole vocabulary."""
    logits = torch.tensor([[3.0, 1.0, 1.0, 5.0]])
    mask = bitmask([[1, 2]], 1)
    result = guided_step(logits, token_mask=mask, backend=backend)
    assert result.logprob.item() == pytest.approx(math.log(0.5)) and result.kept.item() == 2
    assert result.base_logprob.item() == pytest.approx(logits.log_softmax(1)[0, 1].item())
    whole = guided_log_softmax(logits, token_mask=mask, backend=backend)
    torch.testing.assert_close(whole, torch.tensor([[-INF, math.log(0.5), math.log(0.5), -INF]]))


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0, -0.0, -1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("who", ["base", "arm"])
def test_minus_infinity(backend: str, weight: float, temperature: float, who: str) -> None:
    """Rule 1: an operand in use forbids where it is -inf, whatever the weight's sign; one of weight 0 does not."""
    open_, closed = torch.zeros(1, 4), torch.tensor([[-INF, 0.0, -INF, -INF]])
    base, arm = (closed, open_) if who == "base" else (open_, closed)
    weights = dict(base_weight=weight) if who == "base" else dict(weights=weight)
    result = guided_step(base, [arm], **weights, temperature=temperature, seed=2, backend=backend)
    whole = guided_log_softmax(base, [arm], **weights, backend=backend)
    own = result.base_logprob if who == "base" else result.arm_logprobs[:, 0]
    assert result.status.item() == DRAWN
    if weight == 0:
        assert result.logprob.item() == pytest.approx(math.log(0.25))
        assert own.item() == (0.0 if result.token.item() == 1 else -INF)
    else:
        assert result.token.item() == 1 and result.logprob.item() == 0 and own.item() == 0
    torch.testing.assert_close(whole.exp(), torch.full((1, 4), 0.25) if weight == 0 else torch.eye(4)[1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 2048])
def test_the_lowest_number_is_minus_infinity(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Rule 1, whatever becomes of the sum: base and ARM overflow, or cancel; either alone; not in use."""
    masked = torch.arange(vocab) % 3 == 1

    def blocked(x: Tensor, number: float) -> Tensor:
        return torch.where(masked, number, x).to(dtype)

    base, arm = (make_logits("normal", (3, vocab), dtype, seed=i) for i in range(2))
    ways = [({}, {}), ({"temperature": 0.0}, {"temperature": 0.5}), ({"top_k": 3, "top_p": 0.9, "seed": 2}, {})]
    for weight in (1.0, -1.0, 0.5, -0.01):
        for who in ((0, 1), (0,), (1,)):
            low, none = (
                [blocked(x, number) if i in who else x for i, x in enumerate((base, arm))]
                for number in (LOWEST[dtype], -INF)
            )
            for step, whole in ways:
                got, expected = (guided_step(x[0], x[1:], weight, **step, backend=backend) for x in (low, none))
                assert expected.status.tolist() == [DRAWN] * 3 and not masked[expected.token].any()
                assert_same(got, expected)
                whole_got, whole_expected = (
                    guided_log_softmax(x[0], x[1:], weight, **whole, backend=backend) for x in (low, none)
                )
                assert (whole_got[:, masked] == -INF).all() and torch.equal(whole_got, whole_expected)
    unused = guided_step(base, [blocked(arm, LOWEST[dtype])], 0.0, seed=1, backend=backend)
    plain = guided_step(base, [arm], 0.0, seed=1, backend=backend)
    assert all(map(torch.equal, unused[:5], plain[:5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_above_the_lowest_is_one_like_others(backend: str, dtype: torch.dtype) -> None:
    lowest = torch.tensor(LOWEST[dtype]).to(dtype)
    assert lowest == torch.finfo(dtype).min
    above = torch.nextafter(lowest, torch.zeros_like(lowest))
    for vocab in (5, 1024):
        rows = torch.stack([lowest.expand(vocab), above.expand(vocab)])
        result = guided_step(rows, weights=(), backend=backend)
        assert result.status.tolist() == [NO_ALLOWED_TOKEN, DRAWN] and result.kept.tolist() == [0, vocab]
        own = guided_step(torch.zeros_like(rows), [rows], 0.0, backend=backend).arm_logprobs
        torch.testing.assert_close(own, torch.full((2, 1), -math.log(vocab)))


@pytest.mark.parametrize("vocab", [5, 2048])
def test_sums_beyond_float32(backend: str, vocab: int) -> None:
    """Rules 1 and 2: below its range a token is not allowed, above it the row is bad; also on the way to the sum."""
    base, arm = torch.zeros(4, vocab), torch.zeros(4, vocab)
    base[0, 1:] = -3e38  # below
    base[1, 1:], arm[1, 1:] = -3e38, 3e38  # below before the ARM is added
    base[2] = -3e38  # all of them
    base[3, 2] = 3e38  # above
    case = dict(arm_logits=[arm], base_weight=2.0, weights=1.0)
    result, whole = (call(base, **case, backend=backend) for call in (guided_step, guided_log_softmax))
    assert result.status.tolist() == [DRAWN, DRAWN, NO_ALLOWED_TOKEN, BAD_ROW]
    assert result.token.tolist() == [0, 0, -1, -1] and result.kept.tolist() == [1, 1, 0, 0]
    assert result.logprob[:2].tolist() == [0, 0] and (whole[:2, 0] == 0).all() and (whole[:3, 1:] == -INF).all()
    assert whole[3].isnan().all()
    arm[3, 2] = -INF  # and not allowed
    assert guided_step(base, **case, backend=backend).status.tolist()[3] == DRAWN


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
@pytest.mark.parametrize("filters", [dict(), dict(top_k=5, top_p=0.9), dict(temperature=0.0)], ids=str)
def test_bad_rows_leave_their_neighbours_alone(backend: str, poison: float, where: str, filters: dict) -> None:
    """Rule 2, in the base and in the ARM."""
    clean = [make_logits("normal", (5, 1500), seed=i) for i in range(2)]
    good = guided_step(clean[0], clean[1:], 0.5, **filters, seed=3, backend=backend)
    for operand in range(2):
        x = [c.clone() for c in clean]
        x[operand][[1, 3], {"first": 0, "last": 1499, "everywhere": slice(None)}[where]] = poison
        result = guided_step(x[0], x[1:], 0.5, **filters, seed=3, backend=backend)
        assert result.status.tolist() == [0, 1, 0, 1, 0]
        assert_same(GuidedStep(*(field[::2] for field in result)), good, slice(None, None, 2))
        assert result.token[1::2].tolist() == [-1, -1] and result.kept[1::2].tolist() == [0, 0]
        assert all(field[1::2].isnan().all() for field in result if field.is_floating_point())
        whole = guided_log_softmax(x[0], x[1:], 0.5, backend=backend)
        assert whole[1::2].isnan().all() and not whole[::2].isnan().any()


def test_which_poison_counts(backend: str) -> None:
    """Rule 2: not behind the mask, not past the vocabulary, not at weight 0; but also where another operand is -inf."""
    x, bad = torch.zeros(1, 40), torch.zeros(1, 40)
    bad[0, 35] = NAN
    all_but = bitmask([[v for v in range(40) if v != 35]], 2)

    def status(base: Tensor, arm: Tensor, **kwargs: Any) -> int:
        return guided_step(base, [arm], **kwargs, backend=backend).status.item()

    assert status(x, bad) == BAD_ROW
    assert status(x, bad, token_mask=all_but) == DRAWN
    assert status(x, bad, vocab_size=35) == DRAWN
    assert status(x, bad, vocab_size=36) == BAD_ROW
    assert status(x, bad, weights=0.0) == DRAWN
    assert status(bad, x, base_weight=0.0) == DRAWN
    blocked = x.clone()
    blocked[0, 35] = -INF
    assert status(blocked, bad) == BAD_ROW
    assert status(bad, blocked) == BAD_ROW
    assert status(torch.full_like(x, -INF), bad) == BAD_ROW, "NaN goes before 'no allowed token'"


def test_poison_that_plays_no_part_reaches_no_more_than_its_own_field(backend: str) -> None:
    x, bad = make_logits("normal", (2, 40)), make_logits("normal", (2, 40), seed=1)
    bad[:, 3] = NAN
    clean = guided_step(x, [x], weights=[1.0], seed=1, backend=backend)
    result = guided_step(x, [x, bad], weights=[1.0, 0.0], seed=1, backend=backend)
    assert_same(GuidedStep(*(f if f.dim() == 1 else f[:, :1] for f in result)), clean)


def test_no_allowed_token(backend: str) -> None:
    """Rule 2: by the mask, by -inf, and by both together where each alone leaves something."""
    ninf = torch.full((4,), -INF)
    base = torch.stack([torch.zeros(4), ninf, torch.tensor([0.0, 0.0, -INF, -INF]), torch.zeros(4)])
    arm = torch.stack([torch.zeros(4), torch.zeros(4), torch.tensor([-INF, -INF, 0.0, 0.0]), torch.zeros(4)])
    mask = bitmask([[], [0, 1, 2, 3], [0, 1, 2, 3], [2]], 1)
    result = guided_step(base, [arm], token_mask=mask, backend=backend)
    assert result.status.tolist() == [2, 2, 2, 0] and result.token.tolist() == [-1, -1, -1, 2]
    whole = guided_log_softmax(base, [arm], token_mask=mask, backend=backend)
    assert (whole[:3] == -INF).all() and whole[3].tolist() == [-INF, -INF, 0.0, -INF]


def test_no_operand_in_use_is_uniform(backend: str) -> None:
    """The empty sum is 0 for every token, and operands that are not in use may hold anything."""
    junk = torch.tensor([[NAN, INF, -INF, 5.0]])
    result = guided_step(junk, [junk], weights=0.0, base_weight=0.0, backend=backend)
    assert result.status.item() == DRAWN and result.logprob.item() == pytest.approx(math.log(0.25))


BAD_NUMBERS = [
    *(("temperature", x) for x in (-1.0, NAN, INF, -INF)),
    *(("weights", x) for x in (NAN, INF, -INF)),
    *(("base_weight", x) for x in (NAN, INF, -INF)),
    *((name, x) for name in ("top_p", "min_p") for x in (-0.25, 1.25, NAN, INF)),
]


@pytest.mark.parametrize("name, value", BAD_NUMBERS)
def test_numbers_out_of_range(backend: str, name: str, value: float) -> None:
    """Rule 3: ValueError as a number, status 1 in a tensor, and the other rows as if it were not there."""
    x = make_logits("normal", (3, 111))
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        guided_step(x, [x], **{name: value}, backend=backend)
    tensor = torch.tensor([0.5, value, 0.5])
    result = guided_step(x, [x], **{name: tensor[:, None] if name == "weights" else tensor}, backend=backend)
    assert result.status.tolist() == [0, 1, 0] and result.token[1].item() == -1
    assert_same(
        GuidedStep(*(f[::2] for f in result)),
        guided_step(x, [x], **{name: 0.5}, backend=backend),
        slice(None, None, 2),
    )
    zero_dim = guided_step(x, [x], **{name: torch.tensor(value)}, backend=backend)
    assert zero_dim.status.tolist() == [1, 1, 1]


# --- Rule 3: greedy ---------------------------------------------------------------------------------------------------


def test_greedy(backend: str) -> None:
    """The lowest index among the largest, across tiles and inside one; certain, whatever the filters and the seed."""
    x = make_logits("flat", (4, 4000)).round()  # zeros
    for row, tokens in enumerate(([5, 6], [1023, 1024], [3999], [700, 2500, 3999])):
        x[row, tokens] = 2.0
    for filters in (dict(), dict(top_k=1000, top_p=0.5, min_p=0.1)):
        result = guided_step(x, temperature=0.0, **filters, seed=9, backend=backend)
        assert result.token.tolist() == [5, 1023, 3999, 700]
        assert result.kept.tolist() == [1] * 4
        assert torch.equal(result.log_mass, result.logprob)
        torch.testing.assert_close(result.logprob, x.log_softmax(1).amax(1))
    all_equal = guided_step(torch.full((2, 4000), -3.0), temperature=0, backend=backend)
    assert all_equal.token.tolist() == [0, 0]
    signed_zeros = guided_step(torch.tensor([[-0.0, 0.0]]), temperature=0, backend=backend)
    assert signed_zeros.token.item() == 0


def test_greedy_beside_sampling(backend: str) -> None:
    x = make_logits("normal", (1, 500)).expand(3, -1)
    mixed = guided_step(x, temperature=torch.tensor([0.0, 1.0, 0.0]), top_k=5, seed=2, backend=backend)
    assert mixed.token[0] == mixed.token[2] == x[0].argmax()
    assert mixed.kept.tolist() == [1, 5, 1]
    assert_same(GuidedStep(*(f[1:2] for f in mixed)), guided_step(x, top_k=5, seed=2, backend=backend), slice(1, 2))


ULP = 2.0**-23


@pytest.mark.parametrize(
    "base, arms, weights, token",
    [
        ([1e8, 0.0], [[-1e8, 0.0], [1.0, 0.5]], [1.0, 1.0], 0),  # from the right, the 1 would drown in 1e8
        ([1.0, 1.0], [[0.0, 2.0**-30]], [1.0], 0),  # equal in float32
        ([0.0, -1 - 2 * ULP], [[0.0, 1 + ULP]], [1 + ULP], 1),  # 2^-46: products are not rounded
        # Just under half way to the next float32; first rounded to float64 it would be half way, and go up.
        ([1 + ULP, 1 + ULP], [[0.0, (1 - ULP) / 4096]], [(1 + ULP) / 4096], 0),
    ],
    ids=["order", "float32", "exact product", "rounded once"],
)
def test_rounding_of_z(backend: str, base: list, arms: list, weights: list, token: int) -> None:
    """z is a float32 number, one fused multiply-add an operand, the base first: ties and greedy tokens depend on it."""
    result = guided_step(torch.tensor([base]), torch.tensor(arms)[:, None], weights, temperature=0, backend=backend)
    assert result.token.item() == token


# --- Rule 4: the filters ----------------------------------------------------------------------------------------------

# p = .4 .3 .2 .1, and what is kept.
SMALL = [
    (dict(), 4),
    (dict(top_k=0), 4),
    (dict(top_k=-5), 4),
    (dict(top_k=1), 1),
    (dict(top_k=3), 3),
    (dict(top_k=4), 4),
    (dict(top_k=5), 4),
    (dict(top_k=10**30), 4),
    (dict(top_p=1.0), 4),
    (dict(top_p=0.0), 1),
    (dict(top_p=0.39), 1),
    (dict(top_p=0.41), 2),
    (dict(top_p=0.69), 2),
    (dict(top_p=0.89), 3),
    (dict(top_p=0.91), 4),
    (dict(min_p=0.0), 4),
    (dict(min_p=0.24), 4),
    (dict(min_p=0.26), 3),
    (dict(min_p=0.49), 3),
    (dict(min_p=0.51), 2),
    (dict(min_p=1.0), 1),
    (dict(top_k=2, top_p=0.5), 1),  # of the .7 that top-k keeps, half is .35
    (dict(top_k=2, top_p=0.6), 2),
    (dict(top_p=0.5, min_p=0.6), 2),  # after min-p first, .4 would be over half of what is left
    (dict(top_k=3, top_p=0.8, min_p=0.7), 2),
    (dict(top_p=0.6, min_p=0.76), 1),
    (dict(temperature=0.5, top_p=0.5), 1),  # p = .53 .3 .13 .03: the filters see the temperature
    (dict(temperature=2.0, min_p=0.51), 3),
]


@pytest.mark.parametrize("filters, kept", SMALL, ids=lambda value: str(value))
def test_filters_small(backend: str, filters: dict, kept: int) -> None:
    p = torch.tensor([[0.2, 0.4, 0.1, 0.3]])
    order = [1, 3, 0, 2]  # by falling p
    n = 64
    position = torch.arange(n)
    result = guided_step(p.log().expand(n, -1), **filters, seed=torch.full((n,), 1), position=position, backend=backend)
    assert result.kept.tolist() == [kept] * n
    assert set(result.token.tolist()) == set(order[:kept])
    warm = p[0] ** (1 / filters.get("temperature", 1.0))
    mass = warm[order[:kept]].sum() / warm.sum()
    torch.testing.assert_close(result.log_mass, mass.log().expand(n), atol=2e-6, rtol=0)
    torch.testing.assert_close(result.logprob, (warm / warm.sum()).log()[result.token], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "filters, kept",
    [
        (dict(top_k=1), 3),  # three share the top
        (dict(top_k=3), 3),
        (dict(top_k=4), 5),  # the pair at the boundary stands together
        (dict(top_p=0.0), 3),
        (dict(top_p=0.1), 3),
        (dict(top_p=0.78), 5),  # .769 of the mass is above the pair
        (dict(top_p=0.76), 3),
        (dict(min_p=1.0), 3),
        (dict(min_p=0.3), 5),  # e^-1 = .37
        (dict(min_p=0.4), 3),
        (dict(top_k=4, top_p=0.8), 3),  # 3 / 3.736 = .803 above the pair
        (dict(top_k=4, top_p=0.81), 5),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("spread", [1, 700])
def test_equal_tokens_stand_or_fall_together(backend: str, filters: dict, kept: int, spread: int) -> None:
    """Under each filter, inside a tile and across tiles, and in whatever order they come."""
    levels = torch.tensor([0.0, 1.0, -1.5, 1.0, 0.0, 1.0, -1.5])
    for order in (torch.arange(7), torch.arange(6, -1, -1), torch.tensor([3, 0, 6, 1, 5, 2, 4])):
        x = torch.full((1, 7 * spread), -INF)
        x[0, ::spread] = levels[order]
        result = guided_step(x, **filters, backend=backend)
        assert result.kept.item() == kept
        assert x[0, result.token.item()] >= (1.0 if kept == 3 else 0.0)


@pytest.mark.parametrize("stride", [1, 16, 300])
def test_top_k_above_the_number_of_allowed_tokens(backend: str, stride: int) -> None:
    """Tokens whose places are alike, too: a kernel that bounds the threshold by what it knows of places finds few."""
    allowed = [stride * i for i in range(4)]
    for vocab in (1000, 3000):
        mask = bitmask([allowed], (vocab + 31) // 32)
        for top_k in range(1, 12):
            result = guided_step(make_logits("normal", (1, vocab)), top_k=top_k, token_mask=mask, backend=backend)
            assert result.kept.item() == min(top_k, 4)


@pytest.mark.parametrize(
    "filters", [dict(top_k=1), dict(top_k=500), dict(top_p=0.0), dict(top_p=0.5), dict(min_p=1.0)], ids=str
)
def test_filters_keep_all_of_equal_rows(backend: str, filters: dict) -> None:
    result = guided_step(make_logits("equal", (2, 2500)), **filters, backend=backend)
    assert result.kept.tolist() == [2500, 2500] and result.log_mass.tolist() == [0.0, 0.0]


def test_filters_off_change_nothing(backend: str) -> None:
    x = make_logits("peaked", (3, 1500))
    plain = guided_step(x, seed=1, backend=backend)
    one = torch.ones(3)
    for off in (
        dict(top_k=1500),
        dict(top_k=2000, top_p=1, min_p=0),
        dict(top_k=-one.long(), top_p=one, min_p=0 * one),
    ):
        assert_same(guided_step(x, **off, seed=1, backend=backend), plain)
    assert plain.log_mass.tolist() == [0.0] * 3 and plain.kept.tolist() == [1500] * 3


# --- Rule 5: a pure function ------------------------------------------------------------------------------------------


@large
@pytest.mark.parametrize("filters", [dict(), dict(top_k=300, top_p=0.95, min_p=1e-4)], ids=str)
def test_a_row_does_not_see_the_batch(backend: str, filters: dict) -> None:
    """Alone, among others, permuted, and on any number of threads."""
    x, y = (make_logits("flat", (6, 40_000), seed=i) for i in range(2))
    seed, position = torch.arange(6) * 17, torch.arange(6) + 2**35

    def step(rows: list[int]) -> GuidedStep:
        kwargs = dict(seed=seed[rows], position=position[rows], **filters)
        return guided_step(x[rows], [y[rows]], 0.75, **kwargs, backend=backend)

    together = step(list(range(6)))
    for rows in ([0], [5], [5, 3, 1, 0, 2, 4], [2, 2, 2]):
        assert_same(step(rows), together, rows)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_same(step(list(range(6))), together)
            assert_same(step([4]), together, [4])
    finally:
        torch.set_num_threads(threads)


def test_global_random_state(backend: str) -> None:
    """Torch's generator neither matters nor moves."""
    x = make_logits("flat", (4, 3000))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = guided_step(x, seed=1, top_p=0.9, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(guided_step(x, seed=1, top_p=0.9, backend=backend), one)


@pytest.fixture
def flushing() -> Iterator[None]:
    """Torch's switch, on this thread."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine's floating-point numbers have no such mode")
    yield
    torch.set_flush_denormal(False)


def test_flushed_denormal_numbers(backend: str, flushing: None) -> None:
    """Rule 6: a call does not depend on the thread's mode, in which it leaves the thread."""
    tiny = [1e-40, 3e-40, 2e-40]
    torch.set_flush_denormal(False)
    x, large = (torch.tensor([row]).repeat(20, 1) for row in (tiny, [0.0, 1e38, 3e38]))
    calls: list[dict[str, Any]] = [
        dict(temperature=0),
        dict(temperature=1e-40),
        dict(temperature=torch.tensor(1e-40, dtype=torch.float64)),
        dict(min_p=torch.tensor([1e-40] * 20)),
        dict(arm_logits=[large], weights=torch.tensor([5e-39], dtype=torch.float64)),
        dict(arm_logits=[large], weights=-5e-39),
    ]
    wholes = [{k: v for k, v in call.items() if k != "min_p"} for call in calls[1:]]
    steps = [guided_step(x, **call, backend=backend) for call in calls]
    distributions = [guided_log_softmax(x, **call, backend=backend) for call in wholes]
    torch.set_flush_denormal(True)
    for call, expected in zip(calls, steps, strict=True):
        assert all(map(torch.equal, guided_step(x, **call, backend=backend), expected)), call
    for call, expected in zip(wholes, distributions, strict=True):
        assert torch.equal(guided_log_softmax(x, **call, backend=backend), expected), call
    if x.is_cpu:
        assert (x * 1 == 0).all(), "the mode is another one now"


def test_arguments_are_left_as_they_were(backend: str) -> None:
    case = random_case(33, exact=True)
    tensors = [
        x for value in case.values() for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)
    ]
    before = [x.clone() for x in tensors]
    guided_step(**case, backend=backend)
    for x, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


# --- Rule 6: the law of the draw --------------------------------------------------------------------------------------

CASES = 20  # statistical tests share one threshold
THRESHOLD = 0.01 / CASES


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


def histogram(tokens: Tensor, vocab: int) -> Tensor:
    return torch.bincount(tokens.cpu(), minlength=vocab)


def assert_follows(tokens: Tensor, probabilities: Tensor, by_place: bool = False) -> None:
    """Every token; or 20 stretches of the vocabulary, as pooling by probability would hide a drift along it."""
    counts = histogram(tokens, len(probabilities))
    if by_place:
        counts, probabilities = (
            torch.stack([part.sum() for part in x.double().tensor_split(20)]) for x in (counts, probabilities)
        )
    assert pooled_chi_squared(counts, probabilities) > THRESHOLD


@large
@pytest.mark.parametrize(
    "kind, vocab, n, kwargs",
    [
        ("peaked", 50, 12_000, dict(temperature=0.7)),
        ("peaked", 50, 12_000, dict(temperature=1.3, top_p=0.9)),
        ("normal", 50, 12_000, dict(temperature=0.7, min_p=0.05)),
        ("flat", 50, 12_000, dict(top_k=30)),
        ("peaked", 5000, 4000, dict(temperature=1.3)),
        ("peaked", 5000, 2000, dict(temperature=0.7, top_p=0.95, top_k=100)),
        ("flat", 5000, 4000, dict(temperature=0.7)),
        ("normal", 5000, 2000, dict(temperature=1.3, top_p=0.8)),
        ("peaked", 128256, 150, dict(temperature=1.5, top_k=40, top_p=0.95)),
        ("flat", 128256, 150, dict(top_p=0.7)),
    ],
)
def test_frequencies(backend: str, kind: str, vocab: int, n: int, kwargs: dict) -> None:
    """Chi-squared of every token, peaked and flat, in one tile and in many, with and without filters."""
    row, arm = make_logits(kind, (vocab,)), make_logits("normal", (vocab,), seed=1)
    kwargs = dict(kwargs, weights=0.5)
    tokens, probabilities = draws(backend, row, n, (arm,), **kwargs), law(row, (arm,), **kwargs)
    assert_follows(tokens, probabilities)
    assert_follows(tokens, probabilities, by_place=True)


@large
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_independence(backend: str, vary: str) -> None:
    """Tokens at neighbouring positions, and of neighbouring seeds: the joint table is the product of its margins.

    Eight tokens, two in each of three tiles and two beyond, so that both random numbers take part.
    """
    places = [tile * TILE + j for tile in range(4) for j in range(2)]
    row = torch.full((3 * TILE + 2,), -INF)
    row[places] = torch.tensor([0.0, 0.5, 0.0, -0.5, 0.3, 0.0, 0.0, 0.2])
    tokens, p = draws(backend, row, 6000, vary=vary).cpu(), law(row)[places]
    first, second = (tokens // TILE * 2 + tokens % TILE).unflatten(0, (-1, 2)).unbind(1)
    assert_follows(first * 8 + second, torch.outer(p, p).flatten())
    assert_follows(second, p)


@large
def test_tail_frequencies(backend: str) -> None:
    """Tokens far down come as often as they should, within the tile of the top token and in other tiles."""
    one_tile = torch.full((1000,), -12.0)
    one_tile[500] = 0.0
    tiles = torch.full((8 * TILE,), -13.0)
    tiles[3 * TILE + 7] = 0.0
    for row, n in ((one_tile, 12_000), (tiles, 3000)):
        tokens, p = draws(backend, row, n), law(row)
        assert_follows(tokens, p)
        assert_follows(tokens, p, by_place=True)
        assert (row[tokens] < 0).sum() > 30


# Found by going through the Philox stream of seed 0. The Gumbel variate of tile 1 at these positions is above 19.4, out
# of reach of 24-bit uniforms (16.6) ...
HIGH_GUMBEL = [192151940, 252408961, 471032754, 575033179, 764612740, 1243261238, 1245730210, 1462036958, 1906645431]
# ... and the row's uniform is less than 2^-26 from 0 or 1.
LOW_UNIFORM = [105788632, 107046943, 171955075, 262448727, 319246069, 392148463, 466323281]
HIGH_UNIFORM = [27838773, 41429014, 91006859, 161098721, 178649876, 230166336, 245290870, 338818344, 513907338]


@pytest.mark.parametrize("where", ["other tile", "before", "after"])
def test_tail_tokens_are_reached(backend: str, where: str) -> None:
    """Rule 6: the rarest numbers of the stream lead to tokens at 1e-8 (a tile) and 1e-11 (a token), to the very one."""
    if where == "other tile":
        positions, row = HIGH_GUMBEL, torch.tensor([0.0] + [-INF] * (TILE - 1) + [-18.4])
    elif where == "before":
        positions, row = LOW_UNIFORM, torch.tensor([-24.0] * (TILE - 1) + [0.0])
    else:
        positions, row = HIGH_UNIFORM, torch.tensor([0.0] + [-24.0] * (TILE - 1))
    rows = row.expand(len(positions), -1)
    result = guided_step(
        rows, seed=torch.zeros(len(positions)).long(), position=torch.tensor(positions), backend=backend
    )
    expected = [draw(row.cpu().double().log_softmax(0).numpy(), 0, position) for position in positions]
    assert result.token.tolist() == expected
    assert (result.logprob < -18).sum() > len(positions) / 2


# --- Rule 7 and the log-probabilities ---------------------------------------------------------------------------------


@large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, shift", [("peaked", 0.0), ("normal", 0.0), ("flat", 0.0), ("normal", 500.0)])
def test_precision(backend: str, dtype: torch.dtype, kind: str, shift: float) -> None:
    """At most twice the error of PyTorch's float32 log_softmax against float64, plus 1e-6, in every float field."""
    base, *arms = ((make_logits(kind, (4, 32_000), seed=i) + shift).to(dtype) for i in range(3))
    weights, temperature = (0.3, -0.7), 0.9
    w = [1.0, *(float(np.float32(x)) for x in weights)]
    z, z32 = (sum(c * x.to(t) for c, x in zip(w, (base, *arms), strict=True)) for t in (torch.float64, torch.float32))
    t = float(np.float32(temperature))
    arguments = [(z / t, z32 / t), *((x.double(), x.float()) for x in (base, *arms))]
    truths = [exact.log_softmax(1) for exact, _ in arguments]
    bounds = [
        2 * (rounded.log_softmax(1) - truth).abs().amax(1) + 1e-6
        for truth, (_, rounded) in zip(truths, arguments, strict=True)
    ]
    case = dict(weights=weights, temperature=temperature)
    result = guided_step(base, arms, **case, top_k=7, backend=backend)
    fields = [result.logprob, result.base_logprob, *result.arm_logprobs.unbind(1)]
    for field, truth, limit in zip(fields, truths, bounds, strict=True):
        assert ((field - truth.gather(1, result.token[:, None])[:, 0]).abs() <= limit).all()
    whole = guided_log_softmax(base, arms, **case, backend=backend)
    assert ((whole - truths[0]).abs().amax(1) <= bounds[0]).all()
    assert (result.kept >= 7).all()
    for b, kept in enumerate(result.kept.tolist()):  # more than 7 where tokens are equal
        assert (result.log_mass[b] - truths[0][b].topk(kept).values.logsumexp(0)).abs() <= bounds[0][b]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 2048])
def test_a_certain_token(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Rule 7: of log-probability 0, exactly, wherever its logit lies and whatever is done with it."""
    rows = 12
    x = torch.full((rows, vocab), -3e4, dtype=dtype)
    token = torch.arange(rows) * 37 % vocab
    top = make_logits("normal", (rows,), dtype) * 40
    x[torch.arange(rows), token] = top
    for parameters in ({}, {"temperature": 0.0}, {"temperature": 0.3, "weights": -0.07}, {"top_p": 0.5, "min_p": 0.1}):
        result = guided_step(x, [x], **parameters, backend=backend)
        assert torch.equal(result.token, token)
        assert not any(field.any() for field in (result.logprob, result.log_mass, result.base_logprob))
        assert not result.arm_logprobs.any()
    whole = guided_log_softmax(x, [x], 0.13, temperature=0.7, backend=backend)
    assert not whole[torch.arange(rows), token].any()
    alone = bitmask([[v] for v in token.tolist()], -(-vocab // 32))
    flat = make_logits("normal", (rows, vocab), dtype)
    assert not guided_step(flat, temperature=0.9, token_mask=alone, backend=backend).logprob.any()


@pytest.mark.parametrize("vocab", [300, 2048])
def test_no_log_probability_is_above_zero(backend: str, vocab: int) -> None:
    """Where rounding could bring it there: tokens that have nearly all of the mass."""
    gap = torch.linspace(8, 24, 64)[:, None]
    x = make_logits("flat", (64, vocab)) - gap
    x[:, 5] = make_logits("normal", (64,))
    result = guided_step(x, [x * 0.9], 0.01, temperature=0.99, top_k=3, seed=1, backend=backend)
    whole = guided_log_softmax(x, [x], 0.01, temperature=0.99, backend=backend)
    assert all((field <= 0).all() for field in (*result[1:3], *result[4:6], whole))
    certain = guided_step(x, [x * 0.9], 0.01, temperature=0.99, top_k=1, backend=backend)
    assert certain.kept.tolist() == [1] * 64 and torch.equal(certain.log_mass, certain.logprob)
    truth = x.double().log_softmax(1)
    limit = 2 * (x.log_softmax(1) - truth).abs().amax(1) + 1e-6
    assert ((result.base_logprob - truth.gather(1, result.token[:, None])[:, 0]).abs() <= limit).all()


@pytest.mark.parametrize("top", [10.0, 20.0, 40.0, 80.0])
def test_precision_where_the_largest_comes_late(backend: str, top: float) -> None:
    """A kernel that adds up exponentials relative to what it saw first rounds exponents as large as the gap."""
    x = torch.zeros(1, 5000)
    x[0, 0], x[0, 700], x[0, 4000] = 0.1, top / 2, top
    result = guided_step(x, [x], weights=0.37, temperature=0.9, backend=backend)
    for field, logits in ((result.logprob, (1 + float(np.float32(0.37))) / 0.9 * x.double()), (result.base_logprob, x)):
        truth = logits.double().log_softmax(1)[0, result.token]
        assert (field - truth).abs().item() <= 1e-6 * (1 + truth.abs().item())


def test_operand_of_weight_zero_reports_its_log_softmax(backend: str) -> None:
    x, y = make_logits("normal", (3, 200)), make_logits("normal", (3, 200), seed=1)
    result = guided_step(x, [y], 0.0, seed=2, backend=backend)
    torch.testing.assert_close(result.arm_logprobs, y.log_softmax(1).gather(1, result.token[:, None]))
    assert torch.equal(result.token, guided_step(x, seed=2, backend=backend).token)
    only_arm = guided_step(x, [y], base_weight=0.0, seed=2, backend=backend)
    torch.testing.assert_close(only_arm.base_logprob, x.log_softmax(1).gather(1, only_arm.token[:, None])[:, 0])
    assert torch.equal(only_arm.token, guided_step(y, seed=2, backend=backend).token)


def test_operand_with_a_blocked_tile_far_below_zero(backend: str) -> None:
    """What stands for the largest of a tile that has none must not count beside largest of -1000."""
    x = make_logits("normal", (2, 2100)) - 1000
    x[:, 1024:2048] = -INF
    result = guided_step(x, [x - 1e5, x], [0.5, 0.0], seed=1, backend=backend)
    torch.testing.assert_close(result.base_logprob, x.log_softmax(1).gather(1, result.token[:, None])[:, 0])
    for arm in range(2):
        own = (x - (1e5, 0)[arm]).double().log_softmax(1).gather(1, result.token[:, None])[:, 0]
        torch.testing.assert_close(result.arm_logprobs[:, arm].double(), own, rtol=1e-5, atol=1e-5)


def test_min_p_of_one_keeps_what_rounds_to_the_largest(backend: str) -> None:
    flat = make_logits("normal", (2, 1100))
    assert guided_step(flat, temperature=1e20, min_p=1.0, backend=backend).kept.tolist() == [1100, 1100]
    assert guided_step(flat, min_p=1.0, backend=backend).kept.tolist() == [1, 1]


def test_without_logprobs(backend: str) -> None:
    x = make_logits("normal", (3, 200))
    full, lean = (guided_step(x, [x], top_p=0.9, logprobs=flag, backend=backend) for flag in (True, False))
    assert [name for name, field in zip(GuidedStep._fields, lean, strict=True) if field is None] == [
        "logprob", "log_mass", "base_logprob", "arm_logprobs"
    ]  # fmt: skip
    for name in ("token", "kept", "status"):
        assert torch.equal(getattr(full, name), getattr(lean, name))


@pytest.mark.parametrize("who", ["operands", "weights", "base_weight", "temperature", "top_p", "min_p"])
def test_no_output_carries_a_gradient(backend: str, who: str) -> None:
    x = make_logits("normal", (3, 200))
    parameters = {name: torch.full((3,), 0.5) for name in ("base_weight", "temperature", "top_p", "min_p")}
    parameters["weights"] = torch.full((3, 1), 0.5)
    arm = x.clone()
    for tensor in (x, arm) if who == "operands" else (parameters[who],):
        tensor.requires_grad_()
    result = guided_step(x, [arm], **parameters, backend=backend)
    assert not any(field.requires_grad for field in result)


def test_raise_for_status(backend: str) -> None:
    x = torch.zeros(5, 4)
    guided_step(x, backend=backend).raise_for_status()
    x[1], x[2:4] = NAN, -INF
    with pytest.raises(ValueError, match="drew no token") as caught:
        guided_step(x, backend=backend).raise_for_status()
    message = str(caught.value)
    assert re.search(r"NaN.*\[1\].*no allowed token.*\[2, 3\]", message), message
    x[1] = 0.0
    with pytest.raises(ValueError, match=r"\[2, 3\]") as caught:
        guided_step(x, backend=backend).raise_for_status()
    assert "NaN" not in str(caught.value)


# --- Rule 9: errors speak ---------------------------------------------------------------------------------------------

X = torch.zeros(2, 40)
LONG = torch.zeros(3)
BAD_CALLS: list[tuple[str, type[Exception], dict]] = [
    ("base_logits", TypeError, dict(base_logits=[[1.0, 2.0]])),
    ("base_logits", TypeError, dict(base_logits=None)),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(40))),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(1, 2, 40))),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(2, 0))),
    ("base_logits", ValueError, dict(base_logits=X.double())),
    ("base_logits", ValueError, dict(base_logits=X.int())),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(40, 2).t())),
    ("arm_logits", TypeError, dict(arm_logits=None)),
    ("arm_logits", TypeError, dict(arm_logits="arm")),
    ("arm_logits", ValueError, dict(arm_logits=X)),
    ("arm_logits[0]", TypeError, dict(arm_logits=[1.0])),
    ("arm_logits[1]", ValueError, dict(arm_logits=[X, torch.zeros(3, 40)])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[X.half()])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[X.to("meta")])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[torch.zeros(2, 80)[:, ::2]])),
    ("arm_logits[0]", ValueError, dict(arm_logits=torch.zeros(1, 3, 40))),
    ("weights", TypeError, dict(weights="1")),
    ("weights", TypeError, dict(weights=True)),
    ("weights", TypeError, dict(weights=None)),
    ("weights", TypeError, dict(weights=np.array([1.0, 2.0]), arm_logits=[X, X])),
    ("weights[1]", TypeError, dict(weights=[1.0, "2"], arm_logits=[X, X])),
    ("weights", ValueError, dict(weights=[1.0, 2.0])),
    ("weights[0]", ValueError, dict(weights=[NAN])),
    ("weights", ValueError, dict(weights=1e39)),
    ("weights", ValueError, dict(weights=LONG)),
    ("weights", ValueError, dict(weights=torch.zeros(2, 2))),
    ("weights", ValueError, dict(weights=torch.zeros(1).int())),
    ("weights", ValueError, dict(weights=torch.zeros(1, device="meta"))),
    ("temperature", TypeError, dict(temperature="hot")),
    ("temperature", TypeError, dict(temperature=True)),
    ("temperature", TypeError, dict(temperature=[1.0, 1.0])),
    ("temperature", ValueError, dict(temperature=10**400)),
    ("temperature", ValueError, dict(temperature=LONG)),
    ("temperature", ValueError, dict(temperature=torch.ones(2).int())),
    ("base_weight", TypeError, dict(base_weight=None)),
    ("base_weight", ValueError, dict(base_weight=LONG)),
    ("top_k", TypeError, dict(top_k=1.5)),
    ("top_k", TypeError, dict(top_k=True)),
    ("top_k", ValueError, dict(top_k=torch.ones(2))),
    ("top_k", ValueError, dict(top_k=LONG.int())),
    ("top_k", ValueError, dict(top_k=torch.ones(2, dtype=torch.int16))),
    ("top_p", TypeError, dict(top_p=None)),
    ("top_p", ValueError, dict(top_p=torch.ones(2, 1))),
    ("min_p", TypeError, dict(min_p="0")),
    ("min_p", ValueError, dict(min_p=LONG)),
    ("seed", TypeError, dict(seed=1.0)),
    ("seed", TypeError, dict(seed=None)),
    ("seed", ValueError, dict(seed=2**64)),
    ("seed", ValueError, dict(seed=-(2**63) - 1)),
    ("seed", ValueError, dict(seed=LONG.long())),
    ("seed", ValueError, dict(seed=torch.zeros(2))),
    ("seed", ValueError, dict(seed=torch.zeros(2, device="meta").long())),
    ("position", TypeError, dict(position=0.5)),
    ("position", ValueError, dict(position=2**64)),
    ("position", ValueError, dict(position=torch.zeros(2, 1).long())),
    ("token_mask", TypeError, dict(token_mask=[[1]])),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 2).long())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 40).bool())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 1).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(1, 2).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 2, device="meta").int())),
    ("vocab_size", ValueError, dict(vocab_size=41)),
    ("vocab_size", ValueError, dict(vocab_size=0)),
    ("vocab_size", TypeError, dict(vocab_size=4.0)),
    ("vocab_size", ValueError, dict(arm_logits=[torch.zeros(2, 41)])),
    ("vocab_size", ValueError, dict(arm_logits=[torch.zeros(2, 39)], vocab_size=40)),
    ("logprobs", TypeError, dict(logprobs=1)),
    ("backend", TypeError, dict(backend=None)),
    ("backend", ValueError, dict(backend="CPU")),
]
IN_BOTH = ("base_logits", "arm_logits", "weights", "base_weight", "temperature", "token_mask", "vocab_size", "backend")


@pytest.mark.parametrize("argument, error, kwargs", BAD_CALLS)
def test_errors_name_the_argument(argument: str, error: type[Exception], kwargs: dict) -> None:
    """... and say what was expected and what came."""
    calls = [guided_step, guided_log_softmax] if set(kwargs) <= set(IN_BOTH) else [guided_step]
    for call in calls:
        with pytest.raises(error, match=rf"^{re.escape(argument)}: expected .+ got |^{argument}: operands .+ got "):
            call(**{"base_logits": X, "arm_logits": [X], **kwargs})


def test_errors_show_the_way_out() -> None:
    for weights in ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 3, [torch.ones(3)] * 2):
        with pytest.raises((TypeError, ValueError), match=r"pass a tensor \[B, N\] for weights per row"):
            guided_step(torch.zeros(3, 40), torch.zeros(2, 3, 40), weights)
    with pytest.raises(ValueError, match=r"guided_step's docstring packs bools$"):
        guided_step(X, token_mask=X.bool())


def test_log_softmax_needs_a_temperature_above_zero(backend: str) -> None:
    for value in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match=r"^temperature: "):
            guided_log_softmax(make_logits("normal", (2, 5)), temperature=value, backend=backend)
    tensor = torch.tensor([0.0, 0.5, -1.0, NAN, INF])
    whole = guided_log_softmax(make_logits("normal", (5, 5)), temperature=tensor, backend=backend)
    assert whole.isnan().all(1).tolist() == [True, False, True, True, True]


def test_a_named_backend_runs_or_raises() -> None:
    for name in {"reference", "cpu", "triton", "cuda"} - set(available_backends()):
        with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run: .+ available here: reference"):
            guided_step(X, backend=name)
    assert available_backends()[0] == "reference"
    guided_step(X, backend="auto").raise_for_status()


# --- Callers of every kind --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_views_that_are_lazy_or_expanded(backend: str) -> None:
    x, everything = make_logits("normal", (2, 100)), torch.tensor(-1, dtype=torch.int32).expand(2, 4)
    assert_same(guided_step(x, token_mask=everything, backend=backend), guided_step(x, backend=backend))
    negated = torch._neg_view(x)  # as the imaginary part of a conjugate is
    assert_same(guided_step(negated, backend=backend), guided_step(-x, backend=backend))
    assert_same(guided_step(x, [negated], 2.0, backend=backend), guided_step(x, [-x], 2.0, backend=backend))
    weight = torch.tensor([1 + 2j, 1 + 1j]).conj().imag.to(x.device)
    assert_same(
        guided_step(x, base_weight=weight, backend=backend),
        guided_step(x, base_weight=torch.tensor([-2.0, -1.0]), backend=backend),
    )
    with pytest.raises(ValueError, match=r"base_logits: expected a dense tensor.+to_dense"):
        guided_step(x.to_sparse_csr(), backend=backend)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracers_and_transforms_see_the_operator(backend: str) -> None:
    x = make_logits("normal", (2, 100))
    traced = torch.jit.trace(lambda y: guided_step(y, backend=backend).token, (x,), check_trace=False)
    assert torch.equal(traced(-x), guided_step(-x, backend=backend).token)

    def total(y: Tensor) -> Tensor:
        return y.sum() + 0 * guided_step(y, backend=backend).kept.sum()

    assert torch.equal(torch.func.grad(total)(x), torch.ones_like(x))
    graph = make_fx(lambda y: guided_step(y, backend=backend).token)(x)
    assert "genarm_kernels.guided_step" in graph.code


def test_differences_beyond_float32(backend: str) -> None:
    """Twice the largest float32 apart, and close enough at such a temperature."""
    rows = 100 if interpreted(backend) else 500
    x, hot = torch.tensor([[3.4e38, -3.4e38]]).expand(rows, 2), dict(temperature=3e38, backend=backend)
    p = math.exp(-6.8 / 3) / (1 + math.exp(-6.8 / 3))
    result = guided_step(x, **hot)
    assert abs(result.token.float().mean().item() - p) < 1.4 / rows**0.5  # 4 deviations
    torch.testing.assert_close(result.logprob.exp(), torch.where(result.token == 1, p, 1 - p).float())
    torch.testing.assert_close(guided_log_softmax(x[:1], **hot).exp(), torch.tensor([[1 - p, p]]))
    low = torch.tensor([[0.0, -3.40282e38]])
    assert low[0, 1] > LOWEST[torch.float32] and guided_step(low, min_p=0.1, **hot).kept.item() == 2


# --- Operators --------------------------------------------------------------------------------------------------------


def operator_arguments(backend: str, rows: bool) -> dict[str, tuple]:
    """What the public functions hand to the operators, as numbers or as one number per row."""
    x = make_logits("normal", (3, 40))
    half, one = torch.full((3,), 0.5), torch.ones(3, dtype=torch.int64)
    inputs = Inputs(
        base_logits=x,
        arm_logits=[x + 1, x * 2],
        vocab_size=39,
        weights=torch.ones(3, 2) if rows else [0.5, 0.25],
        base_weight=half if rows else 1.0,
        temperature=half if rows else 0.7,
        token_mask=bitmask([[1, 2, 35]] * 3, 2) if rows else None,
    )
    numbers = Sampling(top_k=20, top_p=0.9, min_p=0.01, seed=7, position=5, logprobs=True)
    sampling = Sampling(top_k=one, top_p=half, min_p=half, seed=one, position=one, logprobs=True) if rows else numbers
    return {
        "guided_step": (backend, *flatten(inputs, sampling)),
        "guided_log_softmax": (backend, *flatten(inputs)),
    }


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "name, structures", [("guided_step", (Inputs, Sampling)), ("guided_log_softmax", (Inputs,))], ids=str
)
def test_the_argument_list_stands_once(name: str, structures: tuple, rows: bool) -> None:
    """The public function, the structures and the operator have the same arguments, and the way between is exact."""
    public = inspect.signature(getattr(genarm_kernels, name)).parameters
    assert {*public} == {"backend", *(field for kind in structures for field in kind._fields)}
    schema = getattr(torch.ops.genarm_kernels, name).default._schema
    assert [argument.name for argument in schema.arguments] == ["backend", *names(*structures)]
    _, *flat = operator_arguments("reference", rows)[name]
    assert len(flat) == len(schema.arguments) - 1
    values = iter(flat)
    assert flatten(*[take(kind, values) for kind in structures]) == flat  # tensors by identity


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["guided_step", "guided_log_softmax"])
def test_opcheck(backend: str, name: str, rows: bool) -> None:
    operator, arguments = getattr(torch.ops.genarm_kernels, name).default, operator_arguments(backend, rows)[name]
    if name == "guided_log_softmax" and backend == "reference":
        for x in (arguments[1], *arguments[2]):
            x.detach_().requires_grad_()
    torch.library.opcheck(operator, arguments)
    if name == "guided_step":
        torch.library.opcheck(operator, (*arguments[:-1], False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: str, dynamic: bool) -> None:
    """One graph without breaks, whose numbers are those of the eager call; dynamic: one for all B and positions."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(base: Tensor, arm: Tensor, temperature: Tensor, seed: Tensor, position: int) -> tuple:
        result = guided_step(base, [arm], [0.5], temperature=temperature, top_p=0.9, seed=seed, backend=backend)
        other = guided_step(base, [arm], 0.5, top_k=5, seed=3, position=position, logprobs=False, backend=backend)
        return result, other.token, guided_log_softmax(base, [arm], 0.5, backend=backend)

    torch._dynamo.reset()
    compiled, graphs = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter), []
    for rows in (3, 5, 4) if dynamic else (3,):
        arguments = (
            make_logits("normal", (rows, 300)),
            make_logits("normal", (rows, 300), seed=1),
            torch.linspace(0.5, 1.5, rows),
            torch.arange(rows),
            rows + 14,
        )
        eager, lazy = step(*arguments), compiled(*arguments)
        assert_same(lazy[0], eager[0])
        assert torch.equal(lazy[1], eager[1])
        torch.testing.assert_close(lazy[2], eager[2])
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


# --- guided_log_softmax -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32000])
def test_whole_distribution(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Values, with numbers and with one a row, and agreement with `guided_step` on the tokens it draws."""
    base, arm = make_logits("peaked", (3, vocab), dtype), make_logits("normal", (3, vocab), dtype, seed=1)
    for case in (
        dict(weights=[0.5], temperature=0.7),
        dict(weights=torch.tensor([[0.5], [0.0], [-1.0]]), base_weight=torch.tensor([1.0, 2.0, 0.0]),
             temperature=torch.tensor([0.5, 1.0, 2.0])),
    ):  # fmt: skip
        whole = guided_log_softmax(base, [arm], **case, backend=backend)
        check_whole(whole, oracle(base, [arm], **case))
        step = guided_step(base, [arm], **case, backend=backend)
        torch.testing.assert_close(whole.gather(1, step.token[:, None])[:, 0], step.logprob, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Against autograd of the formula in float64: masks, -inf, padding, parameters per row, weights of any sign."""
    vocab, mask = 37, torch.arange(37) % 5 != 0
    base, arm = make_logits("normal", (3, 40), dtype), make_logits("normal", (3, 38), dtype, seed=1)
    base[0, 3] = arm[1, 4] = -INF
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    parameters = dict(
        weights=torch.tensor([[0.5], [-1.0], [0.0]]),
        base_weight=torch.tensor([1.0, 0.5, 2.0]),
        temperature=torch.tensor([0.5, 1.0, 2.0]),
    )
    words = bitmask([[v for v in range(37) if mask[v]]] * 3, 2)
    for case in (parameters, dict(weights=[-0.5], base_weight=1.5, temperature=0.7)):
        mine = [x.clone().requires_grad_() for x in (base, arm)]
        logp = guided_log_softmax(*mine[:1], mine[1:], **case, token_mask=words, vocab_size=vocab)
        logp.backward(grad)

        exact = [x.double().requires_grad_() for x in (base, arm)]
        w, w0, t = (torch.as_tensor(case[name]).double() for name in parameters)
        w, w0, t = w.expand(3, 1), w0.expand(3)[:, None], t.expand(3)[:, None]
        terms = [torch.where(c != 0, c * x[:, :vocab], 0.0) for c, x in zip((w0, w), exact, strict=True)]
        allowed = mask & ~torch.stack([term.isinf() for term in terms]).any(0)
        z = torch.where(allowed, sum(torch.where(allowed, term, 0.0) for term in terms) / t, -INF)
        truth = z.log_softmax(1)
        truth.backward(torch.where(allowed, grad[:, :vocab].double(), 0.0))
        torch.testing.assert_close(logp[:, :vocab].double(), truth, rtol=1e-5, atol=1e-5)
        for x, y in zip(mine, exact, strict=True):
            assert x.grad.dtype == dtype
            expected = torch.where(torch.nn.functional.pad(allowed, (0, x.shape[1] - vocab)), y.grad, 0.0)
            torch.testing.assert_close(x.grad.double(), expected, rtol=max(1e-5, 3 * torch.finfo(dtype).eps), atol=1e-5)


def test_gradient_of_one_operand_and_of_rows_without_tokens() -> None:
    arm = torch.zeros(2, 4, requires_grad=True)
    guided_log_softmax(torch.tensor([[0.0] * 4, [-INF] * 4]), [arm], 0.5)[:, 0].nan_to_num(neginf=0.0).sum().backward()
    assert arm.grad.tolist() == [[0.375, -0.125, -0.125, -0.125], [0.0] * 4]


@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton", "cuda") if name in available_backends()])
def test_backends_without_a_gradient_say_so(backend: str) -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        guided_log_softmax(x, backend=backend)


# --- Importing, streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import genarm_kernels; genarm_kernels.guided_step(x)",
        "import genarm_kernels.guided_step; genarm_kernels.guided_step(x)",
        "from genarm_kernels.guided_step import guided_step; guided_step(x)",
        "import genarm_kernels.guided_log_softmax; genarm_kernels.guided_log_softmax(x)",
        "from genarm_kernels.testing import random_case, guided_step; guided_step(**random_case(1))",
        "from genarm_kernels import *; guided_step(x); guided_log_softmax(x); run_concurrently()",
    ],
)
def test_imports_need_torch_alone(code: str) -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'triton', 'numpy', 'scipy', 'pytest']))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{block}; import torch; x = torch.zeros(2, 3); {code}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_public_names() -> None:
    assert all(getattr(genarm_kernels, name) is not None for name in genarm_kernels.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", genarm_kernels.__version__)


def test_run_concurrently() -> None:
    """In order, each once, on this thread; the first exception ends the round and comes through."""
    calls: list[int] = []

    def forward(i: int) -> int:
        calls.append(i)
        if i == 2:
            raise KeyError(i)
        return 10 * i

    assert run_concurrently() == []
    assert run_concurrently(lambda: forward(0), lambda: forward(1)) == [0, 10]
    with pytest.raises(KeyError):
        run_concurrently(*(lambda i=i: forward(i) for i in range(4)))
    assert calls == [0, 1, 0, 1, 2]


@pytest.mark.gpu
def test_run_concurrently_overlaps_and_joins() -> None:
    """By the device's own clock each is under way while the other is; what follows waits for both."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    x = torch.zeros(1, device="cuda")
    spans = []

    def forward(i: int) -> Tensor:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(200_000_000)
        end.record()
        spans.append((start, end))
        return x + i

    run_concurrently(lambda: forward(0), lambda: forward(0))
    spans.clear()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    torch.cuda._sleep(2_000_000_000)  # neither begins before both are queued, so that a slow host keeps none waiting
    zero, one = run_concurrently(lambda: forward(0), lambda: forward(1))
    assert (zero + one).item() == 1
    starts, ends = ([origin.elapsed_time(event) for event in of] for of in zip(*spans, strict=True))
    assert max(starts) < min(ends)


@pytest.mark.gpu
@on_gpu
def test_a_graph_keeps_its_workspace(name: str) -> None:
    """Larger calls after the capture, on the same stream, leave a replay's memory alone."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    base = make_logits("normal", (2, 5000), device="cuda")
    position = torch.zeros(2, dtype=torch.int64, device="cuda")

    def step() -> Any:
        return guided_step(base, top_p=0.9, position=position, backend=name)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i in range(3):
        large = make_logits("flat", (64, 50000 + 1000 * i), device="cuda")
        guided_step(large, top_p=0.9, backend=name)
        position += 1
        graph.replay()
        assert torch.equal(captured.token, step().token)


@pytest.mark.gpu
@on_gpu
def test_threads_share_a_stream(name: str) -> None:
    """Each call has a workspace of its own. (Emulations run one thread at a time.)"""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    cases = [make_logits("normal", (8, 2000), seed=i, device="cuda") for i in range(4)]
    alone = [guided_step(x, top_k=5, backend=name).token for x in cases]

    def same(i: int) -> bool:
        return all(torch.equal(guided_step(cases[i], top_k=5, backend=name).token, alone[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(4)))


@pytest.mark.gpu
@on_gpu
def test_two_streams_never_hang(name: str) -> None:
    """Launches that fill the GPU, side by side: no block waits for one that cannot start."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    rows = [make_logits("flat", (256, 128256), torch.bfloat16, seed, "cuda") for seed in range(2)]
    alone = [guided_step(x, top_k=2000, top_p=0.9, backend=name).token for x in rows]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in rows]
    drawn: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                drawn[i].append(guided_step(rows[i], top_k=2000, top_p=0.9, backend=name).token)
    torch.cuda.synchronize()
    assert all(torch.equal(token, alone[i]) for i in range(2) for token in drawn[i])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in available_backends() if name != "cpu"])
def test_graph_replays_draw_with_the_seeds_of_the_moment(name: str) -> None:
    """Rule 5: a captured step equals the eager one after seeds, positions and logits have changed in place."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    with torch.device("cuda"):
        base, arm = make_logits("flat", (4, 5000)), make_logits("flat", (4, 5000), seed=1)
        seed, position = torch.arange(4), torch.zeros(4, dtype=torch.int64)

        def step() -> GuidedStep:
            models = run_concurrently(lambda: base * 1, lambda: arm * 1)
            return guided_step(models[0], models[1:], top_p=0.9, seed=seed, position=position, backend=name)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        tokens = []
        for _ in range(4):
            seed += 100
            position += 1
            base.copy_(base.roll(1, 1))
            graph.replay()
            assert_same(captured, step())
            tokens.append(tuple(captured.token.tolist()))
        assert len(set(tokens)) == 4

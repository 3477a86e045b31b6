# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rules 1 and 2: which tokens are allowed, and rows that cannot be drawn."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from genarm_kernels import (
    GuidedStep,
    guided_log_softmax,
    guided_step,
)
from genarm_kernels.testing import make_logits
from rules import BAD_ROW, DRAWN, DTYPES, INF, LOWEST, NAN, NO_ALLOWED_TOKEN, Few, assert_same, bitmask, large


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
def test_the_lowest_number_is_minus_infinity(backend: str, few: Few, vocab: int, dtype: torch.dtype) -> None:
    """Rule 1, whatever becomes of the sum: base and ARM overflow, or cancel; either alone; not in use."""
    masked = torch.arange(vocab) % 3 == 1

    def blocked(x: Tensor, number: float) -> Tensor:
        return torch.where(masked, number, x).to(dtype)

    base, arm = (make_logits("normal", (3, vocab), dtype, seed=i) for i in range(2))
    ways = [({}, {}), ({"temperature": 0.0}, {"temperature": 0.5}), ({"top_k": 3, "top_p": 0.9, "seed": 2}, {})]
    cases = [*itertools.product((1.0, -1.0, 0.5, -0.01), ((0, 1), (0,), (1,)), ways)]
    for weight, who, (step, whole) in few(cases, 8):
        low, none = (
            [blocked(x, number) if i in who else x for i, x in enumerate((base, arm))]
            for number in (LOWEST[dtype], -INF)
        )
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

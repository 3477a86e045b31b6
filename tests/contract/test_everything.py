# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rules 1 to 8 at once: random calls against the oracle and the reference; widths, types, strides, numbers of ARMs."""

import itertools

import pytest
import torch
import torch._dynamo.testing

from genarm_kernels import (
    GuidedStep,
    guided_log_softmax,
    guided_step,
)
from genarm_kernels.testing import make_logits, random_case
from rules import (
    BAD_ROW,
    DRAWN,
    DTYPES,
    INF,
    NAN,
    NO_ALLOWED_TOKEN,
    VOCABULARIES,
    Few,
    assert_same,
    check,
    check_whole,
    large,
    oracle,
)

# --- Everything at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2, *(pytest.param(n, marks=large) for n in (3, 4, 5))])
def test_random_cases(backend: str, few: Few, block: int) -> None:
    """Rules 1-7 and every kind of argument: token by token what the contract says."""
    statuses, doubtful, rows = set(), 0, 0
    for seed in few(range(block * 25, block * 25 + 25), 15):
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


@pytest.mark.parametrize("block", range(2))
def test_same_as_the_reference(backend: str, few: Few, block: int) -> None:
    """Rule 5, on logits whose sums round: the same order of the same roundings, so the same ties and tokens.

    For the reference itself this says that a call repeats.
    """
    for seed in few(range(1000 + block * 40, 1040 + block * 40), 15):
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


# --- Layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend: str, few: Few, dtype: torch.dtype) -> None:
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
    for base_name, arm_name in few([*itertools.product(views, reversed(views))], 7):
        base, arm = views[base_name], views[arm_name]
        got, expected = (
            guided_step(x, [y], 0.5, top_p=0.9, seed=11, backend=backend)
            for x, y in ((base, arm), (base.contiguous(), arm.contiguous()))
        )
        assert expected.status.tolist() == [0, 0], (base_name, arm_name)
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

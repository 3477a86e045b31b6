# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rules 3 and 4: greedy rows; top-k, top-p and min-p."""

import pytest
import torch
import torch._dynamo.testing

from genarm_kernels import (
    GuidedStep,
    guided_step,
)
from genarm_kernels.testing import make_logits
from rules import INF, Few, assert_same, bitmask

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
def test_top_k_above_the_number_of_allowed_tokens(backend: str, few: Few, stride: int) -> None:
    """Tokens whose places are alike, too: a kernel that bounds the threshold by what it knows of places finds few."""
    allowed = [stride * i for i in range(4)]
    for vocab in (1000, 3000):
        mask = bitmask([allowed], (vocab + 31) // 32)
        for top_k in few(range(1, 12), 4):
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

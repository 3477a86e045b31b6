# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rules 5 and 6: a pure function of row, seed and position, with the frequencies of its law."""

from collections.abc import Iterator
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
from genarm_kernels.testing import make_logits, pooled_chi_squared, random_case
from rules import INF, TILE, Few, assert_same, draw, draws, large, law

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


def test_flushed_denormal_numbers(backend: str, few: Few, flushing: None) -> None:
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
    calls = [*few(calls, 3)]
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

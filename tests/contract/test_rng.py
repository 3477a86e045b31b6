"""The random numbers of the reference; what the other backends draw is compared with it in test_everything.py."""

from decimal import Decimal, getcontext

import pytest
import torch
from scipy import stats

from genarm_kernels import rng

WORD = 0xFFFFFFFF

# kat_vectors of Random123 (philox4x32, 10 rounds): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    assert rng.philox4x32(words(key), words(counter)) == words(result)


def test_philox_broadcasts() -> None:
    zeros, ones, pi = ([words(text) for text in case] for case in KNOWN_ANSWERS)
    counter, key, result = (
        [torch.stack(column) for column in zip(*three, strict=True)] for three in zip(zeros, ones, pi, strict=True)
    )
    assert torch.equal(torch.stack(rng.philox4x32(tuple(key), tuple(counter))), torch.stack(result))


def test_seed_and_position_enter_with_all_their_64_bits() -> None:
    """Each single bit of either changes the words, and no two give the same; negative numbers wrap."""
    bits = torch.tensor([0] + [1 << i for i in range(63)] + [-(1 << 63)])
    zero = torch.zeros_like(bits)
    for seed, position in ((bits, zero), (zero, bits)):
        high, low = rng.random_words(seed, position, torch.zeros_like(seed), rng.PURPOSE_TOKEN)
        assert len(set(zip(high.tolist(), low.tolist(), strict=True))) == len(bits)
        assert (high >= 0).all() and (high <= WORD).all() and (low >= 0).all() and (low <= WORD).all()
    minus_one = torch.tensor(-1)
    answer = rng.philox4x32(words("ffffffff ffffffff"), words("ffffffff ffffffff 00000005 00000001"))
    assert rng.random_words(minus_one, minus_one, torch.tensor(5), 1) == answer[:2]


def feed(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Lets the transforms see these 64-bit numbers as their random bits."""
    halves = torch.tensor([n >> 32 for n in numbers]), torch.tensor([n & WORD for n in numbers])
    monkeypatch.setattr(rng, "random_words", lambda *_: halves)


def test_uniform_of_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """In (0, 1) at both ends, in steps of 2^-53."""
    feed(monkeypatch, 0, 1 << 11, 3 << 11, 1 << 63, (1 << 64) - 1)
    u = rng.uniform(torch.zeros(1), torch.zeros(1))
    assert u.tolist() == [2.0**-54, 2.0**-53, 3 * 2.0**-53, 0.5, 1 - 2.0**-53]


def test_gumbel_of_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tails to full precision: 60 digits of -ln(-ln(1 - c)), c = (r + 1/2) / 2^64."""
    getcontext().prec = 60
    numbers = [0, 1, 1000, 1 << 11, 1 << 32, 1 << 45, (1 << 63) - 1, 1 << 63, (1 << 64) - (1 << 40), (1 << 64) - 1]
    feed(monkeypatch, *numbers)
    g = rng.gumbel(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    exact = [float(-(-(1 - (Decimal(r) + Decimal("0.5")) / 2**64).ln()).ln()) for r in numbers]
    torch.testing.assert_close(g, torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=1e-15)
    assert g[0] > 45 and g[-1] < -3.8


def test_laws() -> None:
    """Kolmogorov-Smirnov over positions, seeds and tiles alike; seven tests share one threshold."""
    n = torch.arange(20_000)
    zero, middle = torch.zeros_like(n), torch.full_like(n, 7)
    for seed, position, tile in ((n, zero, zero), (middle, n, zero), (middle, n << 32, middle), (zero, middle, n)):
        assert stats.kstest(rng.gumbel(seed, position, tile), stats.gumbel_r.cdf, method="asymp").pvalue > 0.01 / 7
    for seed, position in ((n, zero), (zero, n), (n, n)):
        assert stats.kstest(rng.uniform(seed, position), stats.uniform.cdf, method="asymp").pvalue > 0.01 / 7


def test_the_two_purposes_are_independent() -> None:
    n = torch.arange(20_000)
    tile = torch.exp(-torch.exp(-rng.gumbel(n, n, torch.zeros_like(n))))  # back to a uniform
    assert stats.pearsonr(tile, rng.uniform(n, n)).pvalue > 0.01

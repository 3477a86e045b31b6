"""Counter-based random numbers: the whole of the library's randomness.

Every number is a pure function of (seed, position, tile, purpose); nothing here has state. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = seed, counter =
(position, tile, purpose).
"""

import torch
from torch import Tensor

# Tokens in one tile of the vocabulary. The same on every backend: it decides which random number a token meets.
TILE = 1024

# The last word of the counter: what a number is drawn for.
PURPOSE_TILE = 0  # one Gumbel variate a tile
PURPOSE_TOKEN = 1  # one uniform a row, inside the tile that won

# Between the seeds of a call's rows where one number seeds them all: 2^64 / the golden ratio, as an int64. Calls with
# seeds 0, 1, 2, ... have no row's seed in common, as a step of 1 would give them.
SEED_STEP = 0x9E3779B97F4A7C15 - 2**64

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def row_seeds(seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """int64 `[rows]`: the rows' seeds where one int64 seeds them all; wraps."""
    return seed + SEED_STEP * torch.arange(rows, device=device)


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words and broadcast together; four such tensors come back."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # The product wraps in int64, which leaves its 64 bits as they are; the mask undoes the shift's sign extension.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_words(seed: Tensor, position: Tensor, tile: Tensor, purpose: int) -> tuple[Tensor, Tensor]:
    """64 random bits as (high, low) 32-bit words in int64, for int64 tensors that broadcast together."""
    words = philox4x32(
        (seed & _WORD, (seed >> 32) & _WORD),
        (position & _WORD, (position >> 32) & _WORD, tile, torch.full_like(tile, purpose)),
    )
    return words[0], words[1]


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """The row's float64 uniform inside the winning tile: 53 bits, in (0, 1)."""
    high, low = random_words(seed, position, torch.zeros_like(position), PURPOSE_TOKEN)
    bits = (high << 21) | (low >> 11)
    return (bits.double() * 2.0**-53).clamp_min(2.0**-54)


def gumbel(seed: Tensor, position: Tensor, tile: Tensor) -> Tensor:
    """float64 standard Gumbel variates, one a tile, from all 64 bits r: -log(-log(1 - c)) with c = (r + 1/2) / 2^64.

    A large variate comes from a small c, which is represented to full relative precision, so that log1p keeps the upper
    tail (up to 45) exact; above one half the complement of the bits takes its place.
    """
    high, low = random_words(seed, position, tile, PURPOSE_TILE)
    c = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    complement = (_WORD - high).double() * 2.0**-32 + ((_WORD - low).double() + 0.5) * 2.0**-64
    exponential = torch.where(c < 0.5, -torch.log1p(-c), -torch.log(complement))
    return -torch.log(exponential)

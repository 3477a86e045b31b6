"""A kernel that shows the Triton backend's random numbers."""

import triton
import triton.language as tl

from genarm_kernels.backends.triton.numbers import PURPOSE_TILE, race_time, random_words, token_uniform


@triton.jit
def random_numbers(seed_ptr, position_ptr, high_ptr, low_ptr, time_ptr, uniform_ptr, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    high, low = random_words(seed, position, tile, PURPOSE_TILE)
    tl.store(high_ptr + tile, high)
    tl.store(low_ptr + tile, low)
    tl.store(time_ptr + tile, race_time(seed, position, tile, 1.0))
    tl.store(uniform_ptr, token_uniform(seed, position))

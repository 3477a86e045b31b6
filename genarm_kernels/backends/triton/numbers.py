"""What the kernels compute with: sums of powers of 2, floats in order, random numbers."""

import triton
import triton.language as tl

from ... import rng

LOG2E = tl.constexpr(1.4426950216293335)  # as a float32
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)

PURPOSE_TILE = tl.constexpr(rng.PURPOSE_TILE)
PURPOSE_TOKEN = tl.constexpr(rng.PURPOSE_TOKEN)


@triton.jit
def lowest_of(x):
    """The lowest finite number of the logits' type, which many models write where a token is not allowed."""
    LOWEST: tl.constexpr = (
        -65504.0 if x.dtype == tl.float16 else -3.3895313892515355e38 if x.dtype == tl.bfloat16 else -MAX_FLOAT
    )
    return LOWEST


# ---- Sums of 2^(x scale) -------------------------------------------------------------------------------------------


@triton.jit
def is_near(top, scale):
    """Whether scale * top, which `power_near` rounds, is small enough for that to leave sums in range."""
    return tl.abs(top * scale) < 1048576.0


@triton.jit
def power_near(x, top, scale):
    """2^(scale x - scale top) with scale * top rounded: one multiply-add and one exponential. `top` is finite."""
    return tl.exp2(tl.fma(x, scale, -(top * scale)))


@triton.jit
def power(x, top, scale):
    """2^(scale (x - top)), relative to `reference_of(top, scale)`, for any x up to top and any finite top."""
    # In halves: the difference of two float32 may be twice the largest.
    far = (x * 0.5 - top * 0.5) * tl.minimum(2 * scale, MAX_FLOAT)
    return tl.exp2(tl.where(is_near(top, scale), tl.fma(x, scale, -(top * scale)), far))


@triton.jit
def finite_or_zero(top):
    return tl.where(tl.abs(top) < INF, top, 0.0)


@triton.jit
def reference_of(top, scale):
    """log2 of what a sum of powers is relative to, float64: scale * top, rounded where the powers have it rounded."""
    return tl.where(is_near(top, scale), (top * scale).to(tl.float64), top.to(tl.float64) * scale.to(tl.float64))


@triton.jit
def relative(sums, exponent):
    """A sum in units of 2^-exponent, float64. Where nothing was summed there is no exponent to speak of."""
    return tl.where(sums == 0, 0.0, sums.to(tl.float64) * tl.exp2(exponent))


@triton.jit
def log_probability(x):
    """A log-probability, float64, as sums of powers can tell it. They are off by up to 6e-7: what is nearer to 0 than
    that, or above it, is 0.
    """
    return tl.where(x > -6e-7, 0.0, x)


# ---- Floats in order -----------------------------------------------------------------------------------------------


@triton.jit
def ordered_key(x):
    """Integers in the order of floats; -0 and +0 are one key. No NaN."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, (bits ^ 0x7FFFFFFF) + 1)


@triton.jit
def from_ordered_key(key):
    key = key.to(tl.int32)
    return tl.where(key >= 0, key, (key - 1) ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


# ---- Random numbers ------------------------------------------------------------------------------------------------


@triton.jit
def random_words(seed, position, tile, PURPOSE: tl.constexpr):
    """64 random bits as two 32-bit words, in float64, which holds them exactly."""
    tile = tile.to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32) + tile * 0
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32) + tile * 0
    first, second, _, _ = tl.philox(seed, low, high, tile, tile * 0 + PURPOSE)
    return first.to(tl.float64), second.to(tl.float64)


@triton.jit
def race_time(seed, position, tile, weight):
    """The tile's time in the race that the Gumbel-max is: argmax(log W + G) = argmin(E / W), E = exp(-G)."""
    high, low = random_words(seed, position, tile, PURPOSE_TILE)
    # c = (bits + 1/2) / 2^64; E = -log(1 - c). Where c is large its complement is the number represented in full.
    c = high * 2.3283064365386963e-10 + (low + 0.5) * 5.421010862427522e-20
    complement = (4294967295.0 - high) * 2.3283064365386963e-10 + (4294967295.0 - low + 0.5) * 5.421010862427522e-20
    rest = 1.0 - c
    small = tl.where(rest == 1.0, c, tl.log(rest) * (c / (rest - 1.0)))  # Kahan: the rounding of `rest` cancels
    return tl.where(c < 0.5, small, -tl.log(complement)) / weight


@triton.jit
def token_uniform(seed, position):
    """The row's uniform inside the tile that won: 53 bits, in (0, 1), float64."""
    high, low = random_words(seed, position, tl.zeros([1], tl.int32), PURPOSE_TOKEN)
    bits = high * 2097152.0 + tl.floor(low * 0.00048828125)
    return tl.max(tl.maximum(bits * 1.1102230246251565e-16, 5.551115123125783e-17))

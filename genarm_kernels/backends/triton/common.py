"""What the kernels share: a row's parameters, z, sums of exponentials, random numbers.

A row's workspace is a number of segments of 4-byte words, float32 or int32: `[T]` for each of the tile pass's results
(`TILE_*`), with filters `[T * GROUPS]` for each of the groups' (`GROUP_*`), then the candidates' z and tokens.
"""

import triton
import triton.language as tl

from ... import rng

TILE = tl.constexpr(rng.TILE)
GROUP = tl.constexpr(128)  # tokens whose largest is known: filters read groups again, not tiles
GROUPS = tl.constexpr(TILE.value // GROUP.value)
CANDIDATES = tl.constexpr(8192)  # what a row's buffer holds; more are weighed where they stand, in the logits

PURPOSE_TILE = tl.constexpr(rng.PURPOSE_TILE)
PURPOSE_TOKEN = tl.constexpr(rng.PURPOSE_TOKEN)
SEED_STEP = tl.constexpr(rng.SEED_STEP)
LOG2E = tl.constexpr(1.4426950216293335)  # as a float32
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)

# Bits of `given`: which parameters come as tensors, one value a row. In the order of `row_ptrs`.
BASE_WEIGHT = tl.constexpr(0)
TEMPERATURE = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
TOP_K = tl.constexpr(4)
SEED = tl.constexpr(5)
POSITION = tl.constexpr(6)
WEIGHTS = tl.constexpr(7)


# ---- Parameters and addresses --------------------------------------------------------------------------------------


@triton.jit
def parameter(row, number, row_ptrs, row_strides, given, INDEX: tl.constexpr):
    """A parameter of the row: from its tensor if there is one, otherwise the number."""
    return tl.load(row_ptrs[INDEX] + row * row_strides[INDEX], mask=(given >> INDEX) & 1 != 0, other=number)


@triton.jit
def weights_of(row, weights, row_ptrs, row_strides, given, OPERANDS: tl.constexpr):
    """The operands' weights, the base's first."""
    row_weights = (parameter(row, weights[0], row_ptrs, row_strides, given, BASE_WEIGHT),)
    for i in tl.static_range(1, OPERANDS):
        weight_ptr = row_ptrs[WEIGHTS] + row * row_strides[WEIGHTS] + (i - 1) * row_strides[WEIGHTS + 1]
        row_weights = row_weights + (tl.load(weight_ptr, mask=(given >> WEIGHTS) & 1 != 0, other=weights[i]),)
    return row_weights


@triton.jit
def rows_of(x_ptrs, x_strides, row, OPERANDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the operands' rows begin. ALIGNED: every row of every operand begins at a multiple of 16 bytes."""
    x_rows = ()
    for i in tl.static_range(OPERANDS):
        x_row = x_ptrs[i] + row * x_strides[i]
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
        x_rows = x_rows + (x_row,)
    return x_rows


@triton.jit
def scale_of(temperature):
    """p is 2^(scale (z - top)); temperature 0 has the log-probabilities of temperature 1."""
    log2e = tl.full([], 1.4426950408889634, tl.float32)
    return tl.minimum(tl.div_rn(log2e, tl.where(temperature == 0, 1.0, temperature)), MAX_FLOAT)


# ---- The workspace -------------------------------------------------------------------------------------------------

# A pair of segments is a largest number and a sum relative to its reference: of z, then of each operand by itself. The
# largest z is -inf where nothing is allowed.
TILE_TOP = tl.constexpr(0)
TILE_SUM = tl.constexpr(1)
GROUP_TOP = tl.constexpr(0)
GROUP_SUM = tl.constexpr(1)  # relative to the *tile's* reference
GROUP_WEIGHT = tl.constexpr(2)  # mass of the kept tokens, relative to the row's largest
GROUP_LIST = tl.constexpr(3)  # int32: the groups to be read again


def workspace_words(tiles: int, operands: int, filtered: bool) -> int:
    """4-byte words of a row's workspace."""
    words = (2 + 2 * operands + 1) * tiles
    return words + 4 * GROUPS.value * tiles + 2 * CANDIDATES.value if filtered else words


@triton.jit
def groups_of(workspace, tiles, OPERANDS: tl.constexpr, SEGMENT: tl.constexpr):
    """Where a segment of the groups begins."""
    return workspace + tiles * (2 + 2 * OPERANDS + 1 + SEGMENT * GROUPS)


@triton.jit
def candidates_of(workspace, tiles, OPERANDS: tl.constexpr):
    return groups_of(workspace, tiles, OPERANDS, 4)


@triton.jit
def allowed_of(workspace, tiles, OPERANDS: tl.constexpr):
    """`[T]` int32: how many of a tile's tokens are allowed; -1: one spoils the row."""
    return as_ints(workspace) + tiles * (2 + 2 * OPERANDS)


@triton.jit
def as_ints(ptr):
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


# ---- z -------------------------------------------------------------------------------------------------------------


@triton.jit
def in_mask(mask_row, mask_stride, masked, v, first):
    """Which of the tokens `v` the mask allows; `masked` is the vocabulary, or 0 where there is no mask. `first`: the
    tokens whose words are loaded, `v` or one for each 8 from a multiple of 8 on.
    """
    words = tl.load(mask_row + (first >> 5).to(tl.int64) * mask_stride, mask=first < masked, other=-1)
    return ((words >> (v & 31)) & 1) != 0


@triton.jit
def load(x_rows, v, inside, FIRST: tl.constexpr, END: tl.constexpr):
    """Some operands' logits of the tokens `v`, -inf outside; `inside` None: all of them are."""
    logits = ()
    for i in tl.static_range(FIRST, END):
        if inside is None:
            logits = logits + (tl.load(x_rows[i] + v),)
        else:
            logits = logits + (tl.load(x_rows[i] + v, mask=inside, other=-INF),)
    return logits


@triton.jit
def in_use(x, weight):
    """An operand's logits in float32, 0 throughout where its weight is."""
    return tl.where(weight != 0, x.to(tl.float32), 0.0)


@triton.jit
def lowest_of(x):
    """The lowest finite number of the logits' type, which many models write where a token is not allowed."""
    LOWEST: tl.constexpr = (
        -65504.0 if x.dtype == tl.float16 else -3.3895313892515355e38 if x.dtype == tl.bfloat16 else -MAX_FLOAT
    )
    return LOWEST


@triton.jit
def combine(logits, weights, may, OPERANDS: tl.constexpr):
    """z, -inf where a token may not be drawn, and which tokens spoil the row; `may`: by the mask and the vocabulary."""
    # Bits rather than truths, which would stand side by side in registers: 1 blocked, 2 spoilt, 4 not to be drawn.
    state = tl.where(may, 0, 4)
    z = tl.zeros(may.shape, tl.float32)
    for i in tl.static_range(OPERANDS):
        x = in_use(logits[i], weights[i])
        z = tl.fma(x, weights[i], z)
        state = tl.where(x <= lowest_of(logits[i]), state | 1, state)
        state = tl.where(x < INF, state, state | 2)
    spoils = ((state & 6) == 2) | ((state == 0) & (z == INF))
    return tl.where(state == 0, z, -INF), spoils


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
def merge(workspace, tiles, scale, pairs, OPERANDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's tops and sums out of its tiles', for the first pairs of segments (z, operands) at once, `[ROWS]`: the
    largest, the sum in float64, what that is relative to; and the allowed tokens, and the fewest of a tile.

    BLOCK at most a program's threads: more fails an assertion in Triton 3.7 (OptimizeThreadLocality).
    """
    pair = tl.arange(0, ROWS)[:, None]
    scales = tl.where(pair == 0, scale, LOG2E)
    tops = tl.full([ROWS], -INF, tl.float32)
    allowed = tl.full([], 0, tl.int32)
    fewest = tl.full([], 0, tl.int32)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        counts = tl.load(allowed_of(workspace, tiles, OPERANDS) + tile, mask=tile < tiles, other=0)
        inside = (tile[None, :] < tiles) & (pair < pairs)
        top = tl.load(workspace + (2 * pair + TILE_TOP) * tiles + tile[None, :], mask=inside, other=-INF)
        tops = tl.maximum(tops, tl.max(top, 1))
        allowed += tl.sum(counts)
        fewest = tl.minimum(fewest, tl.min(counts))
    references = reference_of(finite_or_zero(tops)[:, None], scales)
    total = tl.zeros([ROWS], tl.float64)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        inside = (tile[None, :] < tiles) & (pair < pairs)
        at = workspace + 2 * pair * tiles + tile[None, :]
        top = finite_or_zero(tl.load(at + TILE_TOP * tiles, mask=inside, other=0.0))
        each = tl.load(at + TILE_SUM * tiles, mask=inside, other=0.0)
        total += tl.sum(relative(each, reference_of(top, scales) - references), 1)
    return tops, total, tl.sum(references, 1), allowed, fewest


@triton.jit
def log_probability(x):
    """What is said of sums of powers as a log-probability, float64: they are off by up to 6e-7, and cannot tell what is
    nearer to 0 than that, or above it, from 0.
    """
    return tl.where(x > -6e-7, 0.0, x)


@triton.jit
def pick(x, INDEX: tl.constexpr):
    """An element of a short vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == INDEX, x, 0.0))


@triton.jit
def relative(sums, exponent):
    """A sum in units of 2^-exponent, float64. Where nothing was summed there is no exponent to speak of."""
    return tl.where(sums == 0, 0.0, sums.to(tl.float64) * tl.exp2(exponent))


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

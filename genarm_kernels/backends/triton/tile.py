"""Pass 1, which reads all the logits: z of a tile, and its summaries."""

import triton
import triton.language as tl

from .arguments import TEMPERATURE, parameter, rows_of, scale_of, weights_of
from .board import GROUP, GROUP_SUM, GROUP_TOP, GROUPS, TILE, TILE_SUM, TILE_TOP, allowed_of, groups_of
from .numbers import INF, LOG2E, finite_or_zero, is_near, lowest_of, power, power_near

TOGETHER = tl.constexpr(3)  # operands whose loads are in flight at once; for all of 9 there are no registers


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


# ---- A tile's summaries --------------------------------------------------------------------------------------------


@triton.jit
def _store(workspace, tiles, tile, top, total, allowed, OPERANDS: tl.constexpr):
    tl.store(workspace + TILE_TOP * tiles + tile, top)
    tl.store(workspace + TILE_SUM * tiles + tile, total)
    tl.store(allowed_of(workspace, tiles, OPERANDS) + tile, allowed)


@triton.jit
def _store_operand(workspace, tiles, tile, i, top, total):
    tl.store(workspace + (2 * (1 + i) + TILE_TOP) * tiles + tile, top)
    tl.store(workspace + (2 * (1 + i) + TILE_SUM) * tiles + tile, total)


@triton.jit
def _store_groups(workspace, tiles, tile, tops, sums, OPERANDS: tl.constexpr):
    group = tile * GROUPS + tl.arange(0, GROUPS)
    tl.store(groups_of(workspace, tiles, OPERANDS, GROUP_TOP) + group, tops)
    tl.store(groups_of(workspace, tiles, OPERANDS, GROUP_SUM) + group, sums)


@triton.jit
def _token_by_token(
    x_rows,
    row_weights,
    mask_row,
    mask_stride,
    masked,
    tile,
    vocab,
    scale,
    workspace,
    tiles,
    OPERANDS: tl.constexpr,
    LOGPROBS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """A tile's summaries, whatever its logits and its mask: group by group, once for the tops and once for the sums.

    This is a loop, not a block: unrolled beside the usual path it took 229 registers per thread in place of 128.
    """
    lane = tl.arange(0, GROUPS)
    groups = tl.minimum(tl.cdiv(vocab - tile * TILE, GROUP), GROUPS)
    tops = tl.full([GROUPS], -INF, tl.float32)
    sums = tl.zeros([GROUPS], tl.float32)
    allowed = tl.full([], 0, tl.int32)
    spoilt = tl.full([], 0, tl.int32)
    top = tl.full([], 0, tl.float32)
    for step in range(2 * groups):
        v = tile * TILE + (step % groups) * GROUP + tl.arange(0, GROUP)
        inside = v < vocab
        may = inside & in_mask(mask_row, mask_stride, masked, v, v)
        z, spoils = combine(load(x_rows, v, inside, 0, OPERANDS), row_weights, may, OPERANDS)
        if step < groups:
            tops = tl.where(lane == step, tl.max(z), tops)
            top = finite_or_zero(tl.max(tops))
            allowed += tl.sum((z > -INF).to(tl.int32))
            spoilt = tl.maximum(spoilt, tl.max(spoils.to(tl.int32)))
        else:
            sums = tl.where(lane == step - groups, tl.sum(power(z, top, scale)), sums)
    _store(workspace, tiles, tile, tl.max(tops), tl.sum(sums), tl.where(spoilt > 0, -1, allowed), OPERANDS)
    if FILTERED:
        _store_groups(workspace, tiles, tile, tops, sums, OPERANDS)
    if LOGPROBS:
        log2e = tl.full([], LOG2E, tl.float32)
        for i in tl.static_range(OPERANDS):
            own_top = tl.full([], -INF, tl.float32)
            own_sum = tl.full([], 0, tl.float32)
            for step in range(2 * groups):
                v = tile * TILE + (step % groups) * GROUP + tl.arange(0, GROUP)
                x = tl.load(x_rows[i] + v, mask=v < vocab, other=-INF).to(tl.float32)
                if step < groups:
                    own_top = tl.maximum(own_top, tl.max(x))
                else:
                    own_sum += tl.sum(power(x, finite_or_zero(own_top), log2e))
            _store_operand(workspace, tiles, tile, i, own_top, own_sum)


@triton.jit
def tile_pass(
    x_ptrs,
    x_strides,
    weights,
    numbers,
    row_ptrs,
    row_strides,
    given,
    mask_ptr,
    mask_strides,
    masked,
    vocab,
    workspace_ptr,
    workspace_stride,
    OPERANDS: tl.constexpr,
    LOGPROBS: tl.constexpr,
    FILTERED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A tile's largest z, its sum of exponentials, its allowed tokens; with log-probabilities each operand's own
    largest and sum, with filters each group's.

    Grid (B T,): a program reads its tile once, (1 + N) TILE elements, and writes some words. A program is one warp, so
    that every sum stays within it, without a barrier, and a row takes the whole GPU at B = 1. There are 2 + N
    exponentials per token.
    """
    tiles = tl.cdiv(vocab, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x_rows = rows_of(x_ptrs, x_strides, row, OPERANDS, ALIGNED)
    mask_row = mask_ptr + row * mask_strides[0]
    row_weights = weights_of(row, weights, row_ptrs, row_strides, given, OPERANDS)
    scale = scale_of(parameter(row, numbers[0], row_ptrs, row_strides, given, TEMPERATURE))
    workspace = workspace_ptr + row * workspace_stride
    # [GROUPS, 16, 8]: 8 tokens are one 16-byte load of 16-bit logits, and one byte of the mask.
    v8 = tile * TILE + tl.arange(0, GROUPS)[:, None, None] * GROUP + tl.arange(0, GROUP // 8)[None, :, None] * 8
    v = v8 + tl.arange(0, 8)[None, None, :]

    usual = (tile + 1) * TILE <= vocab  # bounds would keep loads from being vectors
    if usual:
        # 1. One read, some operands at a time: z, and with log-probabilities each operand's own summary.
        z = tl.zeros([GROUPS, GROUP // 8, 8], tl.float32)
        own_tops = ()
        own_sums = ()
        log2e = tl.full([], LOG2E, tl.float32)
        for begin in tl.static_range(0, OPERANDS, TOGETHER):
            logits = load(x_rows, v, None, begin, min(begin + TOGETHER, OPERANDS))
            for i in tl.static_range(begin, min(begin + TOGETHER, OPERANDS)):
                x = logits[i - begin].to(tl.float32)
                z = tl.fma(x, row_weights[i], z)
                usual = usual & (tl.min(in_use(x, row_weights[i])) > lowest_of(logits[i - begin]))
                if LOGPROBS:
                    top = tl.max(x)
                    own_tops = own_tops + (top,)
                    own_sums = own_sums + (tl.sum(power_near(x, top, log2e)),)
                    usual = usual & is_near(top, log2e)
        # 2. A z that is not finite, or an operand that is not, makes this sum NaN.
        top = tl.max(z)
        usual = usual & (tl.sum(z * 0.0) == 0) & is_near(top, scale)
        if masked > 0:
            may = in_mask(mask_row, mask_strides[1], masked, v, v8)
            usual = usual & (tl.min(may.to(tl.int32)) > 0)
        # 3. The summaries.
        if LOGPROBS:
            for i in tl.static_range(OPERANDS):
                _store_operand(workspace, tiles, tile, i, own_tops[i], own_sums[i])
        if usual:
            if FILTERED:
                tops = tl.max(tl.max(z, 2), 1)
                sums = tl.sum(tl.sum(power_near(z, top, scale), 2), 1)
                total = tl.sum(sums)
                _store_groups(workspace, tiles, tile, tops, sums, OPERANDS)
            else:
                total = tl.sum(power_near(z, top, scale))
            _store(workspace, tiles, tile, top, total, TILE, OPERANDS)
    if usual == 0:
        _token_by_token(
            x_rows,
            row_weights,
            mask_row,
            mask_strides[1],
            masked,
            tile,
            vocab,
            scale,
            workspace,
            tiles,
            OPERANDS,
            LOGPROBS,
            FILTERED,
        )

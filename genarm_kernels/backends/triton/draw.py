"""Pass 2: from the tiles' summaries to the token and its log-probabilities."""

import triton
import triton.language as tl

from .arguments import (
    MIN_P,
    POSITION,
    SEED,
    SEED_STEP,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    parameter,
    rows_of,
    scale_of,
    weights_of,
)
from .board import GROUP_WEIGHT, GROUPS, TILE, TILE_SUM, TILE_TOP, groups_of
from .filter import filter_row
from .numbers import (
    INF,
    LN2,
    LOG2E,
    MAX_FLOAT,
    NAN,
    finite_or_zero,
    log_probability,
    power,
    race_time,
    reference_of,
    relative,
    token_uniform,
)
from .row import merge, pick, z_of

TILES = tl.constexpr(256)  # tiles at a time, one per thread: V up to 262,144 is one round


@triton.jit
def _race(
    workspace, tiles, scale, reference, seed, position, by_groups, OPERANDS: tl.constexpr, FILTERED: tl.constexpr
):
    """The tile whose Gumbel-perturbed log-mass is the largest, the first of equals."""
    best = tl.full([], INF, tl.float64)
    winner = tl.full([], 0, tl.int32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        tops = finite_or_zero(tl.load(workspace + TILE_TOP * tiles + tile, mask=tile < tiles, other=0.0))
        sums = tl.load(workspace + TILE_SUM * tiles + tile, mask=tile < tiles, other=0.0)
        weight = relative(sums, reference_of(tops, scale) - reference)
        if FILTERED:
            if by_groups:
                group = tile[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
                weights_ptr = groups_of(workspace, tiles, OPERANDS, GROUP_WEIGHT)
                each = tl.load(weights_ptr + group, mask=tile[:, None] < tiles, other=0.0)
                weight = tl.sum(each.to(tl.float64), 1)
        time = tl.where(weight > 0, race_time(seed, position, tile, weight), INF)
        soonest = tl.min(time)
        first = tl.min(tl.where(time == soonest, tile, 0x7FFFFFFF))
        winner = tl.where(soonest < best, first, winner)
        best = tl.minimum(best, soonest)
    return winner


@triton.jit
def _first_tile_of(workspace, tiles, top):
    winner = tl.full([], 0x7FFFFFFF, tl.int32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        tops = tl.load(workspace + TILE_TOP * tiles + tile, mask=tile < tiles, other=-INF)
        winner = tl.minimum(winner, tl.min(tl.where(tops == top, tile, 0x7FFFFFFF)))
    return winner


@triton.jit
def row_pass(
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
    token_ptr,
    logprob_ptr,
    log_mass_ptr,
    kept_ptr,
    base_logprob_ptr,
    arm_logprobs_ptr,
    status_ptr,
    logprobs,
    OPERANDS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """The row's token and everything said about it.

    Grid (B,). Without filters it reads the summaries (some words per tile) and one tile of logits. Filters read those
    groups again whose largest reaches a bound found in the summaries. A row whose candidates overflow their buffer is
    read round by round by the same program, which decides that by itself: nobody waits, nothing more is launched.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(vocab, TILE)
    workspace = workspace_ptr + row * workspace_stride
    x_rows = rows_of(x_ptrs, x_strides, row, OPERANDS, False)
    row_weights = weights_of(row, weights, row_ptrs, row_strides, given, OPERANDS)
    source = (x_rows, row_weights, mask_ptr + row * mask_strides[0], mask_strides[1], masked, vocab)
    temperature = parameter(row, numbers[0], row_ptrs, row_strides, given, TEMPERATURE)
    top_p = parameter(row, numbers[1], row_ptrs, row_strides, given, TOP_P)
    min_p = parameter(row, numbers[2], row_ptrs, row_strides, given, MIN_P)
    top_k = parameter(row, numbers[3], row_ptrs, row_strides, given, TOP_K)
    seed = parameter(row, numbers[4] + row * SEED_STEP, row_ptrs, row_strides, given, SEED)
    position = parameter(row, numbers[5], row_ptrs, row_strides, given, POSITION)

    # 1. The row as a whole.
    valid = (temperature >= 0) & (temperature < INF) & (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    for i in tl.static_range(OPERANDS):
        valid = valid & (tl.abs(row_weights[i]) < INF)
    scale = scale_of(temperature)
    ROWS: tl.constexpr = triton.next_power_of_2(1 + OPERANDS)
    pairs = tl.where(logprobs != 0, 1 + OPERANDS, 1)
    tops, masses, references, allowed, fewest = merge(workspace, tiles, scale, pairs, OPERANDS, ROWS, TILES)
    top, mass, reference = pick(tops, 0), pick(masses, 0), pick(references, 0)
    status = tl.where((fewest < 0) | (valid == 0), 1, tl.where(allowed == 0, 2, 0))
    tl.store(status_ptr + row, status)
    if status != 0:
        tl.store(token_ptr + row, -1)
        tl.store(kept_ptr + row, 0)
        if logprobs != 0:
            tl.store(logprob_ptr + row, NAN)
            tl.store(log_mass_ptr + row, NAN)
            tl.store(base_logprob_ptr + row, NAN)
            for i in tl.static_range(OPERANDS - 1):
                tl.store(arm_logprobs_ptr + row * (OPERANDS - 1) + i, NAN)
        return
    greedy = temperature == 0

    # 2. What is kept, and the tile that wins.
    threshold = tl.full([], -MAX_FLOAT, tl.float32)
    kept = allowed
    kept_mass = mass
    if greedy:
        winner = _first_tile_of(workspace, tiles, top)
        threshold = top
        kept = 1
    else:
        winner = tl.full([], -1, tl.int32)
        by_groups = tl.full([], False, tl.int1)
        if FILTERED:
            top_k = tl.where(top_k < vocab, top_k, 0)
            by_groups = (top_k > 0) | (top_p < 1) | (min_p > 0)
            if by_groups:
                threshold, kept, kept_mass, winner = filter_row(
                    workspace,
                    tiles,
                    source,
                    vocab,
                    top,
                    mass,
                    scale,
                    reference,
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    seed,
                    position,
                    OPERANDS,
                )
        if winner < 0:
            winner = _race(workspace, tiles, scale, reference, seed, position, by_groups, OPERANDS, FILTERED)

    # 3. The token, by inverse CDF in the tile that won, which is read again.
    offset = tl.arange(0, TILE)
    v = winner * TILE + offset
    z = z_of(source, v, v < vocab, OPERANDS)
    keep = z >= threshold
    p = tl.where(keep, power(z, tl.max(z), scale), 0.0).to(tl.float64)
    cdf = tl.cumsum(p, 0)
    passed = tl.sum((cdf <= token_uniform(seed, position) * tl.max(cdf)).to(tl.int32))
    drawn = tl.minimum(passed, tl.max(tl.where(p > 0, offset, 0)))
    drawn = tl.where(greedy, tl.min(tl.where(z == top, offset, TILE)), drawn)
    token = winner * TILE + drawn
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(kept_ptr + row, kept)

    # 4. Its log-probabilities.
    if logprobs != 0:
        token_z = tl.max(tl.where(offset == drawn, z, -INF)).to(tl.float64)
        exact_temperature = tl.where(greedy, 1.0, temperature).to(tl.float64)
        top64 = top.to(tl.float64)
        log_mass_of_row = tl.log(mass) + (reference - top64 * scale.to(tl.float64)) * LN2
        logprob = log_probability((token_z - top64) / exact_temperature - log_mass_of_row)
        log_mass = tl.where((kept < allowed) & (kept_mass < mass), tl.log(kept_mass / mass), 0.0)
        tl.store(logprob_ptr + row, logprob.to(tl.float32))
        tl.store(log_mass_ptr + row, tl.where(kept == 1, logprob, tl.maximum(log_mass, logprob)).to(tl.float32))
        for i in tl.static_range(OPERANDS):
            own_mass = pick(masses, 1 + i)
            x = tl.load(x_rows[i] + token).to(tl.float64)
            own_logprob = log_probability((x * LOG2E - pick(references, 1 + i)) * LN2 - tl.log(own_mass))
            own_logprob = tl.where(own_mass < INF, own_logprob, NAN)
            if i == 0:
                tl.store(base_logprob_ptr + row, own_logprob.to(tl.float32))
            else:
                tl.store(arm_logprobs_ptr + row * (OPERANDS - 1) + i - 1, own_logprob.to(tl.float32))

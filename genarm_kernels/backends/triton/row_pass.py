"""Pass 2: from the tiles' summaries to the token, and what the filters read again."""

import triton
import triton.language as tl

from .common import (
    CANDIDATES,
    GROUP,
    GROUP_LIST,
    GROUP_SUM,
    GROUP_TOP,
    GROUP_WEIGHT,
    GROUPS,
    INF,
    LN2,
    LOG2E,
    MAX_FLOAT,
    MIN_P,
    NAN,
    POSITION,
    SEED,
    SEED_STEP,
    TEMPERATURE,
    TILE,
    TILE_SUM,
    TILE_TOP,
    TOP_K,
    TOP_P,
    as_ints,
    candidates_of,
    combine,
    finite_or_zero,
    from_ordered_key,
    groups_of,
    in_mask,
    load,
    log_probability,
    merge,
    ordered_key,
    parameter,
    pick,
    power,
    race_time,
    reference_of,
    relative,
    rows_of,
    scale_of,
    token_uniform,
    weights_of,
)

TILES = tl.constexpr(256)  # tiles at a time, one a thread: V up to 262,144 is one round
LISTED = tl.constexpr(1024)  # groups at a time where their summaries are read
REACH = tl.constexpr(32)  # candidates at a time that all others are compared with
BOUNDS = tl.constexpr(16)  # thresholds at a time over the groups' summaries
STEPS = tl.constexpr(8)  # and over tokens
FEW = tl.constexpr(256)  # candidates that are compared each with each


# ---- Which groups may hold a kept token ----------------------------------------------------------------------------


@triton.jit
def _bound(workspace, tiles, low, top, target, scale, reference, BY_MASS: tl.constexpr, OPERANDS: tl.constexpr):
    """A bound below which no token is kept, from the groups' summaries, at least `low`.

    Top-k: at least k groups have a token, their largest, above it. Top-p: what lies below it, at most, is lighter than
    what top-p drops; a group whose largest is below counts whole, another one with the rest of its sum, and with no
    more than its other tokens can weigh.
    """
    groups = tiles * GROUPS
    tops_ptr = groups_of(workspace, tiles, OPERANDS, GROUP_TOP)
    sums_ptr = groups_of(workspace, tiles, OPERANDS, GROUP_SUM)
    high = top
    at_low = tl.full([], INF, tl.float32)
    if BY_MASS == 0:
        reached = tl.zeros([LISTED], tl.float32)
        least = tl.full([LISTED], INF, tl.float32)
        for begin in range(0, groups, LISTED):
            group = begin + tl.arange(0, LISTED)
            tops = tl.load(tops_ptr + group, mask=group < groups, other=-INF)
            reached += (tops > -INF).to(tl.float32)
            least = tl.minimum(least, tl.where(tops > -INF, tops, INF))
        at_low = tl.sum(reached)
        low = tl.where(at_low >= target, tl.min(least), low)
    step = (tl.arange(0, BOUNDS) + 1).to(tl.float32) / (BOUNDS + 1)
    for _ in range(2 if BY_MASS else 8):
        # Enough groups more than k, and half a round's thresholds apart, cost less to read than another round.
        if (low < high) & (at_low > 1.25 * target + 8):
            bound = low + (high * 0.5 - low * 0.5) * (2 * step)
            weight = tl.zeros([BOUNDS], tl.float32)
            for begin in range(0, groups, LISTED):
                group = begin + tl.arange(0, LISTED)
                tops = tl.load(tops_ptr + group, mask=group < groups, other=-INF)
                above = tops[None, :] >= bound[:, None]
                if BY_MASS:
                    sums = tl.load(sums_ptr + group, mask=group < groups, other=0.0)
                    tile_tops = tl.load(workspace + TILE_TOP * tiles + group // GROUPS, mask=group < groups, other=0.0)
                    shift = reference_of(finite_or_zero(tile_tops), scale) - reference
                    sums = relative(sums, shift).to(tl.float32)
                    rest = tl.maximum(sums - power(tops, top, scale), 0.0)
                    most = (GROUP - 1) * power(bound, top, scale)
                    below = tl.where(above, tl.minimum(rest[None, :], most[:, None]), sums[None, :])
                    weight += tl.sum(below, 1)
                else:
                    weight += tl.sum(above.to(tl.float32), 1)
            good = (weight <= target) if BY_MASS else (weight >= target)
            low = tl.max(tl.where(good, bound, low))
            high = tl.min(tl.where(good, high, bound))
            if BY_MASS == 0:
                at_low = tl.min(tl.where(good, weight, at_low))
    return low


@triton.jit
def _list_groups(workspace, tiles, low, OPERANDS: tl.constexpr):
    """Lists the groups that hold a z >= low; returns how many they are."""
    groups = tiles * GROUPS
    tops_ptr = groups_of(workspace, tiles, OPERANDS, GROUP_TOP)
    list_ptr = as_ints(groups_of(workspace, tiles, OPERANDS, GROUP_LIST))
    listed = tl.full([], 0, tl.int32)
    tl.debug_barrier()
    for begin in range(0, groups, LISTED):
        group = begin + tl.arange(0, LISTED)
        reached = tl.load(tops_ptr + group, mask=group < groups, other=-INF) >= low
        place = listed + tl.cumsum(reached.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, group, mask=reached)
        listed += tl.sum(reached.to(tl.int32))
    tl.debug_barrier()
    return listed


@triton.jit
def _z_of(source, v, inside, OPERANDS: tl.constexpr):
    """z of the tokens `v` out of `source`, a row's operands, their weights, its mask, the vocabulary."""
    x_rows, row_weights, mask_row, mask_stride, masked, vocab = source
    inside = inside & (v < vocab)
    may = inside & in_mask(mask_row, mask_stride, masked, v, v)
    z, _ = combine(load(x_rows, v, inside, 0, OPERANDS), row_weights, may, OPERANDS)
    return z


@triton.jit
def _read_groups(workspace, tiles, begin, listed, source, OPERANDS: tl.constexpr, COUNT: tl.constexpr):
    """z of COUNT listed groups from `begin` on, and their tokens."""
    list_ptr = as_ints(groups_of(workspace, tiles, OPERANDS, GROUP_LIST))
    place = begin + tl.arange(0, COUNT // 2)[:, None, None] * 2 + tl.arange(0, 2)[None, :, None]
    group = tl.load(list_ptr + place, mask=place < listed, other=0)
    v = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    return _z_of(source, v, place < listed, OPERANDS), v


@triton.jit
def _collect(workspace, tiles, low, high, source, OPERANDS: tl.constexpr, READ: tl.constexpr):
    """Moves the z in [low, high] and their tokens to the buffer. Returns how many they are, or some number that the
    buffer does not hold, and how many groups are listed.
    """
    listed = _list_groups(workspace, tiles, low, OPERANDS)
    z_ptr = candidates_of(workspace, tiles, OPERANDS)
    token_ptr = as_ints(z_ptr) + CANDIDATES
    moved = tl.full([], 0, tl.int32)
    for begin in range(0, listed, READ):
        if moved <= CANDIDATES:
            z, v = _read_groups(workspace, tiles, begin, listed, source, OPERANDS, READ)
            z = tl.reshape(z, [READ * GROUP])
            stays = (z >= low) & (z <= high)
            place = moved + tl.cumsum(stays.to(tl.int32), 0) - 1
            fits = stays & (place < CANDIDATES)
            tl.store(z_ptr + place, z, mask=fits)
            tl.store(token_ptr + place, tl.reshape(v, [READ * GROUP]), mask=fits)
            moved += tl.sum(stays.to(tl.int32))
    tl.debug_barrier()
    return moved, listed


# ---- Few candidates: each against each -----------------------------------------------------------------------------


@triton.jit
def _few(workspace, tiles, count, top, scale, mass, top_k, top_p, min_z, seed, position, OPERANDS: tl.constexpr):
    """The rules as they are written: what stands above a token is counted and weighed. One candidate a lane.

    Returns the threshold, how many tokens are kept, their mass and the tile that wins the race.
    """
    z_ptr = candidates_of(workspace, tiles, OPERANDS)
    token_ptr = as_ints(z_ptr) + CANDIDATES
    lane = tl.arange(0, FEW)
    z = tl.load(z_ptr + lane, mask=lane < count, other=-INF)
    tile = tl.load(token_ptr + lane, mask=lane < count, other=0) // TILE
    p = power(z, top, scale)
    number = tl.zeros([FEW], tl.int32)
    weight = tl.zeros([FEW], tl.float64)
    for begin in range(0, count, REACH):
        other = begin + tl.arange(0, REACH)
        other_z = tl.load(z_ptr + other, mask=other < count, other=-INF)
        above = other_z[:, None] > z[None, :]
        number += tl.sum(above.to(tl.int32), 0)
        weight += tl.sum(tl.where(above, power(other_z, top, scale)[:, None], 0.0), 0).to(tl.float64)
    in_top_k = number < tl.where(top_k > 0, top_k, FEW)
    if top_k > 0:
        mass = tl.sum(tl.where(in_top_k, p, 0.0).to(tl.float64))
    keep = in_top_k & (weight < tl.where(top_p < 1, top_p * mass, INF)) & (z >= min_z)
    keep = (lane < count) & (keep | (z == top))
    threshold = tl.min(tl.where(keep, z, INF))

    weight = tl.zeros([FEW], tl.float64)
    for begin in range(0, count, REACH):
        other = begin + tl.arange(0, REACH)
        other_z = tl.load(z_ptr + other, mask=other < count, other=-INF)
        other_tile = tl.load(token_ptr + other, mask=other < count, other=-1) // TILE
        with_it = (other_z >= threshold)[:, None] & (other_tile[:, None] == tile[None, :])
        weight += tl.sum(tl.where(with_it, power(other_z, top, scale)[:, None], 0.0), 0).to(tl.float64)
    time = tl.where(keep & (weight > 0), race_time(seed, position, tile, weight), INF)
    winner = tl.min(tl.where(time == tl.min(time), tile, 0x7FFFFFFF))
    return threshold, tl.sum(keep.to(tl.int32)), tl.sum(tl.where(keep, p, 0.0).to(tl.float64)), winner


# ---- Any number of them: a search ----------------------------------------------------------------------------------


@triton.jit
def _search(
    workspace, tiles, low, top, target, by_mass, scale, count, source, OPERANDS: tl.constexpr, READ: tl.constexpr
):
    """The largest z for which the z's from there on weigh `target` (p if by_mass, otherwise 1 each); `low` if none.

    Each round weighs what lies above STEPS thresholds, alternately even in z and in ordered keys, which bounds the
    rounds, and goes on between the two that the target lies between. `count` candidates from `low` on are in the
    buffer; where those are more than it holds the logits are read again, round by round, until what lies between fits.
    """
    SEARCHED: tl.constexpr = READ // 2  # more is held in registers here
    z_ptr = candidates_of(workspace, tiles, OPERANDS)
    buffered = count <= CANDIDATES
    listed = tl.full([], 0, tl.int32)
    low_key = ordered_key(low)
    high_key = ordered_key(top)
    above = target * 0.0  # what is heavier than high_key; float64
    even = tl.full([], 1, tl.int32)
    step = (tl.arange(0, STEPS) + 1).to(tl.int64)
    while low_key < high_key:
        low = from_ordered_key(low_key)
        high = from_ordered_key(high_key)
        if buffered == 0:
            count, listed = _collect(workspace, tiles, low, high, source, OPERANDS, READ)
            buffered = count <= CANDIDATES
        even_in_z = low.to(tl.float64) + (high.to(tl.float64) - low.to(tl.float64)) * (step.to(tl.float64) / STEPS)
        span = high_key.to(tl.int64) - low_key.to(tl.int64)
        even_in_keys = low_key + ((span * step + STEPS - 1) // STEPS).to(tl.int32)
        keys = tl.where(even != 0, ordered_key(even_in_z.to(tl.float32)), even_in_keys)
        keys = tl.minimum(tl.maximum(keys, low_key + 1), high_key)
        thresholds = from_ordered_key(keys)

        weight = tl.zeros([STEPS, 2, GROUP], tl.float64)
        least = tl.full([SEARCHED // 2, 2, GROUP], INF, tl.float32)
        most = tl.full([SEARCHED // 2, 2, GROUP], -INF, tl.float32)
        size = tl.where(buffered, count, listed * GROUP)
        for begin in range(0, size, SEARCHED * GROUP):
            if buffered:
                place = (
                    begin
                    + tl.arange(0, SEARCHED // 2)[:, None, None] * (2 * GROUP)
                    + tl.arange(0, 2)[None, :, None] * GROUP
                    + tl.arange(0, GROUP)[None, None, :]
                )
                z = tl.load(z_ptr + place, mask=place < count, other=-INF)
            else:
                z, _ = _read_groups(workspace, tiles, begin // GROUP, listed, source, OPERANDS, SEARCHED)
            between = (z >= low) & (z <= high)
            least = tl.minimum(least, tl.where(between, z, INF))
            most = tl.maximum(most, tl.where(between, z, -INF))
            each = tl.where(between, tl.where(by_mass, power(z, top, scale), 1.0), 0.0)
            counts = z[None, :, :, :] >= thresholds[:, None, None, None]
            weight += tl.sum(tl.where(counts, each[None, :, :, :], 0.0), 1).to(tl.float64)
        at = above + tl.sum(tl.sum(weight, 2), 1)
        reached = at >= target
        above = tl.max(tl.where(reached, above, at))
        new_low = tl.max(tl.where(reached, keys, low_key))
        new_high = tl.min(tl.where(reached, high_key, keys - 1))
        # Between two tokens' z there is nothing to look for.
        low_key = tl.maximum(new_low, ordered_key(tl.min(tl.min(tl.min(least, 2), 1), 0)))
        high_key = tl.minimum(new_high, ordered_key(tl.max(tl.max(tl.max(most, 2), 1), 0)))
        even = 1 - even
    return from_ordered_key(low_key)


@triton.jit
def _weigh_kept(workspace, tiles, threshold, top, scale, source, OPERANDS: tl.constexpr, READ: tl.constexpr):
    """Mass of the z >= threshold, group by group into the workspace; returns how many they are and their mass."""
    groups = tiles * GROUPS
    weights_ptr = groups_of(workspace, tiles, OPERANDS, GROUP_WEIGHT)
    for begin in range(0, groups, LISTED):
        group = begin + tl.arange(0, LISTED)
        tl.store(weights_ptr + group, tl.zeros([LISTED], tl.float32), mask=group < groups)
    listed = _list_groups(workspace, tiles, threshold, OPERANDS)
    kept = tl.full([], 0, tl.int32)
    mass = tl.zeros([READ // 2, 2], tl.float64)
    for begin in range(0, listed, READ):
        z, v = _read_groups(workspace, tiles, begin, listed, source, OPERANDS, READ)
        keep = z >= threshold
        weight = tl.sum(tl.where(keep, power(z, top, scale), 0.0), 2)
        group = tl.max(v, 2) // GROUP
        place = begin + tl.arange(0, READ // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(weights_ptr + group, weight, mask=place < listed)
        kept += tl.sum(tl.sum(tl.sum(keep.to(tl.int32), 2), 1), 0)
        mass += weight.to(tl.float64)
    tl.debug_barrier()
    return kept, tl.sum(tl.sum(mass, 1), 0)


# ---- The filters ---------------------------------------------------------------------------------------------------


@triton.jit
def _round_up(x):
    """The smallest float32 from the float64 x on; the lowest finite one where x is below all."""
    y = tl.maximum(x, -MAX_FLOAT).to(tl.float32)
    return tl.where(y.to(tl.float64) < x, from_ordered_key(ordered_key(y) + 1), y)


@triton.jit
def _filter(
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
    OPERANDS: tl.constexpr,
):
    """The threshold from which on tokens are kept, how many they are and their mass; and the tile that wins the race,
    or -1: it is to be run on the groups' weights.
    """
    READ: tl.constexpr = 32 if OPERANDS < 4 else 16 if OPERANDS < 8 else 8  # groups read at a time; more would spill
    share = top_p.to(tl.float64)
    top64 = top.to(tl.float64)
    spread = temperature.to(tl.float64)  # of z for a factor e in p
    lowest = tl.full([], -MAX_FLOAT, tl.float32)

    # 1. Below this no token is kept.
    low = lowest
    min_z = lowest
    if min_p > 0:
        # A difference of 2^-54 is where a p rounds to the largest, whose share 1 is.
        log_share = tl.minimum(tl.log(min_p.to(tl.float64)), -5.551115123125783e-17)
        min_z = tl.minimum(_round_up(top64 + spread * log_share), top)
    if top_k > 0:
        if top_k <= tiles * GROUPS:
            low = _bound(workspace, tiles, low, top, top_k.to(tl.float32), scale, reference, False, OPERANDS)
    elif top_p < 1:
        # Tokens of less than (1 - top_p) / V each are lighter together than what top-p drops.
        dropped = 0.99 * (1.0 - share) * mass
        low = tl.minimum(_round_up(top64 + spread * tl.log(dropped / vocab)), top)
        low = _bound(workspace, tiles, low, top, dropped.to(tl.float32), scale, reference, True, OPERANDS)
    if (top_k <= 0) | (top_p >= 1):
        low = tl.maximum(low, min_z)

    # 2. What is above it.
    count, _ = _collect(workspace, tiles, low, top, source, OPERANDS, READ)
    if count <= FEW:
        threshold, kept, kept_mass, winner = _few(
            workspace, tiles, count, top, scale, mass, top_k, share, min_z, seed, position, OPERANDS
        )
    else:
        threshold = low
        if top_k > 0:
            target = top_k.to(tl.float64)
            threshold = _search(workspace, tiles, threshold, top, target, False, scale, count, source, OPERANDS, READ)
            if top_p < 1:
                _, mass = _weigh_kept(workspace, tiles, threshold, top, scale, source, OPERANDS, READ)
                count = CANDIDATES + 1  # that search may have used the buffer
        if top_p < 1:
            threshold = _search(
                workspace, tiles, threshold, top, share * mass, True, scale, count, source, OPERANDS, READ
            )
        threshold = tl.maximum(tl.where(top_p == 0, top, threshold), min_z)
        kept, kept_mass = _weigh_kept(workspace, tiles, threshold, top, scale, source, OPERANDS, READ)
        winner = tl.full([], -1, tl.int32)
    return threshold, kept, kept_mass, winner


# ---- The row -------------------------------------------------------------------------------------------------------


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

    Grid (B,). Without filters it reads the summaries (some words a tile) and one tile of logits. Filters read again the
    groups whose largest reaches a bound found in the summaries; a row whose candidates overflow their buffer is read
    round by round by the same program, which decides that by itself: nobody waits, nothing more is launched.
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
                threshold, kept, kept_mass, winner = _filter(
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
    z = _z_of(source, v, v < vocab, OPERANDS)
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

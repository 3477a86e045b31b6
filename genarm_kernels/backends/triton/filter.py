"""Pass 2 with filters: the threshold from which on tokens are kept, and the groups' masses of the kept tokens."""

import triton
import triton.language as tl

from .board import (
    CANDIDATES,
    GROUP,
    GROUP_LIST,
    GROUP_SUM,
    GROUP_TOP,
    GROUP_WEIGHT,
    GROUPS,
    TILE,
    TILE_TOP,
    as_ints,
    candidates_of,
    groups_of,
)
from .numbers import (
    INF,
    MAX_FLOAT,
    finite_or_zero,
    from_ordered_key,
    ordered_key,
    power,
    race_time,
    reference_of,
    relative,
)
from .row import z_of

LISTED = tl.constexpr(1024)  # groups at a time where their summaries are read
REACH = tl.constexpr(32)  # candidates at a time that all others are compared with
BOUNDS = tl.constexpr(16)  # thresholds at a time over the groups' summaries
STEPS = tl.constexpr(8)  # and over tokens
FEW = tl.constexpr(256)  # candidates that are compared each with each


# ---- Which groups may hold a kept token ----------------------------------------------------------------------------


@triton.jit
def _bound(workspace, tiles, low, top, target, scale, reference, BY_MASS: tl.constexpr, OPERANDS: tl.constexpr):
    """A bound from the groups' summaries, at least `low`, below which no token is kept.

    For top-k, at least k groups have a token, their largest, above it. For top-p, all that can lie below it is lighter
    than what top-p drops: a group whose largest is below the bound counts whole, and any other one with the rest of its
    sum, though with no more than its other tokens can weigh.
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
def _read_groups(workspace, tiles, begin, listed, source, OPERANDS: tl.constexpr, COUNT: tl.constexpr):
    """z of COUNT listed groups from `begin` on, and their tokens."""
    list_ptr = as_ints(groups_of(workspace, tiles, OPERANDS, GROUP_LIST))
    place = begin + tl.arange(0, COUNT // 2)[:, None, None] * 2 + tl.arange(0, 2)[None, :, None]
    group = tl.load(list_ptr + place, mask=place < listed, other=0)
    v = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    return z_of(source, v, place < listed, OPERANDS), v


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
    """The rules as they are written: what stands above a token is counted and weighed. Each lane has one candidate.

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

    Each round weighs what lies above each of STEPS thresholds and goes on between the two that the target lies between.
    The thresholds are evenly spaced in z and in ordered keys by turns, which bounds the number of rounds. `count`
    candidates from `low` on are in the buffer; where these are more than it holds, the logits are read again, round by
    round, until what lies between fits.
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
def filter_row(
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

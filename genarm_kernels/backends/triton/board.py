"""A row's summaries, in its part of the workspace: those of its tiles, and with filters those of its groups.

That part consists of segments of 4-byte words, float32 or int32: `[T]` for each result of the tile pass (`TILE_*`);
with filters `[T * GROUPS]` for each of the groups' (`GROUP_*`), and then the candidates' z and their tokens.
"""

import triton
import triton.language as tl

from ... import rng

TILE = tl.constexpr(rng.TILE)
GROUP = tl.constexpr(128)  # tokens whose largest is known: filters read groups again, not tiles
GROUPS = tl.constexpr(TILE.value // GROUP.value)
CANDIDATES = tl.constexpr(8192)  # what a row's buffer holds; more are weighed where they stand, in the logits

# A pair of segments holds largest numbers, and sums relative to their references: first of z, then of each operand by
# itself. The largest z is -inf where nothing is allowed.
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

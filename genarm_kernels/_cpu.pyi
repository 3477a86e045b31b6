"""csrc/python/cpu.cpp."""

from torch import Tensor

from .backends import compiled

TILE: int
guided_step: compiled.Step[int]
"""`place`: the threads."""
guided_log_softmax: compiled.LogSoftmax[int]

def add_low_rank(
    *,
    dtype: int,
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    rows: int,
    first: int,
    step: int,
    width: int,
    height: int,
    rank: int,
) -> None: ...
def isa() -> str | None: ...
def supported_isas() -> tuple[str, ...]: ...
def set_isa(name: str) -> None: ...

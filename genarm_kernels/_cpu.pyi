"""csrc/python/cpu.cpp."""

from typing import Any

from torch import Tensor

from .backends import compiled

TILE: int
guided_step: compiled.Step[int]
"""`place`: the threads."""
guided_log_softmax: compiled.LogSoftmax[int]

class Linear:
    def __init__(self, *, layer: dict[str, Any], operands: int) -> None: ...
    def __call__(self, *, dtype: int, x: Tensor, rows: int, tokens: int, y: Tensor, threads: int) -> None: ...

class DecoderStep:
    def __init__(self, *, decoder: dict[str, Any]) -> None: ...
    def __call__(
        self,
        *,
        tokens: Tensor,
        lengths: Tensor,
        first: int,
        rows: int,
        count: int,
        last: bool,
        logits: Tensor,
        threads: int,
    ) -> None: ...

def isa() -> str | None: ...
def supported_isas() -> tuple[str, ...]: ...
def set_isa(name: str) -> None: ...

"""csrc/python/cuda.cpp."""

from .backends import compiled, cuda

EMULATED: bool
ARCHITECTURES: str
guided_step: compiled.Step[cuda.Place]
guided_log_softmax: compiled.LogSoftmax[cuda.Place]

def make_ready() -> None: ...
def force_cluster(blocks: int) -> None: ...

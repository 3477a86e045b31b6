"""Which backends there are, which can run here, and why one cannot."""

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from ..outputs import GuidedStep
from ..parameters import Inputs, Sampling

# The plainest first: where nothing else is known, "auto" takes the last one that can run on the operands' device.
NAMES = ("reference", "cpu", "triton", "cuda")
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


class Backend(Protocol):
    """What a backend's module has. `genarm_kernels.shared_linear` knows by itself which ones have that."""

    def why_unavailable(self) -> str | None: ...
    def guided_step(self, inputs: Inputs, sampling: Sampling) -> GuidedStep: ...
    def guided_log_softmax(self, inputs: Inputs) -> Tensor: ...


if TYPE_CHECKING:
    from . import cpu, cuda, reference, triton

    _BACKENDS: tuple[Backend, ...] = (reference, cpu, triton, cuda)


@functools.cache
def why_unavailable(name: str) -> str | None:
    """None when the backend can run on this machine, otherwise the reason in words."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return "not part of this version"
    return cast(Backend, importlib.import_module(f"{__name__}.{name}")).why_unavailable()


def interpreted(name: str) -> bool:
    """Whether a CPU stands in for the GPU that the backend is for, in a test."""
    return _DEVICES.get(name) == ("cuda",) and bool(importlib.import_module(f"{__name__}.{name}").interpreted())


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, the plainest first.

    >>> "reference" in available_backends()
    True
    """
    return tuple(name for name in NAMES if why_unavailable(name) is None)


# The GPU backend that "auto" takes for up to so many rows, by measurement on an H200. None has been made yet: Triton
# until the CUDA kernels are seen to be faster (bench/results/README.md).
_FASTEST_ON_GPU = ((float("inf"), "triton"),)


@functools.cache
def _able(device_type: str) -> tuple[str, ...]:
    # What serves another device is not asked: to look at a GPU takes its memory.
    return tuple(
        name for name in NAMES if device_type in _DEVICES.get(name, (device_type,)) and not why_unavailable(name)
    )


def _auto(device_type: str, rows: int) -> str:
    able = _able(device_type)
    if device_type == "cuda":
        measured = next(name for most, name in _FASTEST_ON_GPU if rows <= most)
        if measured in able:
            return measured
    return able[-1]


def load(name: str, device_type: str, rows: int) -> Backend:
    """The module of "auto" or a named backend.

    A named backend is never replaced by another: RuntimeError when it cannot run.
    """
    return _module(_auto(device_type, rows) if name == "auto" else name, device_type)


@functools.cache
def _module(name: str, device_type: str) -> Backend:
    reason = why_unavailable(name)
    if reason is None and not interpreted(name) and device_type not in _DEVICES.get(name, (device_type,)):
        reason = f"the operands are on {device_type!r}"
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}; available here: {', '.join(available_backends())}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))

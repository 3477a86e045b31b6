"""The CUDA kernels (csrc/cuda) as a backend: hands tensors' addresses and the current stream to `_cuda`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..outputs import GuidedStep
from ..parameters import Inputs, Sampling
from . import compiled

_import_error: ImportError | None = None
try:
    from .. import _cuda
except ImportError as error:
    _import_error = error

T = TypeVar("T", Inputs, Sampling)


class Place(NamedTuple):
    """Where a call runs, and how it gets so many bytes there."""

    device: int
    stream: int
    memory: Callable[[int], Tensor]


def why_unavailable() -> str | None:
    """None when the kernels are there and this machine has a GPU for them, otherwise the reason in words."""
    if _import_error is not None:
        reason = Path(__file__).parents[1] / "_cuda.error"
        return reason.read_text().strip() if reason.exists() else f"the kernels cannot be loaded: {_import_error}"
    if _cuda.EMULATED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU"
    try:
        _cuda.make_ready()
    except RuntimeError as error:
        return f"built for compute capability {_cuda.ARCHITECTURES}, this GPU or its driver cannot run it: {error}"
    return None


def interpreted() -> bool:
    """Whether an emulation on the CPU stands in for a GPU: the tests' (tests/simt)."""
    return _import_error is None and _cuda.EMULATED


def guided_step(inputs: Inputs, sampling: Sampling) -> GuidedStep:
    device = inputs.base_logits.device
    with _current(device):
        return compiled.guided_step(_cuda.guided_step, _place(device), _of_rows(inputs), _of_rows(sampling))


def guided_log_softmax(inputs: Inputs) -> Tensor:
    device = inputs.base_logits.device
    with _current(device):
        return compiled.guided_log_softmax(_cuda.guided_log_softmax, _place(device), _of_rows(inputs))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the operands' device the current one, if it is not."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(device)


def _place(device: torch.device) -> Place:
    def memory(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    if device.type != "cuda":
        return Place(0, 0, memory)
    index: int = device.index
    return Place(index, torch._C._cuda_getCurrentRawStream(index), memory)


def _of_rows(structure: T) -> T:
    """A parameter that repeats one number has stride 0, which in the C interface means a number of the host's."""
    repeated: dict[str, Any] = {
        name: value.contiguous()
        for name, value in zip(structure._fields, structure, strict=True)
        if isinstance(value, Tensor) and name != "base_logits" and value.shape[0] > 1 and value.stride(0) == 0
    }
    return structure._replace(**repeated) if repeated else structure

"""The CUDA kernels (csrc/cuda) as a backend: hands tensors' addresses and the current stream to `_cuda`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import compiled

_import_error: ImportError | None = None
try:
    from .. import _cuda
except ImportError as error:
    _import_error = error


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


def guided_step(base_logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with _current(base_logits.device):
        return compiled.guided_step(_cuda, _place(base_logits.device), base_logits, *_of_rows(args, len(base_logits)))


def guided_log_softmax(base_logits: Tensor, *args: Any) -> Tensor:
    with _current(base_logits.device):
        return compiled.guided_log_softmax(
            _cuda, _place(base_logits.device), base_logits, *_of_rows(args, len(base_logits))
        )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the operands' device the current one, if it is not."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(device)


def _place(device: torch.device) -> tuple[Any, ...]:
    """Where the call runs: device, stream, and how to get memory there."""

    def memory(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    if device.type != "cuda":
        return 0, 0, memory
    index: int = device.index
    return index, torch._C._cuda_getCurrentRawStream(index), memory


def _of_rows(args: tuple[Any, ...], rows: int) -> list[Any]:
    """A tensor that repeats one number has stride 0, which in the C interface means a number of the host's."""
    return [x.contiguous() if isinstance(x, Tensor) and x.stride(0) == 0 and rows > 1 else x for x in args]

"""`run_concurrently`: independent forward passes side by side on one GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def run_concurrently(*forwards: Callable[[], Any]) -> list[Any]:
    """Calls each of `forwards` on a CUDA stream of its own and returns their results in order.

    The streams are forked from the current device's current stream and joined to it by events: the callables see all
    work queued before, work queued after waits for all of them, and nothing waits on the host. Capturable in a CUDA
    graph. Tensors in a result (in any nesting that torch's pytree knows) are recorded on the current stream, so that
    their memory is not handed out again while it reads them. Where no CUDA is in use the callables run in turn. The
    first exception ends the round and is raised once every stream has been joined.

    >>> run_concurrently(lambda: 1 + 1, lambda: torch.zeros(2).sum().item())
    [2, 0.0]
    """
    if not torch.cuda.is_initialized():
        return [forward() for forward in forwards]
    current = torch.cuda.current_stream()
    results: list[Any] = []
    forked: list[torch.cuda.Stream] = []
    try:
        for index, forward in enumerate(forwards):
            forked.append(_stream(current.device, index))
            forked[-1].wait_stream(current)
            with torch.cuda.stream(forked[-1]):
                results.append(forward())
    finally:  # also after an exception: a graph capture with an unjoined stream could not be ended
        for stream in forked:
            current.wait_stream(stream)
    for tensor in pytree.tree_leaves(results):
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(current)
    return results


@functools.cache
def _stream(device: torch.device, index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""What surrounds a call of an operation: the thread's floating-point mode, and the end of the interpreter."""

import atexit
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_SMALLEST = 2.0**-1022  # of the normal numbers: a half of it is denormal

_inside: set[int] = set()  # the threads in which a call runs
_ending: int | None = None  # the thread that ends the interpreter, once it does
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inside.clear)  # the parent's threads are not there


def counting_denormals(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call, for which denormal numbers count although `torch.set_flush_denormal` has set them to be flushed.

    On this thread, that is: those of torch, to which it hands shares of a large tensor, keep their own mode.
    """
    if torch.compiler.is_compiling() or _SMALLEST / 2 != 0:
        return call(*args, **kwargs)
    torch.set_flush_denormal(False)
    try:
        return call(*args, **kwargs)
    finally:
        torch.set_flush_denormal(True)


def to_its_end(operation: Callable[P, T]) -> Callable[P, T]:
    """The operation, for whose calls the end of the interpreter waits. A daemon thread that is in one then, or begins
    one later, stays there until the process is gone.

    Torch lets the interpreter go in operations as small as an allocation, or the end of a tensor, and aborts the
    process where it is gone when they want it back (before Python 3.14).
    """

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return operation(*args, **kwargs)
        thread = threading.get_ident()
        _inside.add(thread)
        try:
            if _goes_on(thread):
                result = operation(*args, **kwargs)
        finally:
            _inside.discard(thread)
        while not _goes_on(thread):
            threading.Event().wait()
        return result

    return call


def _goes_on(thread: int) -> bool:
    return _ending is None or _ending == thread


@atexit.register
def _wait_for_calls() -> None:
    global _ending
    _ending = threading.get_ident()
    while _inside - {_ending}:
        time.sleep(0.001)

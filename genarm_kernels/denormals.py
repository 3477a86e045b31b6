"""Floating-point modes: a call does not depend on the one that its thread is in, and leaves it as it was."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_SMALLEST = 2.0**-1022  # of the normal numbers: a half of it is denormal


def counting_denormals(call: Callable[..., T], *args: Any) -> T:
    """call(*args), for which denormal numbers count although `torch.set_flush_denormal` has set them to be flushed.

    On this thread, that is: those of torch, to which it hands shares of a large tensor, keep their own mode.
    """
    if torch.compiler.is_compiling() or _SMALLEST / 2 != 0:
        return call(*args)
    torch.set_flush_denormal(False)
    try:
        return call(*args)
    finally:
        torch.set_flush_denormal(True)

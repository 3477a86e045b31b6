"""Triton's interpreter, mended where its results are not a GPU's."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot = InterpreterBuilder.create_dot


def mend() -> None:
    """`tl.fma` rounds once, as the instruction does, and `tl.dot` multiplies bfloat16, in place of its bits."""
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_dot = _dot_of_floats


def _dot_of_floats(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(builder, _widened(a), _widened(b), *rest)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _fma(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    # In float64 the product of two float32 is exact. Its sum, rounded to odd, is then rounded to float32 as if at once
    # (Boldo and Melquiond 2008); `error` is the sum's own (Knuth's TwoSum). As in reference.py.
    with np.errstate(all="ignore"):
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        inexact = (error != 0) & np.isfinite(error) & (total.view(np.int64) % 2 == 0)
        toward = np.where(error > 0, np.inf, -np.inf)
        return TensorHandle(np.where(inexact, np.nextafter(total, toward), total).astype(np.float32), z.dtype.scalar)

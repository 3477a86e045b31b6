"""Triton's interpreter, mended where its results are not a GPU's."""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_once() -> None:
    """`tl.fma` rounds once, as the instruction does; the interpreter rounds the product too."""
    InterpreterBuilder.create_fma = _fma


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

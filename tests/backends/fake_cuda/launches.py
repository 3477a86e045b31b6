"""Calls the Triton backend through Triton's real compiler and launcher, the driver beneath being libcuda.c.

`launches.py LIBCUDA` prints JSON: the launches of some calls with their arguments; with `--time` also what a call
takes.
"""

import ctypes
import json
import sys
import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

from genarm_kernels import backends, guided_log_softmax, guided_step


class Driver(CudaDriver):
    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0x5EED
        self.get_device_capability = lambda *_: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    )


TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
HOOK = ctypes.CFUNCTYPE(None, ctypes.POINTER(Launch), ctypes.POINTER(ctypes.c_void_p))


def main() -> None:
    fake = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before Triton asks for one
    driver.set_active(Driver())
    backends.why_unavailable = lambda name: None
    backends._DEVICES["triton"] = ("cpu",)  # tensors of the CPU stand for a GPU's: only their addresses count
    from genarm_kernels.backends.triton import launch

    launches: list[dict[str, Any]] = []
    compiling: list[tuple[str, dict[str, Any]]] = []
    running: list[tuple[str, dict[str, Any]]] = []
    compile_kernel, launcher = launch.compile_kernel, launch._launcher

    def remember(kernel: Any, spec: Any, target: Any = None) -> Any:
        compiled = compile_kernel(kernel, spec, target)
        compiling.append((kernel.__name__, compiled.src.signature))
        return compiled

    signatures: dict[Any, tuple[str, dict[str, Any]]] = {}

    def named(kernel: Any, spec: Any, device: int) -> Any:
        found = launcher(kernel, spec, device)
        running[:] = [signatures.setdefault((kernel, spec), compiling[-1])]
        return found

    def hook(config: Any, arguments: Any) -> None:
        name, signature = running[0]
        at = iter(range(1000))

        def read(kind: Any) -> Any:
            if isinstance(kind, tuple):
                return [read(each) for each in kind]
            pointer = arguments[next(at)]
            return ctypes.cast(pointer, ctypes.POINTER(TYPES.get(kind, ctypes.c_uint64)))[0]

        values = {key: read(kind) for key, kind in signature.items() if kind != "constexpr"}
        grid, block = list(config[0].grid), list(config[0].block)
        launches.append({"kernel": name, "grid": grid, "block": block, "stream": config[0].stream, "arguments": values})

    launch.compile_kernel, launch._launcher = remember, named
    keep = HOOK(hook)
    fake.fake_set_hook(keep)

    base = torch.zeros(3, 3000, dtype=torch.bfloat16)[:, 8:2504]
    arm = torch.zeros(3, 2504, dtype=torch.bfloat16)[:, :2496]
    rows = {
        "base_weight": torch.ones(3),
        "temperature": torch.ones(6)[::2],
        "top_p": torch.ones(3),
        "min_p": torch.zeros(3),
        "top_k": torch.zeros(3, dtype=torch.int64),
        "seed": torch.zeros(3, dtype=torch.int64),
        "position": torch.zeros(1, dtype=torch.int64).expand(3),
    }
    weights, mask = torch.ones(3, 2)[:, :1], torch.zeros(3, 100, dtype=torch.int32)
    numbers = guided_step(
        base, [arm], 0.25, base_weight=0.5, temperature=0.75, top_k=2**40, top_p=0.5, min_p=0.125, seed=-7,
        position=2**62, vocab_size=2000, backend="triton",
    )  # fmt: skip
    tensors = guided_step(base, [arm], weights, **rows, token_mask=mask, logprobs=False, backend="triton")
    whole = guided_log_softmax(base, [arm], 0.25, temperature=0.75, backend="triton")

    fake.fake_set_hook(HOOK())
    launch._launcher = launcher
    timed = {
        "numbers": {"top_k": 50, "top_p": 0.9},
        "tensors": {"weights": weights, "temperature": rows["temperature"], "seed": rows["seed"], "top_p": 0.9},
    }
    times = {}
    for name, kwargs in timed.items() if "--time" in sys.argv else ():
        guided_step(base, [arm], **kwargs, backend="triton")
        best = float("inf")
        for _ in range(40):
            start = time.perf_counter()
            for _ in range(50):
                guided_step(base, [arm], **kwargs, backend="triton")
            best = min(best, (time.perf_counter() - start) / 50)
        times[name] = 1e6 * best
    addresses = {
        "operands": [base.data_ptr(), arm.data_ptr()],
        "rows": [tensor.data_ptr() for tensor in rows.values()],
        "weights": weights.data_ptr(),
        "mask": mask.data_ptr(),
        "numbers": [field.data_ptr() for field in numbers],
        "tensors": [None if field is None else field.data_ptr() for field in tensors],
        "whole": whole.data_ptr(),
    }
    print(json.dumps({"launches": launches, "addresses": addresses, "call_us": times}))


if __name__ == "__main__":
    main()

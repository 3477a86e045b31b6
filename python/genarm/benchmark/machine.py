"""What a figure means nothing without: the machine, the versions and the commit, and how fast memory is read there."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("genarm-kernels", "torch", "transformers", "triton", "llama-cpp-python")


def machine(device: str) -> dict[str, Any]:
    """Where and with what a figure is measured, for the record that keeps it."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS},
        "commit": commit(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def read_bandwidth(device: str, size: int = 1 << 30) -> float:
    """GB/s of the fastest plain read of so many bytes, with all threads: a sum or a dot product.

    The best of 7, not the median: what other processes took away at that moment would flatter every percentage.
    """
    x = torch.ones(size // 4, device=device)

    reads = 20 if torch.device(device).type == "cuda" else 1  # a GPU's read is over before its launch is paid for

    def seconds(read: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(reads):
            read()
        if reads > 1:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / reads

    return x.nbytes / min(seconds(read) for read in (x.sum, lambda: x.dot(x)) for _ in range(7)) / 1e9


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """Of the checkout that this file lies in, and of no other; GENARM_COMMIT where there is no git."""
    if known := os.environ.get("GENARM_COMMIT"):
        return known
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie in a repository of its user's.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""`backend`: every test that takes it runs once for each backend that this machine can run."""

import contextlib
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
import torch

from simt import steps

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: the kernels run on the CPU

if emulated := os.environ.get("GENARM_SIMT"):  # the CUDA kernels on the CPU, as tests/backends/test_cuda.py builds them
    steps.load(emulated)

from genarm_kernels import available_backends
from genarm_kernels.backends import NAMES, cpu, cuda, interpreted

T = TypeVar("T")
LONGEST = ("test_cuda.py", "test_training.py", "test_cli.py")  # first, so that processes end together


def pytest_configure(config: pytest.Config) -> None:
    # The tests' models are so small that a second thread only waits: up to 20 times slower on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config.addinivalue_line("markers", "large: many elements; left out where a CPU stands in for a GPU")
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in available_backends():
        _patch_the_language_once()
    expected = filter(None, os.environ.get("GENARM_EXPECT_BACKENDS", "").split(","))
    if missing := set(expected) - set(available_backends()):
        raise pytest.UsageError(f"GENARM_EXPECT_BACKENDS: {sorted(missing)} cannot run; {available_backends()} can")


def _patch_the_language_once() -> None:
    """Triton's interpreter patches its whole language again at every call of a helper, which doubles a test's time."""
    import triton.language as tl
    from triton.runtime import interpreter

    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everything)
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()


def stand_in(item: pytest.Item) -> str | None:
    """The backend that the test runs on, if a CPU stands in for a GPU there, some 100 times slower."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend", parameters.get("name"))
    found = isinstance(backend, str) and backend.partition("-")[0] in NAMES and interpreted(backend.partition("-")[0])
    return str(backend) if found else None


def wants_slow(config: pytest.Config) -> bool:
    return "slow" in config.option.markexpr.replace("not slow", "")


@pytest.hookimpl(tryfirst=True)  # before the markers choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a CPU stands in for a GPU, `make test` runs a test with the first and the last of its parameters alone.
    `make test-slow`, which asks for the marker, runs it with all of them.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    skip = pytest.mark.skip(reason="too many elements for a CPU that stands in for a GPU")
    of_test: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if backend := stand_in(item):
            if item.get_closest_marker("large"):
                item.add_marker(skip)
            else:
                of_test.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    for group in of_test.values():
        for item in group if wants_slow(config) else group[1:-1]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def few(request: pytest.FixtureRequest) -> Callable[[Sequence[T], int], Sequence[T]]:
    """few(cases, n): all the cases, but where a CPU stands in for a GPU n of them, spread evenly, unless by
    `make test-slow`.
    """
    every = stand_in(request.node) is None or wants_slow(request.config)

    def few(cases: Sequence[T], n: int) -> Sequence[T]:
        if every or n >= len(cases):
            return cases
        return [cases[i * (len(cases) - 1) // max(1, n - 1)] for i in range(n)]

    return few


def backends_and_paths() -> list[str]:
    """The backends: the CPU's once for each instruction set that this machine runs ("cpu-avx2"), CUDA's in one launch,
    with a row on as many blocks as are planned or on 4, and in two.
    """
    paths = {"cpu": cpu._cpu.supported_isas() if "cpu" in available_backends() else (), "cuda": ("-1", "4", "0")}
    return [f"{name}-{path}".rstrip("-") for name in available_backends() for path in paths.get(name, ("",))]


@pytest.fixture(params=backends_and_paths())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name; tensors that the test makes are on the device which that backend serves."""
    name, _, path = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if name == "cpu":
            stack.callback(cpu._cpu.set_isa, cpu._cpu.isa())
            cpu._cpu.set_isa(path)
        if name == "cuda":
            stack.callback(cuda._cuda.force_cluster, -1)
            cuda._cuda.force_cluster(int(path))
        if name in ("triton", "cuda") and not interpreted(name):
            stack.enter_context(torch.device("cuda"))
        yield name

"""`backend`: every test that takes it runs once for each backend that this machine can run."""

import os
import types
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: the kernels run on the CPU

from genarm_kernels import available_backends
from genarm_kernels.backends import cpu


def pytest_configure(config: pytest.Config) -> None:
    # The tests' models are so small that a second thread only waits: up to 20 times slower on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config.addinivalue_line("markers", "large: many elements; left out for Triton's interpreter, which is slow")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="too many elements for Triton's interpreter (TRITON_INTERPRET=1)")
    for item in items:
        if item.get_closest_marker("large") and "triton" in item.name and os.environ.get("TRITON_INTERPRET") == "1":
            item.add_marker(skip)


def backends_and_paths() -> list[str]:
    """The backends, the CPU's once for each instruction set that this machine runs: "cpu-avx2"."""
    isas = cpu._cpu.supported_isas() if "cpu" in available_backends() else ()
    return [
        path for name in available_backends() for path in ([f"cpu-{isa}" for isa in isas] if name == "cpu" else [name])
    ]


@pytest.fixture(params=backends_and_paths())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name; tensors that the test makes are on the device which that backend serves."""
    name, _, isa = request.param.partition("-")
    if isa:
        before = cpu._cpu.isa()
        cpu._cpu.set_isa(isa)
        yield name
        cpu._cpu.set_isa(before)
    elif name in ("triton", "cuda") and torch.cuda.is_available():
        with torch.device("cuda"):
            yield name
    else:
        yield name

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""The Triton backend beyond the contract's tests: what is compiled, what is launched, what a buffer too small does."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from genarm_kernels import available_backends, guided_step, rng
from genarm_kernels.testing import make_logits, random_case

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="the Triton backend cannot run here")

ROOT = Path(__file__).parents[1]
FAKE = Path(__file__).parent / "fake_cuda"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(*command: Any, **environment: str) -> str:
    """A process in which Triton compiles in place of interpreting."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


# --- Compiling --------------------------------------------------------------------------------------------------------


def check_resources(tmp_path: Path, *arguments: Any) -> list[dict[str, Any]]:
    lines = run("-m", "bench.triton_resources", *arguments, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = [json.loads(line) for line in lines]
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        assert 16 <= kernel["registers"] <= 255 and kernel["shared"] <= 48 * 1024, kernel
    assert {kernel["kernel"] for kernel in kernels} == {"tile_pass", "row_pass", "whole_row_pass"}
    return kernels


def test_nothing_spills(tmp_path: Path) -> None:
    """The specialisations that differ most, for Hopper; figures off the cubins."""
    assert len(check_resources(tmp_path, "--arch", 90)) >= 30


@pytest.mark.slow
def test_nothing_spills_in_any_specialisation(tmp_path: Path) -> None:
    """Every type, number of ARMs up to 9 and flag, for Ampere, Hopper and Blackwell."""
    kernels = check_resources(tmp_path, "--all", "--arch", 80, 90, 100)
    assert {kernel["arch"] for kernel in kernels} == {80, 90, 100}
    assert len(kernels) == 3 * 3 * 10 * (2 * 2 * 2 + 2 + 1)


# --- Launching --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Triton's launcher hands to a driver without a GPU behind it (fake_cuda/)."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which("gcc") is None or not header.exists():
        pytest.skip(f"Triton builds its launcher with gcc and {header}")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    build = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, FAKE / "libcuda.c"]
    subprocess.run(build, check=True)
    return json.loads(run(FAKE / "launches.py", library, TRITON_LIBCUDA_PATH=str(folder)))


def test_two_launches_a_call(fake: dict[str, Any]) -> None:
    """On the current stream; a program for each tile, then one for each row, whatever the row holds."""
    kernels = [(launch["kernel"], launch["grid"], launch["block"][0]) for launch in fake["launches"]]
    assert kernels == [
        ("tile_pass", [3 * 2, 1, 1], 32),
        ("row_pass", [3, 1, 1], 256),
        ("tile_pass", [3 * 3, 1, 1], 32),
        ("row_pass", [3, 1, 1], 256),
        ("tile_pass", [3 * 3, 1, 1], 32),
        ("whole_row_pass", [3, 1, 1], 128),
    ]
    assert {launch["stream"] for launch in fake["launches"]} == {0x5EED}


def test_arguments_arrive(fake: dict[str, Any]) -> None:
    """Numbers, addresses and strides as the kernel finds them in its parameters."""
    addresses = fake["addresses"]
    first, numbers, _, tensors, _, whole = (launch["arguments"] for launch in fake["launches"])
    for arguments in (first, numbers):
        assert arguments["x_ptrs"] == addresses["operands"] and arguments["x_strides"] == [3000, 2504]
        assert arguments["weights"] == [0.5, 0.25]
        assert arguments["numbers"] == [0.75, 0.5, 0.125, 2**40, -7, 2**62]
        assert (arguments["given"], arguments["masked"], arguments["vocab"]) == (0, 0, 2000)
    outputs = [
        f"{name}_ptr" for name in ("token", "logprob", "log_mass", "kept", "base_logprob", "arm_logprobs", "status")
    ]
    assert [numbers[name] for name in outputs] == addresses["numbers"] and numbers["logprobs"] == 1

    assert tensors["given"] == 0b11111111
    assert tensors["row_ptrs"] == [*addresses["rows"], addresses["weights"]]
    assert tensors["row_strides"] == [1, 2, 1, 1, 1, 1, 0, 2, 1]
    assert (tensors["mask_ptr"], tensors["mask_strides"]) == (addresses["mask"], [100, 1])
    assert (tensors["masked"], tensors["vocab"], tensors["logprobs"]) == (2496, 2496, 0)
    written = [address for address in addresses["tensors"] if address is not None]
    assert [tensors["token_ptr"], tensors["kept_ptr"], tensors["status_ptr"]] == written

    assert (whole["logp_ptr"], whole["width"], whole["numbers"][0]) == (addresses["whole"], 2496, 0.75)


def test_a_call_is_quick(fake: dict[str, Any]) -> None:
    """Python's part of a call; the aim is 40 us, the bound leaves room for a busy machine."""
    assert fake["call_us"]["numbers"] < 80 and fake["call_us"]["tensors"] < 100, fake["call_us"]


# --- Paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates are many and blocks hold little: short rows go through every loop, in buffer and logits."""
    import triton.language as tl

    from genarm_kernels.backends.triton import common, row_pass

    for name, value in {"FEW": 16, "TILES": 2, "LISTED": 8}.items():
        monkeypatch.setattr(row_pass, name, tl.constexpr(value))
    for module in (row_pass, common):
        monkeypatch.setattr(module, "CANDIDATES", tl.constexpr(64))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels hold their constants")
def test_rows_that_overflow_their_buffer(small_buffers: None) -> None:
    """... agree with the reference: in every kind of call, and where the search has to go through many rounds."""
    cases = [random_case(seed) for seed in range(3000, 3020)]
    near = 1e6 + torch.arange(1500).float()[None] / 16  # all within 2 of a span of 1e6, then far apart and crossing 0
    for x in (near, make_logits("normal", (1, 1500)) * 1e-30, make_logits("normal", (1, 1500)) ** 5, -near):
        cases += [dict(base_logits=x, **filters) for filters in (dict(top_k=100), dict(top_p=0.5), dict(top_p=0.0))]
        cases.append(dict(base_logits=x, top_k=700, top_p=0.9, temperature=1e4))
    x = make_logits("normal", (2, 9000), torch.bfloat16)  # more groups than are read at a time
    cases += [dict(base_logits=x, **filters) for filters in (dict(top_k=700, top_p=0.9), dict(top_p=0.5), dict())]
    searched = 0
    for case in cases:
        mine, law = (guided_step(**case, backend=name) for name in ("triton", "reference"))
        for name in ("token", "kept", "status"):
            assert torch.equal(getattr(mine, name), getattr(law, name)), (case, name)
        torch.testing.assert_close(mine.log_mass, law.log_mass, rtol=1e-5, atol=1e-5, equal_nan=True)
        searched += int(((law.kept > 64) & (law.kept < case["base_logits"].shape[1])).sum())
    assert searched > 10


def test_random_numbers_are_the_librarys() -> None:
    """To the last bits of float64, also where a variate comes from a number near 0."""
    from triton_random import random_numbers

    seed, position = (torch.tensor([n], device=DEVICE) for n in (-7 * 2**40 + 5, 2**40 + 3))
    tile = torch.arange(1 << 16, device=DEVICE)
    high, low, time = (torch.empty(len(tile), dtype=torch.float64, device=DEVICE) for _ in range(3))
    uniform = torch.empty(1, dtype=torch.float64, device=DEVICE)
    random_numbers[(1,)](seed, position, high, low, time, uniform, len(tile))
    words = rng.random_words(seed, position, tile, rng.PURPOSE_TILE)
    assert torch.equal(high, words[0].double()) and torch.equal(low, words[1].double())
    expected = (-rng.gumbel(seed, position, tile)).exp()
    assert expected.min() < 1e-4
    torch.testing.assert_close(time, expected, rtol=1e-13, atol=0)
    assert torch.equal(uniform, rng.uniform(seed, position))


@pytest.mark.parametrize(
    "largest, temperature", [(1e30, 1e-20), (-1e30, 1e-20), (3e38, 1e-3), (1e-3, 3e38), (1.0, 1e-38)]
)
def test_extreme_scales(largest: float, temperature: float) -> None:
    """z / temperature beyond float32 is no reason to spoil a row, or to forget equals."""
    x = make_logits("normal", (4, 2100), device=DEVICE) * (abs(largest) / 8)
    x += largest - x.max(1, keepdim=True).values
    x[:, 1500] = x[:, 3] = x.max()
    for kwargs in (dict(), dict(top_p=0.9), dict(top_k=5), dict(min_p=0.5)):
        mine, law = (guided_step(x, temperature=temperature, **kwargs, backend=b) for b in ("triton", "reference"))
        for name in ("token", "kept", "status"):
            assert torch.equal(getattr(mine, name), getattr(law, name)), (kwargs, name)
        assert law.status.tolist() == [0] * 4
        torch.testing.assert_close(mine.logprob, law.logprob, rtol=1e-6, atol=1e-6)

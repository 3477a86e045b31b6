# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""The Triton backend beyond the contract's tests: what is compiled, what is launched, what a buffer too small does."""

import functools
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
from torch.nn import functional as F  # noqa: N812

from genarm_kernels import available_backends, guided_step, rng
from genarm_kernels.backends import triton as backend
from genarm_kernels.parameters import LayerPart, SharedLayer, WholeLayer, flatten
from genarm_kernels.shared_linear import can_fuse
from genarm_kernels.shared_linear import shared_linear as shared_linear_of
from genarm_kernels.testing import make_logits, random_case

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="the Triton backend cannot run here")

ROOT = Path(__file__).parents[2]
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
        assert 16 <= kernel["registers"] <= 255 and kernel["ok"], kernel
    assert {kernel["kernel"] for kernel in kernels} == {"tile_pass", "row_pass", "whole_row_pass", "shared_linear"}
    return kernels


def test_nothing_spills(tmp_path: Path) -> None:
    """Of the specialisations that differ most, each fifth, for Hopper; figures off the cubins."""
    assert len(check_resources(tmp_path, "--arch", 90, "--every", 5)) >= 6


@pytest.mark.slow
def test_nothing_spills_in_any_specialisation(tmp_path: Path) -> None:
    """Every type, number of ARMs up to 9 and flag, for Ampere, Hopper and Blackwell."""
    kernels = check_resources(tmp_path, "--all", "--arch", 80, 90, 100)
    assert {kernel["arch"] for kernel in kernels} == {80, 90, 100}
    assert len(kernels) == 3 * (3 * 10 * (2 * 2 * 2 + 2 + 1) + 3 * 3 * 2)


# --- The linear layer of a base and its adapters ----------------------------------------------------------------------


def guarded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers amid NaN, at a boundary of 16 bytes, as the operator's tensors are in a model."""
    count = torch.Size(shape).numel()
    around = torch.full((count + 128,), torch.nan, dtype=dtype, device=DEVICE)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return around[64 : 64 + count].view(shape).copy_(values)


SHARED_LINEARS = [
    (2, (8,), 256, 64, False),
    (6, (4, 2), 104, 72, True),
    (64, (64,), 128, 33, True),
    (3, (0, 5), 40, 8, False),
]


def layer_of(whole: WholeLayer, ranks: tuple[int, ...]) -> SharedLayer:
    parts = zip(whole.down.split(ranks), whole.up.split(ranks), strict=True)
    linear = functools.partial(F.linear, weight=whole.weight, bias=whole.bias)
    return SharedLayer(linear, [LayerPart(i, *part) for i, part in enumerate(parts, start=1)], whole.operands, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "ranks", "width", "height", "bias"), SHARED_LINEARS)
def test_shared_linear(dtype, rows, ranks, width, height, bias) -> None:
    operands, total = 1 + len(ranks), sum(ranks)
    x, weight = guarded((rows, 1, width), dtype, 1), guarded((height, width), dtype, 2)
    b = guarded((height,), dtype, 3) if bias else None
    down, up = guarded((total, width), dtype, 4), guarded((total, height), dtype, 5)
    owners = torch.tensor([i for i, rank in enumerate(ranks, start=1) for _ in range(rank)], dtype=torch.int32)
    owners = owners.to(DEVICE)
    whole = WholeLayer(weight, b, down, up, owners, operands)
    from genarm_kernels.backends.triton import shared_linear

    y = guarded((rows, 1, height), dtype, 6).fill_(3e4)
    shared_linear.launch(y, x, whole)

    own = (owners[None] == torch.arange(rows, device=DEVICE)[:, None] % operands).double()
    inner = (x[:, 0].double() @ down.double().t()) * own
    exact = x[:, 0].double() @ weight.double().t() + inner @ up.double() + (0 if b is None else b.double())
    # Of the dtype: the result's rounding, and that of `inner`, which the interpreter cuts off in bfloat16.
    eps = torch.finfo(dtype).eps
    bound = eps * (exact.abs() + (inner.abs() @ up.double().abs())) + 1e-4
    assert ((y[:, 0].double() - exact).abs() <= bound).all()
    around = torch.as_strided(y, (y.numel() + 128,), (1,), y.storage_offset() - 64)
    assert around[:64].isnan().all() and around[-64:].isnan().all()
    layer = layer_of(whole, ranks)
    assert torch.equal(shared_linear_of(x, layer, backend="triton"), y)
    by_torch = shared_linear_of(x, layer, backend="reference")
    assert ((by_torch[:, 0].double() - exact).abs() <= 2 * bound).all()
    operator, arguments = torch.ops.genarm_kernels.shared_linear.default, (x, *flatten(whole))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="weight: expected contiguous"):
        operator(x, weight.float(), *arguments[2:])


def test_when_a_layer_is_shared_in_one_launch() -> None:
    def fits(rows=2, tokens=1, rank=8, dtype=torch.bfloat16, weight=torch.bfloat16, adapter=torch.bfloat16) -> bool:
        x, w = torch.ones(rows, tokens, 16, dtype=dtype), torch.ones(4, 16, dtype=weight)
        down, owners = torch.ones(rank, 16, dtype=adapter), torch.ones(rank, dtype=torch.int32)
        return backend.suits_shared_linear(x, WholeLayer(w, None, down, down[:, :4], owners, 2))

    with torch.no_grad():
        assert fits() and fits(rows=16, rank=64)
        wrong = ({"tokens": 2}, {"rows": 17}, {"rank": 65}, {"weight": torch.int8}, {"adapter": torch.float32})
        assert not any(fits(**one) for one in wrong)
        assert not fits(dtype=torch.float32, weight=torch.float32, adapter=torch.float32)
    assert not fits()  # the operator has no gradient
    assert not can_fuse(torch.ones(1))  # on a CPU


def test_a_compiler_sees_through_the_choice() -> None:
    """One graph, as a compiled model is to have: a break at every layer would leave nothing to fuse."""
    x, weight, down = (torch.ones(shape, device=DEVICE).half() for shape in ((2, 1, 16), (16, 16), (8, 16)))
    owners = torch.ones(8, dtype=torch.int32, device=DEVICE)

    layer = layer_of(WholeLayer(weight, None, down, down, owners, 2), (8,))

    def call(x: torch.Tensor) -> torch.Tensor:
        return shared_linear_of(x, layer) + shared_linear_of(x, layer._replace(whole=None))

    with torch.no_grad():
        compiled = torch.compile(call, backend="eager", fullgraph=True)(x)
        assert torch.equal(compiled, call(x)) and not torch.equal(compiled, x)


# --- Launching --------------------------------------------------------------------------------------------------------


def with_fake_driver(folder: Path, *arguments: str) -> dict[str, Any]:
    """What fake_cuda/launches.py prints."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which("gcc") is None or not header.exists():
        pytest.skip(f"Triton builds its launcher with gcc and {header}")
    library = folder / "libcuda.so.1"
    build = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, FAKE / "libcuda.c"]
    subprocess.run(build, check=True)
    return json.loads(run(FAKE / "launches.py", library, *arguments, TRITON_LIBCUDA_PATH=str(folder)))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Triton's launcher hands to a driver without a GPU behind it."""
    return with_fake_driver(tmp_path_factory.mktemp("driver"))


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


# --- Paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates are many and blocks hold little: short rows go through every loop, in buffer and logits."""
    import triton.language as tl

    from genarm_kernels.backends.triton import board, draw, filter

    small = ((filter, "FEW", 16), (filter, "LISTED", 8), (draw, "TILES", 2))
    for module, name, value in (*small, (filter, "CANDIDATES", 64), (board, "CANDIDATES", 64)):
        monkeypatch.setattr(module, name, tl.constexpr(value))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels hold their constants")
@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_rows_that_overflow_their_buffer(small_buffers: None, share: int) -> None:
    """... agree with the reference: in every kind of call, and where the search has to go through many rounds."""
    cases = [random_case(seed) for seed in range(3000, 3020)]
    near = 1e6 + torch.arange(1500).float()[None] / 16  # all within 2 of a span of 1e6, then far apart and crossing 0
    for x in (near, make_logits("normal", (1, 1500)) * 1e-30, make_logits("normal", (1, 1500)) ** 5, -near):
        cases += [dict(base_logits=x, **filters) for filters in (dict(top_k=100), dict(top_p=0.5), dict(top_p=0.0))]
        cases.append(dict(base_logits=x, top_k=700, top_p=0.9, temperature=1e4))
    x = make_logits("normal", (2, 9000), torch.bfloat16)  # more groups than are read at a time
    cases += [dict(base_logits=x, **filters) for filters in (dict(top_k=700, top_p=0.9), dict(top_p=0.5), dict())]
    searched = 0
    for case in cases[::share]:
        mine, law = (guided_step(**case, backend=name) for name in ("triton", "reference"))
        for name in ("token", "kept", "status"):
            assert torch.equal(getattr(mine, name), getattr(law, name)), (case, name)
        torch.testing.assert_close(mine.log_mass, law.log_mass, rtol=1e-5, atol=1e-5, equal_nan=True)
        searched += int(((law.kept > 64) & (law.kept < case["base_logits"].shape[1])).sum())
    assert searched > 10 / share


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

"""The CUDA kernels where no GPU is: run as C++ by the emulation (simt/), and as nvcc compiles them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from engines import CASES, arguments, expected, tokens
from genarm_kernels import backends
from genarm_kernels.backends import cuda

ROOT = Path(__file__).parents[2]
SIMT = ROOT / "tests/backends/simt"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    not (COMPILER and sys.platform == "linux"), reason="the emulation needs g++ and Linux"
)

# --- The emulation ----------------------------------------------------------------------------------------------------


def library(name: str) -> str:
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


class Emulation:
    """Builds of the kernels for one sanitizer. What is not the kernels' own is compiled once."""

    def __init__(self, folder: Path, sanitizer: str) -> None:
        self.folder, self.sanitizer = folder, sanitizer
        # The sanitizers are told of the emulation's threads, and must not see how they are made.
        told = {"address": "-DSIMT_ASAN", "thread": "-DSIMT_TSAN"}[sanitizer]
        bindings = ["-O0"] if sanitizer == "thread" else ["-O0", "-fsanitize=address"]  # they take long to compile
        parts = ((SIMT / "emulation.cpp", "-O2", told), (ROOT / "csrc/python/cuda.cpp", *bindings))
        with ThreadPoolExecutor() as pool:
            self.objects = list(pool.map(lambda part: self.compile(part[0], ROOT / "csrc", *part[1:]), parts))
        self.module = self.build(ROOT / "csrc", "as-is")

    def compile(self, source: Path, csrc: Path, *flags: str) -> Path:
        to = self.folder / f"{csrc.parent.name}-{source.stem}.o"
        includes = (csrc, csrc / "include", SIMT, pybind11.get_include(), sysconfig.get_paths()["include"])
        command = [COMPILER, "-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *flags]
        command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
        command += ["-DGENARM_EMULATED", *(f"-I{folder}" for folder in includes)]
        done = subprocess.run([*command, "-x", "c++", "-c", source, "-o", to], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return to

    def build(self, csrc: Path, name: str) -> Path:
        flag = f"-fsanitize={self.sanitizer}"
        kernels = self.compile(csrc / "cuda/operations.cu", csrc, "-O1", flag)
        to = self.folder / f"{name}.so"
        subprocess.run([COMPILER, "-shared", flag, *self.objects, kernels, "-o", to], check=True)
        return to

    def program(self, source: Path, to: Path) -> Path:
        """An engine linked with the kernels."""
        flag = f"-fsanitize={self.sanitizer}"
        parts = [self.folder / f"{ROOT.name}-{name}.o" for name in ("operations", "emulation")]
        parts.append(self.compile(source, ROOT / "csrc", "-O1", flag))
        subprocess.run([COMPILER, flag, *parts, "-o", to], check=True)
        return to

    def run(self, *command: object, module: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A process of Python into which the sanitizer is loaded first."""
        name = {"address": "libasan.so", "thread": "libtsan.so"}[self.sanitizer]
        environment = os.environ | {
            "LD_PRELOAD": f"{library(name)} {library('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1",
            "PYTHONPATH": str(ROOT),
            "GENARM_SIMT": str(module or self.module),
            "GENARM_EXPECT_BACKENDS": "cuda",
        }
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)

    def steps(self, module: Path, *ways: int) -> subprocess.CompletedProcess[str]:
        return self.run(SIMT / "steps.py", module, *ways, module=module)


def report(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(tmp_path_factory.mktemp("address"), "address")


@pytest.fixture(scope="session")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(tmp_path_factory.mktemp("thread"), "thread")


@needs_compiler
@pytest.mark.parametrize("marker, least", [("not slow", 240), pytest.param("slow", 400, marks=pytest.mark.slow)])
def test_contract(address: Emulation, marker: str, least: int) -> None:
    """The contract's tests, on the CUDA kernels' own sources, under AddressSanitizer."""
    options = ["-q", "-k", "cuda and not mutation", "-m", f"{marker} and not gpu", "-p", "no:cacheprovider"]
    done = address.run("-m", "pytest", *options, "tests/contract")
    assert done.returncode == 0, report(done)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, report(done)


@needs_compiler
def test_every_way_to_share_a_row_gives_the_same_bits(address: Emulation) -> None:
    done = address.steps(address.module, 1, 2, 4, 16, 0)
    assert done.returncode == 0, report(done)
    assert "60 calls agree" in done.stdout


@needs_compiler
@pytest.mark.parametrize("blocks", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_no_two_threads_race(thread: Emulation, blocks: int) -> None:
    """In shared memory, a cluster's and the workspace: only barriers order threads (shuffles do not)."""
    done = thread.steps(thread.module, blocks)
    assert done.returncode == 0, report(done)


@needs_compiler
def test_the_cuda_engine_decodes_what_the_reference_decodes(address: Emulation, tmp_path: Path) -> None:
    """The example's CUDA variant, whose device is the emulation."""
    engine = address.program(ROOT / "csrc/examples/engine_cuda.cpp", tmp_path / "engine")
    for options in CASES:
        assert tokens(engine, *arguments(options), ASAN_OPTIONS="detect_leaks=0") == expected(**options), options
    refused = subprocess.run([engine, "--weight", "1e38"], capture_output=True, text=True)
    assert refused.returncode == 1 and "is --weight too large?" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nvcc")), reason="needs cmake and nvcc")
def test_the_cuda_engine_builds_without_torch(tmp_path: Path) -> None:
    """As the README of the C interface says; for one architecture."""
    build, prefix, engine = tmp_path / "build", tmp_path / "prefix", tmp_path / "engine"
    for command in (
        ["cmake", "-S", ROOT / "csrc", "-B", build, "-DGENARM_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"],
        ["cmake", "--build", build, "--parallel", "2"],
        ["cmake", "--install", build, "--prefix", prefix],
        ["cmake", "-S", ROOT / "csrc/examples", "-B", engine, f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["cmake", "--build", engine],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, report(done)
        assert "warning" not in done.stdout + done.stderr, report(done)
    done = subprocess.run([engine / "engine_cuda"], capture_output=True, text=True)
    assert done.returncode == 0 or "engine: CUDA: " in done.stderr, report(done)  # no GPU here, perhaps


def test_auto_takes_what_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_able", lambda device_type: ("reference", "triton", "cuda"))
    assert backends._auto("cuda", 64) == "triton", "until a GPU has measured"
    monkeypatch.setattr(backends, "_FASTEST_ON_GPU", ((64, "cuda"), (float("inf"), "triton")))
    assert [backends._auto("cuda", rows) for rows in (0, 64, 65)] == ["cuda", "cuda", "triton"]
    monkeypatch.setattr(backends, "_able", lambda device_type: ("reference", "cuda"))
    assert backends._auto("cuda", 65) == "cuda", "triton cannot run"
    monkeypatch.undo()
    assert backends._auto("cpu", 5) != "cuda"


FAULTS = {
    # name: (sanitizer, file, what stands there, what is planted, what is said of it)
    "no barrier after the totals": (
        "thread",
        "row.h",
        "GENARM_NO_ALLOWED_TOKEN : GENARM_DRAWN;\n    }\n  }\n  __syncthreads();",
        "GENARM_NO_ALLOWED_TOKEN : GENARM_DRAWN;\n    }\n  }",
        "data race",
    ),
    "a write past the vocabulary": (
        "address",
        "whole.h",
        "if (v < r.a.vocab) out[v] = logp;",
        "if (v <= r.a.vocab) out[v] = logp;",
        "heap-buffer-overflow",
    ),
    "no barrier after the collection": (
        "thread",
        "filter.h",
        "  collect(r, all.low, top);\n  r.sync();",
        "  collect(r, all.low, top);",
        "data race",
    ),
    "a barrier that some warps miss": (
        "address",
        "filter.h",
        "  clear_bins(r.mine);\n  __syncthreads();\n  for",
        "  clear_bins(r.mine);\n  if (threadIdx.x < 128) __syncthreads();\n  for",
        "",  # a deadlock, or barriers that meet wrongly and a wrong token
    ),
    "too little shared memory": (
        "address",
        "kernels.h",
        "static_cast<int64_t>(tiles_per_block) * kTile * 4 : 0);",
        "static_cast<int64_t>(tiles_per_block) * kTile * 4 - 16 : 0);",
        "heap-buffer-overflow",
    ),
    "blocks that end while their memory is read": (
        "address",
        "kernels.h",
        "    r.sync();  // the other blocks' memory has been read\n",
        "",
        "",  # use after free, or the emulation's own words
    ),
    "a shuffle without all lanes": (
        "address",
        "draw.h",
        "  return __reduce_min_sync(kWholeWarp, first);",
        "  return lane_of_thread() < 31 ? __reduce_min_sync(kWholeWarp, first) : first;",
        "SIMT emulation",
    ),
    "lanes that read others' words without a barrier": (
        "thread",
        "filter.h",
        "  __syncthreads();\n  x = shared.warp_float[0];",
        "  x = shared.warp_float[0];",
        "data race",
    ),
    "a bin's edge one token off": ("address", "filter.h", "(middle)) < bin) {", "(middle)) <= bin) {", ""),
    "one token more than top-k": (
        "address",
        "filter.h",
        "above < static_cast<uint64_t>(r.top_k())",
        "above <= static_cast<uint64_t>(r.top_k())",
        "",
    ),
    "a bit of the mask lost": ("address", "tile.h", "v % 32 & 0xFFu", "v % 32 & 0x7Fu", ""),
    "equals of the threshold dropped": (
        "address",
        "filter.h",
        "if (z[e] < threshold) continue;",
        "if (z[e] <= threshold) continue;",
        "",
    ),
    "the draw from the other end": ("address", "draw.h", "(uniform * static_cast", "((1 - uniform) * static_cast", ""),
    "a carry lost": ("address", "filter.h", "before + low < before ? 1", "before + low < before ? 0", ""),
}
IN_EVERY_RUN = ("no barrier after the totals", "a write past the vocabulary")


@needs_compiler
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_planted_fault_is_caught(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    sanitizer, file, text, fault, said = FAULTS[name]
    emulation: Emulation = request.getfixturevalue(sanitizer)
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = (csrc / "cuda" / file).read_text()
    assert source.count(text) == 1, f"{file} does not hold this once: {text}"
    (csrc / "cuda" / file).write_text(source.replace(text, fault))
    done = emulation.steps(emulation.build(csrc, tmp_path.name), 2, 0)
    assert done.returncode != 0 and said in done.stderr, report(done)


# --- What nvcc makes of them ------------------------------------------------------------------------------------------


def check_resources(module: str | Path, archs: set[str]) -> None:
    """Every kernel for every architecture: registers within what its __launch_bounds__ leave, no stack."""
    from triton.backends.nvidia import compiler

    tool = shutil.which("cuobjdump") or Path(compiler.__file__).parent / "bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", module], capture_output=True, text=True, check=True).stdout
    bounds = {
        name: 65536 // (256 * int(blocks))
        for blocks, name in re.findall(
            r"__launch_bounds__\(kThreads, (\d)\) (\w+)\(", (ROOT / "csrc/cuda/kernels.h").read_text()
        )
    }
    assert len(bounds) == 6
    seen = set()
    for part in said.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", part)
        assert arch
        for symbol, usage in re.findall(r"Function (\w+):\s+(REG:.*)", part):
            name = next(name for name in sorted(bounds, key=len, reverse=True) if name in symbol)
            figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
            assert figures["STACK"] == figures["LOCAL"] == 0, (arch[1], symbol, figures)
            assert figures["REG"] <= min(bounds[name], 255), (arch[1], symbol, figures)
            assert figures["SHARED"] <= 1024, (arch[1], symbol, figures)  # what the driver keeps for itself
            seen.add((arch[1], symbol))
    assert {arch for arch, _ in seen} == archs and len(seen) == 3 * len(bounds) * len(archs)


@pytest.mark.skipif(cuda._import_error is not None, reason=f"no compiled kernels: {cuda._import_error}")
def test_nothing_spills() -> None:
    assert cuda._cuda.__file__
    check_resources(cuda._cuda.__file__, {f"sm_{arch}" for arch in cuda._cuda.ARCHITECTURES.split(";")})


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_nothing_spills_on_any_architecture(tmp_path: Path) -> None:
    """Of those that are built unless one is asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "GENARM_CUDA_ARCHS"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    wanted = {"GENARM_CPU": "0", "GENARM_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment | wanted, capture_output=True, text=True)
    assert done.returncode == 0, report(done)
    check_resources(next(tmp_path.rglob("_cuda.*.so")), {"sm_80", "sm_90", "sm_100"})

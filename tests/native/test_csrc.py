"""The C core without Python: its own test program, and an engine built against what `cmake --install` leaves."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engines import CASES, arguments, expected, run, tokens
from genarm_kernels import row_seed

REPOSITORY = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++", "clang++"]), None)
MISSING = [name for name, path in (("cmake", shutil.which("cmake")), ("a C++ compiler", COMPILER)) if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"building the C core needs {' and '.join(MISSING)}")


def build(source: Path, folder: Path, *options: str) -> Path:
    run("cmake", "-S", source, "-B", folder, *options)
    run("cmake", "--build", folder, "--config", "Release")
    return folder


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the library and its test program."""
    return build(REPOSITORY / "csrc", tmp_path_factory.mktemp("core"), "-DGENARM_BUILD_TESTS=ON")


@pytest.fixture(scope="session")
def engine(core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, which sees of the library what an installation holds."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", core, "--prefix", prefix)
    example = shutil.copytree(REPOSITORY / "csrc/examples", tmp_path_factory.mktemp("elsewhere") / "examples")
    return build(example, tmp_path_factory.mktemp("engine"), f"-DCMAKE_PREFIX_PATH={prefix}") / "engine"


@pytest.mark.parametrize("cases", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_core(core: Path, cases: int) -> None:
    run(core / "core_test", cases)
    run(core / "decoder_test")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers, cases", [("address,undefined", 1000), ("thread", 150)])
def test_core_under_sanitizers(sanitizers: str, cases: int, tmp_path: Path) -> None:
    folder = build(REPOSITORY / "csrc", tmp_path, "-DGENARM_BUILD_TESTS=ON", f"-DGENARM_SANITIZE={sanitizers}")
    run(folder / "core_test", cases)
    run(folder / "decoder_test")


@pytest.mark.slow
def test_shared_library(tmp_path: Path) -> None:
    """It shows the C interface and nothing else, and the engine finds it by the package."""
    core = build(REPOSITORY / "csrc", tmp_path / "core", "-DBUILD_SHARED_LIBS=ON")
    run("cmake", "--install", core, "--prefix", tmp_path / "prefix")
    library = next((tmp_path / "prefix").rglob("libgenarm_kernels.*"))
    if shutil.which("nm"):
        lines = run("nm", "--dynamic", "--defined-only", library).splitlines()
        names = {line.split()[-1] for line in lines if line.split()[-2] in "TDBR"}
        assert names == set(declared_functions())
    options = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    engine = build(REPOSITORY / "csrc/examples", tmp_path / "engine", options) / "engine"
    assert tokens(engine) == expected()


def declared_functions() -> list[str]:
    header = (REPOSITORY / "csrc/include/genarm_kernels.h").read_text()
    return re.findall(r"^GENARM_API .*?(genarm_\w+)\(", header, re.MULTILINE)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_engine_decodes_what_the_reference_decodes(engine: Path, options: dict[str, float]) -> None:
    assert tokens(engine, *arguments(options)) == expected(**options)


def test_a_sequence_does_not_depend_on_its_batch(engine: Path) -> None:
    seeds = [row_seed(5, b) for b in range(2)]
    alone = [tokens(engine, "--sequences", "1", "--seed", str(seed), "--threads", "1")[0] for seed in seeds]
    assert tokens(engine, "--sequences", "40", "--seed", "5", "--threads", "3")[:2] == alone


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_set_by_environment(engine: Path, isa: str) -> None:
    forced = subprocess.run([engine], env=os.environ | {"GENARM_CPU_ISA": isa}, capture_output=True, text=True)
    if forced.returncode and isa != "portable":
        assert "GENARM_CPU_ISA" in forced.stderr
        pytest.skip(f"this machine does not run {isa}")
    assert forced.returncode == 0, forced.stderr
    assert forced.stdout == run(engine)


def test_unknown_instruction_set(engine: Path) -> None:
    done = subprocess.run([engine], env=os.environ | {"GENARM_CPU_ISA": "nonsense"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "GENARM_CPU_ISA names (portable, avx2 or avx512)" in done.stderr


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--top-p", "1.5"], 2, "--top-p: expected a number from 0 to 1, got '1.5'"),
        (["--temperature", "nan"], 2, "--temperature: expected a number"),
        (["--temperature", "1x"], 2, "got '1x'"),
        (["--tokens", "0"], 2, "--tokens: expected a number from 1"),
        (["--seed", "9223372036854775808"], 2, "--seed: expected a number"),
        (["--seed"], 2, "got ''"),
        (["--tempo", "1"], 2, "--tempo: no such option"),
        (["--weight", "1e38"], 1, "is --weight too large?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_engine_refuses(engine: Path, arguments: list[str], status: int, words: str) -> None:
    done = subprocess.run([engine, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr

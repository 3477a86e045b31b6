"""The wheel and the sdist, installed where no compiler is, in environments that find torch and nothing else of ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import torch, genarm_kernels as g
base, arm = (torch.randn(2, 5000, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
print(g.available_backends()[-1], g.guided_step(base, [arm], top_p=0.9, seed=3).token.tolist())
"""


def run(*command, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # conftest.py's
    done = subprocess.run(command, env=kept | environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY), GENARM_CPU="1")
    return folder


def install(folder, distribution, **environment):
    """A new environment's folder of commands. torch and setuptools' own needs come from this one."""
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    run(
        str(folder / "bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        str(distribution),
        **environment,
    )
    return folder / "bin"


def test_the_wheel_needs_no_compiler(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    commands = install(tmp_path / "venv", wheel, PATH="")
    backend, tokens = run(str(commands / "python"), "-c", SCRIPT, PATH=str(commands)).split(" ", 1)
    assert backend == "cpu"
    assert run(sys.executable, "-c", SCRIPT) == f"cpu {tokens}"


def test_the_sdist_without_a_compiler_gives_the_reference_and_says_why(distributions, tmp_path):
    (sdist,) = distributions.glob("*.tar.gz")
    commands = install(tmp_path / "venv", sdist, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert run(str(commands / "python"), "-c", SCRIPT, PATH=str(commands)).startswith("reference ")
    info = run(str(commands / "genarm"), "info", PATH=str(commands))
    assert "missing: built without the CPU core" in info and "/nowhere/c++" in info


def test_a_build_that_must_have_the_core_fails_without_a_compiler(distributions, tmp_path):
    (sdist,) = distributions.glob("*.tar.gz")
    with pytest.raises(AssertionError, match=r"/nowhere/c\+\+"):
        install(tmp_path / "venv", sdist, CC="/nowhere/cc", CXX="/nowhere/c++", GENARM_CPU="1")


NVCC = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2" ;;
    -DGENARM_CUDA_ARCHS=*) printf '\\0%s\\0' "$(echo "${1#*=}" | tr -d '"')" > "$0.archs" ;;
  esac
  shift
done
cp "$0.archs" "$out" && echo call >> "$0.calls"
"""


def test_the_cuda_part_is_built_once_and_left_out_without_a_trace(tmp_path):
    """With an nvcc that only says for which GPUs it was called."""
    pytest.importorskip("setuptools")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(source)], check=True)
    shutil.copy(REPOSITORY / "setup.py", source)
    environment = {"PATH": f"{nvcc.parent}:{os.environ['PATH']}", "GENARM_CPU": "0"}

    def setup(*command, **more):
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", *command],
            cwd=source, env=os.environ | environment | more, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return sorted(path.name.partition(".")[2] for path in (source / "genarm_kernels").glob("_cuda.*[!i]"))

    def calls():
        return (tmp_path / "bin/nvcc.calls").read_text().count("call")

    in_place = ("build_ext", "--inplace")
    (module,) = setup(*in_place)
    assert module.endswith("so") and calls() == 3
    assert setup(*in_place) == [module] and calls() == 3, "nothing has changed"
    assert setup(*in_place, GENARM_CUDA_ARCHS="90") == [module] and calls() == 6, "other GPUs"
    assert setup("bdist_wheel", GENARM_CUDA="0") == [module], "a wheel leaves what is in place alone"
    names = zipfile.ZipFile(next((source / "dist").glob("*.whl"))).namelist()
    assert "genarm_kernels/_cuda.error" in names and not [name for name in names if name.endswith(".so")]
    assert setup(*in_place, GENARM_CUDA="0") == ["error"]
    assert "left out by GENARM_CUDA=0" in (source / "genarm_kernels/_cuda.error").read_text()

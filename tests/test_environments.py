"""What `make` installs: when an edit makes it anew, and what the locks hold."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LOCKS = {".venv": "venv.txt", ".venv-oldest": "venv-oldest.txt", ".venv-newest": "venv-newest.txt"}


@pytest.fixture
def tree(tmp_path):
    """What the Makefile looks at: sources, older than locks that are installed, older than the package."""
    for name in ("csrc", "requirements"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1000, 1000))
    for venv in LOCKS:
        for time, stamp in ((2000, "locked"), (3000, "ready")):
            (tmp_path / venv).mkdir(exist_ok=True)
            (tmp_path / venv / stamp).touch()
            os.utime(tmp_path / venv / stamp, (time, time))
    return tmp_path


def is_current(tree, target):
    """By make, which does nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    status = subprocess.run(["make", "--question", target], cwd=tree, env=kept).returncode
    assert status in (0, 1)
    return status == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_edited_source_is_built_and_nothing_else_is(tree):
    sources = [path for path in (tree / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".inc")]
    assert {"bindings.h", "cuda.cpp", "guided_step.cu", "row_kernel.inc"} <= {path.name for path in sources}
    assert is_current(tree, ".venv/ready")
    for path in (*sources, tree / "setup.py", tree / "pyproject.toml"):
        os.utime(path, (4000, 4000))
        assert not is_current(tree, ".venv/ready"), path
        assert is_current(tree, ".venv/locked"), path
        os.utime(path, (1000, 1000))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_edited_lock_is_installed_in_its_own_environment(tree):
    for edited, lock in LOCKS.items():
        os.utime(tree / "requirements" / lock, (4000, 4000))
        for venv in LOCKS:
            assert is_current(tree, f"{venv}/locked") == is_current(tree, f"{venv}/ready") == (venv != edited)
        os.utime(tree / "requirements" / lock, (1000, 1000))
    os.utime(tree / "requirements" / "torch.txt", (4000, 4000))
    assert not any(is_current(tree, f"{venv}/locked") for venv in LOCKS)


def locked(name):
    """By package, its versions; there is more than one where Pythons differ."""
    versions = {}
    text = (REPOSITORY / "requirements" / name).read_text()
    for package, version, rest in re.findall(r"^([\w-]+)==([\w.]+)(.*(?:\n +--hash.*)+)", text, re.M):
        assert "--hash=sha256:" in rest
        versions.setdefault(package, set()).add(version)
    assert len(re.findall("==", re.sub(";.*", "", text))) == sum(map(len, versions.values()))
    return versions


@pytest.mark.parametrize("name", LOCKS.values())
def test_a_lock_asks_for_no_build_of_torch(name):
    """A machine may have a CPU build of its own, which brings none of CUDA's packages."""
    assert not [package for package in locked(name) if re.match("torch|nvidia|cuda", package)]
    assert {"transformers", "setuptools", "pybind11", "pip"} <= set(locked(name))


def test_the_oldest_are_the_lowest_that_the_package_allows():
    oldest = locked("venv-oldest.txt")
    text = (REPOSITORY / "pyproject.toml").read_text()
    wanted = "".join(re.findall(r"^(?:dependencies|train) = (.*)$", text, re.M))
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', wanted))
    assert len(bounds) == wanted.count('"') / 2 and {"transformers", "peft"} < set(bounds)
    del bounds["torch"]
    for package, bound in bounds.items():
        (version,) = oldest[package]
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), package

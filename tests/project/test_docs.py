"""The documentation says what is so: its code runs, its links and files are there, its rules are those tests cite."""

import doctest
import pkgutil
import re
from pathlib import Path

import pytest

import genarm
import genarm_kernels

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("bench/**/*.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if {"python", "pycon"} & {lang for lang, _ in FENCE.findall(page.read_text())}]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def sources(*patterns: str) -> dict[Path, str]:
    """The texts of what belongs to the project, without what is built or installed beside it."""
    folders = ("genarm_kernels", "csrc", "python", "tests", "bench", "examples")
    paths = [*ROOT.glob("setup.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    return {path: path.read_text() for path in paths if any(path.match(pattern) for pattern in patterns)}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page: Path) -> None:
    """A page's blocks in their order, as one session; those with prompts print what is shown."""
    names: dict[str, object] = {}
    runner = doctest.DocTestRunner()
    for number, (language, code) in enumerate(FENCE.findall(page.read_text())):
        about = f"{page.name}, block {number}"
        if language == "python":
            exec(compile(code, about, "exec"), names)
        elif language == "pycon":
            example = doctest.DocTestParser().get_doctest(code, names, about, str(page), 0)
            assert example.examples, about
            failed = runner.run(example, clear_globs=False).failed
            names |= example.globs
            assert not failed, f"{about}: see what doctest prints"


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pages
def test_named_files_exist(page: Path) -> None:
    """What is set as code and begins with a folder or file of the repository."""
    if page.name == "CHANGELOG.md":  # tells of what has been
        return
    tops = {path.name for path in ROOT.iterdir()}
    spans = re.findall(r"`([\w./+*-]+)`", prose(page))
    for span in spans:
        if "/" in span and span.split("/")[0] in tops:
            assert any(ROOT.glob(span.rstrip("/"))), span


def test_rules_are_those_that_are_cited() -> None:
    """Each that a test or a source cites is in the contract, and each of the contract is cited by a test."""
    stated = re.findall(r"^### Rule (\d+): ", (ROOT / "docs/contract.md").read_text(), re.MULTILINE)
    assert stated == [str(number) for number in range(1, len(stated) + 1)]
    by_tests = set()
    for path, text in sources("*.py", "*.cpp", "*.h", "*.inc", "*.cu").items():
        for first, to, last in re.findall(r"\b[Rr]ules? (\d+)(?:(-| and | to )(\d+))?", text):
            cited = range(int(first), int(last) + 1) if to in ("-", " to ") else [int(n) for n in (first, last) if n]
            assert set(map(str, cited)) <= set(stated), path
            by_tests |= set(map(str, cited)) if path.name.startswith("test_") else set()
    assert by_tests == set(stated)


def test_environment_variables_are_told() -> None:
    """Those of this project: as the code reads them, as the page lists them."""
    read = set()
    for text in sources("*.py", "*.cpp").values():
        read |= set(re.findall(r'(?:environ\.get|environ\.setdefault|getenv|ParallelCompile)\(\s*"(GENARM_\w+)"', text))
    table = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "docs/backends.md").read_text(), re.MULTILINE)
    told = {name for cell in table for name in re.findall(r"GENARM_\w+", cell)}
    assert told == read | {"GENARM_CPU", "GENARM_CUDA"}  # whose names setup.py puts together


def test_the_reference_holds_every_public_name() -> None:
    listed = [
        pkgutil.resolve_name(name)
        for page in ROOT.glob("docs/reference/*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    ]
    for package in (genarm, genarm_kernels):
        for name in package.__all__:
            assert getattr(package, name) in listed, name


@pages
def test_no_figure_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.findall(r"[A-Z]+_(?:TIME|RESULT|RATIO)|GUIDE\d|TODO|TBD", page.read_text())

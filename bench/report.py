"""The tables, the plot and the kept file of a benchmark run: `python -m bench.report RAW.json [--out bench/results]`.

RAW.json is pytest-benchmark's, of `bench/test_guided_step.py`. Into a folder named after the device go
`guided_step.json` (medians, p20 and p80 in microseconds, machine, versions, commit) and `guided_step.png`.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from rich.console import Console
from rich.table import Table

from genarm_kernels.backends import NAMES

matplotlib.use("Agg")  # no display on a server
from matplotlib import pyplot as plt

CASE = ("logits", "filters", "vocab", "batch", "arms")
ENVIRONMENT = ("device", "machine", "threads", "load_before", "read_gb_s", "python", "torch", "transformers", "commit")
BASELINE_COLOURS = {"reference": "0.6", "eager": "tab:orange", "compiled": "tab:purple", "transformers": "tab:red"}

Key = tuple[str, str, int, int, int]
"""A case: its fields in the order of `CASE`."""


class Time(NamedTuple):
    """Microseconds."""

    median: float
    p20: float
    p80: float


class Run(NamedTuple):
    environment: dict[str, Any]
    times: dict[Key, dict[str, Time]]
    """By case, by subject."""
    bytes_read: dict[Key, int]
    overhead: dict[str, Time]
    """By backend: one call with one row of one token."""

    @property
    def ours(self) -> str:
        """The backend that "auto" takes."""
        return next(name for name in reversed(NAMES) if name in self.subjects)

    @property
    def subjects(self) -> list[str]:
        """Backends first, the fastest first of all; then the baselines."""
        found = {subject for times in (*self.times.values(), self.overhead) for subject in times}
        return [name for name in (*reversed(NAMES), *BASELINE_COLOURS) if name in found and found.discard(name) is None]

    def ratio(self, key: Key, subject: str) -> float | None:
        """How many times faster ours is."""
        times = self.times.get(key, {})
        return times[subject].median / times[self.ours].median if {subject, self.ours} <= times.keys() else None

    def percent(self, key: Key) -> float:
        """Of the read bandwidth, by ours."""
        return self.gb_s(key) / self.environment["read_gb_s"] * 100

    def gb_s(self, key: Key) -> float:
        return self.bytes_read[key] / self.times[key][self.ours].median / 1e3


class Target(NamedTuple):
    text: str
    bound: float
    measured: float | None
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        holds = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "holds" if holds else "FAILS"


def read(path: Path) -> Run:
    raw = json.loads(path.read_text())
    run = Run({}, {}, {}, {})
    for row in raw["benchmarks"]:
        info = row["extra_info"]
        run.environment.update({name: info[name] for name in ENVIRONMENT})
        time = Time(*(round(1e6 * seconds, 2) for seconds in (row["stats"]["median"], info["p20"], info["p80"])))
        key = tuple(info[name] for name in CASE)
        if info["vocab"] == 1:
            run.overhead[info["subject"]] = time
        else:
            run.times.setdefault(key, {})[info["subject"]] = time
            run.bytes_read[key] = info["bytes"]
    if not run.times:
        raise SystemExit(
            f"{path}: no timed case of bench/test_guided_step.py in it; was it run with --benchmark-disable?"
        )
    return run


def targets(run: Run) -> Iterator[Target]:
    for vocab, batch, filters, bound in (
        (128256, 8, "p=0.9", 150),
        (128256, 8, "k=50", 50),
        (128256, 8, "none", 50),
        (32000, 1, "p=0.9", 60),
    ):
        ratio = run.ratio(("peaked", filters, vocab, batch, 1), "transformers")
        yield Target(f"V={vocab} B={batch} {filters}: times faster than transformers", bound, ratio)
    overhead = run.overhead[run.ours].median if run.ours in run.overhead else None
    yield Target("V=1 B=1 N=1: microseconds a call from Python", 20, overhead, at_least=False)
    slower = {}
    for key, times in run.times.items():
        peaked = run.times.get(("peaked", *key[1:]), {})
        if key[0] == "flat" and run.ours in times and run.ours in peaked:
            slower[key] = times[run.ours].median / peaked[run.ours].median
    worst = max(slower, key=slower.get, default=None)
    text = "flat rows: times slower than peaked ones, the worst case"
    if worst is not None:
        text += " (V={2} B={3} N={4} {1})".format(*worst)
    yield Target(text, 4, slower.get(worst), at_least=False)


def show(run: Run, console: Console) -> None:
    console.print("\n".join(f"{name}: {value}" for name, value in run.environment.items()), highlight=False)
    for (logits, filters), group in itertools.groupby(sorted(run.times, key=_order), key=lambda key: key[:2]):
        keys = list(group)
        others = [name for name in run.subjects if name != run.ours and any(name in run.times[key] for key in keys)]
        table = Table(title=f"{logits} rows, filters: {filters}", title_justify="left")
        for column in ("V", "B", "N", f"{run.ours} µs", "p20-p80", "MB", "GB/s", "% of read"):
            table.add_column(column, justify="right")
        for name in others:
            table.add_column(f"{name} µs", justify="right")
            table.add_column("ratio", justify="right")
        for key in keys:
            cells = [str(number) for number in key[2:]]
            if run.ours in run.times[key]:
                time = run.times[key][run.ours]
                cells += [f"{time.median:.1f}", f"{time.p20:.1f}-{time.p80:.1f}", f"{run.bytes_read[key] / 1e6:.2f}"]
                cells += [f"{run.gb_s(key):.2f}", f"{run.percent(key):.0f}"]
            else:
                cells += ["", "", f"{run.bytes_read[key] / 1e6:.2f}", "", ""]
            for name in others:
                ratio = run.ratio(key, name)
                cells.append(f"{run.times[key][name].median:.1f}" if name in run.times[key] else "")
                cells.append("" if ratio is None else f"{ratio:.1f}x")
            table.add_row(*cells)
        console.print(table)
    table = Table(title=f"targets, backend {run.ours}; ratios of medians of this run", title_justify="left")
    for column in ("target", "bound", "measured", ""):
        table.add_column(column)
    for target in targets(run):
        bound = f"{'>=' if target.at_least else '<='} {target.bound:g}"
        table.add_row(target.text, bound, "" if target.measured is None else f"{target.measured:.1f}", target.verdict)
    console.print(table)


def save(run: Run, path: Path) -> None:
    """One case a line, so that two runs can be compared with diff."""
    fields = {
        **run.environment,
        "unit": "microseconds: median, p20, p80",
        "overhead": run.overhead,
        "targets": [target._asdict() | {"verdict": target.verdict} for target in targets(run)],
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in fields.items()]
    cases = [
        "    " + json.dumps(dict(zip(CASE, key, strict=True)) | run.times[key]) for key in sorted(run.times, key=_order)
    ]
    path.write_text("\n".join(["{", *lines, '  "cases": [', ",\n".join(cases), "  ]", "}", ""]))


def plot(run: Run, path: Path) -> None:
    """Time over vocabulary with one ARM: a panel for each batch and filter, p20 to p80 shaded."""
    with_one_arm = [key for key in sorted(run.times, key=_order) if key[4] == 1]
    batches, filters = (list(dict.fromkeys(key[i] for key in with_one_arm)) for i in (3, 1))
    batches.sort()
    size = (1.2 + 3.2 * len(filters), 1.4 + 2.4 * len(batches))
    figure, axes = plt.subplots(
        len(batches), len(filters), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (i, batch), (j, name) in itertools.product(enumerate(batches), enumerate(filters)):
        axis = axes[i, j]
        panel = [key for key in with_one_arm if key[3] == batch and key[1] == name]
        for subject in run.subjects:
            colour = BASELINE_COLOURS.get(subject, "tab:blue" if subject == run.ours else "tab:green")
            width = 2.2 if subject == run.ours else 1.2
            peaked, flat = (
                {key[2]: run.times[key][subject] for key in panel if key[0] == logits and subject in run.times[key]}
                for logits in ("peaked", "flat")
            )
            line(axis, peaked, subject, color=colour, lw=width)
            if subject == run.ours:
                line(axis, flat, f"{subject}, flat rows", color="tab:cyan", ls="--")
        floor = {key[2]: run.bytes_read[key] / run.environment["read_gb_s"] / 1e3 for key in panel}
        axis.plot(floor.keys(), floor.values(), "k:", lw=1.2, label="one read of the logits")
        axis.set_yscale("log")
        axis.set_title(f"B={batch}, filters: {name}", fontsize=9)
        axis.grid(alpha=0.3)
        vocabs = sorted(floor)
        axis.set_xticks(vocabs, [f"{round(vocab / 1000)}k" for vocab in vocabs], fontsize=7, rotation=45)
    for axis in axes[:, 0]:
        axis.set_ylabel("µs, median")
    for axis in axes[-1]:
        axis.set_xlabel("V")
    legend(figure, "outside upper center")
    machine = "{device}: {machine}, {threads} threads, torch {torch}, commit {commit}".format(**run.environment)
    figure.supxlabel(f"guided_step, one ARM, bfloat16, cold. {machine}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def legend(figure: Any, where: str) -> None:
    """One for all panels."""
    labelled = {
        label: drawn for axis in figure.axes for drawn, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc=where, ncols=4, fontsize=8)


def line(axis: Any, points: Mapping[int, tuple[float, float, float]], label: str, **style: Any) -> None:
    """Medians over what they are the times of, p20 to p80 shaded; nothing where there are none."""
    if points:
        medians, low, high = zip(*points.values(), strict=True)
        axis.plot(points.keys(), medians, marker="o", ms=3, label=label, **style)
        axis.fill_between(points.keys(), low, high, color=style["color"], alpha=0.2, lw=0)


def _order(key: Key) -> tuple[Any, ...]:
    """Peaked first, the filters from none to all, then by size."""
    logits, filters, vocab, batch, arms = key
    known = ("none", "k=50", "p=0.9")
    return logits != "peaked", known.index(filters) if filters in known else len(known), batch, vocab, arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    run = read(arguments.raw)
    show(run, Console(width=170))  # a log file has no width of its own
    folder = arguments.out / re.sub(r"[^a-z0-9]+", "-", run.environment["device"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    save(run, folder / "guided_step.json")
    plot(run, folder / "guided_step.png")
    print(f"{folder}: guided_step.json, guided_step.png")


if __name__ == "__main__":
    main()

"""Hardware counters of the sampling kernels, as Nsight Compute reads them: see `counters` in gpu_check.sh.

`python -m bench.kernel_counters` launches each main case once, in an NVTX range of its name, between cudaProfilerStart
and cudaProfilerStop; `--metrics` prints what `ncu --metrics` is to collect, `--table FILE` what it found: the output of
`ncu --csv --page raw --print-units base`. Before each kernel ncu empties the caches: also before the second of a step,
which otherwise finds in the L2 what the first has left there.
"""

import argparse
import csv
import functools
import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

FILTERS = ("none", "k+p+min-p")
COLUMNS = {  # of the table: a metric, what its base unit is divided by
    "us": ("gpu__time_duration.sum", 1e3),
    "MB read": ("dram__bytes_read.sum", 1e6),
    "% of DRAM peak": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "% of warps active": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("long_scoreboard", "short_scoreboard", "barrier", "membar", "sleeping", "wait", "branch_resolving"),
    *("no_instruction", "math_pipe_throttle", "lg_throttle", "mio_throttle", "not_selected"),
)
METRICS = [metric for metric, _ in COLUMNS.values()] + [STALL.format(reason) for reason in STALLS]
_RANGE = "{} {} B={}"  # a backend, filters, rows
_IN_RANGE = re.compile(r"\b(triton|cuda) (\S+) B=(\d+)")


def launch() -> None:
    from bench.gpu_kernels import BATCHES, MAIN_VOCAB, Case, inputs, subjects

    runs = []
    for filters, batch in itertools.product(FILTERS, BATCHES):
        case = Case(MAIN_VOCAB, batch, 1, filters, "peaked", "cold")
        base, arms = inputs(case, 1)[0]
        for name, step in subjects(case).items():
            if name in ("triton", "cuda"):
                step(base, arms, 0)  # compiled, loaded
                runs.append((_RANGE.format(name, filters, batch), functools.partial(step, base, arms, 1)))
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        for name, run in runs:
            with torch.cuda.nvtx.range(name):
                run()
        torch.cuda.synchronize()
    print(f"{len(runs)} cases launched")


def rows(lines: Iterable[str]) -> list[list[str]]:
    """Of ncu's CSV, a kernel a row: backend, filters, B, kernel, `COLUMNS`, and what warps wait for, with how many do
    when an instruction is issued.
    """
    found = []
    for row in csv.DictReader(lines):
        if not row["ID"]:  # the line of units
            continue
        case = _IN_RANGE.search(" ".join(filter(None, row.values())))
        number = {name: float(row[name].replace(",", "")) for name in METRICS if re.match(r"\d", row.get(name) or "")}
        cells = [f"{number[name] / unit:.4g}" if name in number else "" for name, unit in COLUMNS.values()]
        waiting = {reason: number.get(STALL.format(reason), 0) for reason in STALLS}
        most = sorted(STALLS, key=lambda reason: -waiting[reason])[:3]
        waits = ", ".join(f"{reason} {waiting[reason]:.1f}" for reason in most if waiting[reason])
        kernel = row["Kernel Name"].removeprefix("void ").split("(")[0][:40]
        found.append([*(case.groups() if case else [""] * 3), kernel, *cells, waits])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", action="store_true", help="print the metrics' names")
    parser.add_argument("--table", type=Path, help="print the CSV as a table")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS))
    elif options.table is not None:
        table = Table(title="a kernel a row, caches empty", title_justify="left")
        for column in ("backend", "filters", "B", "kernel", *COLUMNS, "warps that wait, and for what"):
            table.add_column(column)
        with options.table.open(newline="") as lines:
            for row in rows(lines):
                table.add_row(*row)
        Console(width=170).print(table)
    elif not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    else:
        launch()
    return 0


if __name__ == "__main__":
    sys.exit(main())

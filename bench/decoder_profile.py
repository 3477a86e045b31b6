"""Where the time of a decoding step goes on an NVIDIA GPU: `python -m bench.decoder_profile`, see gpu_check.sh.

Models and methods are those of `genarm bench`. Warm, it times steps that nothing watches, then records as many with
torch.profiler and writes `decoder_profile-BASE+ARM.json` into --out. A step goes from the end of one copy of drawn
tokens to the host, of which there is one a step, to the end of the next. Kernels are told apart by their names:
attention made of matrix products counts as those, a conversion between dtypes as a copy.
"""

import argparse
import dataclasses
import functools
import gc
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from genarm import GenarmError
from genarm.benchmark import speed as benchmark
from genarm.benchmark.machine import machine, read_bandwidth
from genarm.decoding.provision import ModelPath
from genarm.models import loading

METHODS = [name for name in benchmark.METHODS if name not in benchmark.SLOW]
DEVICE, ACTIVITY, RECORDED = "cuda", ProfilerActivity.CUDA, DeviceType.CUDA
_SETTLE = 8  # steps before those that count: the host gets ahead of the device
_ROUNDS = 5
_TOP = 25
_TO_HOST = "Memcpy DtoH"

# The first that matches. A fused kernel's name lists all that it does; attention kernels may be CUTLASS's.
KINDS = (
    ("elementwise", r"^triton_(poi|red|per|for)_"),
    ("ours, sampling", r"\b(tile_pass|row_pass|whole_row_pass|whole_pass|cluster_\w+)\b"),
    ("ours, linear", r"\bshared_linear"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|^triton_tem_"),
    ("copies", r"^mem(cpy|set)|direct_copy_kernel|CatArray"),
    ("elementwise", r"elementwise|reduce|softmax|index|gather|scatter"),
)


class Interval(NamedTuple):
    """A kernel or a copy on the GPU; microseconds."""

    name: str
    stream: int
    start: float
    end: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def short(name: str) -> str:
    """A kernel's name without its namespaces, cut where types and arguments go on."""
    return re.sub(r"(\w+|\(anonymous namespace\)|<unnamed>)::", "", name.removeprefix("void "))[:90]


def summary(intervals: Sequence[Interval], steps: int) -> dict[str, Any]:
    """Of the last `steps` steps: microseconds and counts, means a step; `longest_gap_us` the longest of all.

    Busy: anything runs. Two streams: something runs on each of at least two. What runs side by side counts in full, so
    that the kinds may add up to more than a step.
    """
    ends = sorted(one.end for one in intervals if one.name.startswith(_TO_HOST))
    if len(ends) <= steps:
        raise ValueError(f"{len(ends)} copies to the host were recorded, which is too few for {steps} steps")
    begin, end = ends[-1 - steps], ends[-1]
    inside = [one for one in intervals if one.start >= begin and one.end <= end]

    edges = [(one.start, 1, one.stream) for one in inside] + [(one.end, -1, one.stream) for one in inside]
    running: Counter[int] = Counter()  # by stream; at one moment, what ends comes before what begins
    gaps, two_streams, last = [], 0.0, begin
    for time, change, stream in sorted(edges):
        streams = len(+running)
        if streams == 0 and time > last:
            gaps.append(time - last)
        if streams > 1:
            two_streams += time - last
        running[stream] += change
        last = time

    kinds: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    names: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for one in inside:
        kind = kind_of(one.name)
        for total in (kinds[kind], names[short(one.name), kind]):
            total[0] += 1
            total[1] += one.end - one.start

    def a_step(total: float) -> float:
        return round(total / steps, 3)

    def rows(totals: dict[Any, list[float]]) -> list[list[Any]]:
        by_time = sorted(totals.items(), key=lambda item: -item[1][1])
        return [[key, *map(a_step, total)] for key, total in by_time]

    return {
        "step_us": a_step(end - begin),
        "busy_us": a_step(end - begin - sum(gaps)),
        "idle_us": a_step(sum(gaps)),
        "gaps": a_step(len(gaps)),
        "longest_gap_us": round(max(gaps, default=0.0), 3),
        "two_streams_us": a_step(two_streams),
        "kernels": a_step(sum(not one.name.startswith(("Memcpy", "Memset")) for one in inside)),
        "kinds": rows(kinds),
        "names": [[*key, *total] for key, *total in rows(names)[:_TOP]],
    }


def record(run: Callable[[], object], trace: Path | None = None) -> list[Interval]:
    """What ran on the GPU meanwhile; `trace`: also in full, as chrome://tracing reads it."""
    with profile(activities=[ACTIVITY]) as profiler:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return intervals_of(profiler.events())


def intervals_of(events: Iterable[Any]) -> list[Interval]:
    return [
        Interval(event.name, event.device_resource_id, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == RECORDED and not event.is_user_annotation
    ]


@contextmanager
def warm(
    models: benchmark._Bench, method: str, batch: int, tokens: int
) -> Iterator[tuple[Callable[[int], object], list[ModelPath]]]:
    """Decodes to so many tokens, at most `tokens`: nothing is left to compile, allocate or capture. With how each model
    is run.
    """
    gc.collect()
    torch.cuda.empty_cache()
    with models._run(method, batch) as (run, decoder):
        for new in (2, tokens, tokens):
            run(new)
        yield run, decoder.paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="llama-8b", help="a folder or hub name, or a shape of `genarm bench`")
    parser.add_argument("--arm", action="append", help="likewise, or lora:RANK; repeatable; default llama-1b")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default 1")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; default genarm")
    parser.add_argument("--steps", type=int, default=32, help="steps that are recorded")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the JSON; default this one")
    parser.add_argument("--trace", action="store_true", help="keep each trace in full, some megabytes of .json.gz")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    for name in ("steps", "prompt_tokens", *(["batch"] if options.batch else [])):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    try:
        profiles, title = measure(options)
    except GenarmError as error:
        parser.error(str(error))
    show(profiles, title)
    return 0


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    base, arms = options.base, options.arm or ["llama-1b"]
    runs = [(batch, method) for batch in options.batch or [1] for method in options.method or ["genarm"]]
    tokens = options.steps + _SETTLE
    options.out.mkdir(parents=True, exist_ok=True)
    dtype = loading.resolve_dtype("bfloat16")
    models = benchmark._Bench(base, arms, DEVICE, dtype, options.prompt_tokens, tokens, rounds=_ROUNDS)
    models.require_fast_path()
    about = {
        **machine(DEVICE),
        "read_gb_s": round(read_bandwidth(DEVICE), 1),
        "base": base,
        "arms": arms,
        "dtype": "bfloat16",
        "prompt_tokens": options.prompt_tokens,
        "steps": options.steps,
        "unit": "microseconds and counts a step; kinds and names: count, microseconds",
    }
    unrecorded = {}
    for batch, method in runs:  # all of them before the profiler is loaded
        with warm(models, method, batch, tokens) as (run, _):
            seconds = [models._seconds(run, tokens) - models._seconds(run, 1) for _ in range(_ROUNDS)]
        del run  # and the decoder behind it
        unrecorded[batch, method] = round(1e6 * statistics.median(seconds) / (tokens - 1), 3)

    name = "decoder_profile-" + "+".join(Path(one.replace(":", "-")).name for one in (base, *arms))
    profiles: list[dict[str, Any]] = []
    for batch, method in runs:
        trace = options.out / f"{name}-{method}-{batch}.trace.json.gz" if options.trace else None
        with warm(models, method, batch, tokens) as (run, paths):
            found = summary(record(functools.partial(run, tokens), trace), options.steps)
        del run
        floor = round(models.floor_bytes_of(method) / about["read_gb_s"] / 1e3, 3)
        measured = {"unrecorded_us": unrecorded[batch, method], "floor_us": floor, **found}
        of_models = [dataclasses.asdict(path) for path in paths]
        profiles.append({"method": method, "batch": batch, **measured, "paths": of_models})
        save(options.out / f"{name}.json", about, profiles)
    return profiles, f"{base} + {', '.join(arms)}, {about['device']}, {about['machine']}, commit {about['commit']}"


def save(path: Path, about: dict[str, Any], profiles: Sequence[dict[str, Any]]) -> None:
    """One field a line."""

    def fields(of: dict[str, Any]) -> str:
        return ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in of.items())

    rows = ",\n".join(f"{{{fields(one)}}}" for one in profiles)
    path.write_text(f'{{{fields(about)},\n"profiles": [\n{rows}\n]}}\n')


def show(profiles: Sequence[dict[str, Any]], title: str) -> None:
    """Microseconds a step: of the whole by column, then of kernels by their kind and name."""
    console = Console(width=150)
    numbers = [key for key, value in profiles[0].items() if isinstance(value, float)]
    table = Table(title=f"{title}: microseconds and counts a step", title_justify="left")
    for column in ("method", "batch", *numbers):
        table.add_column(column.removesuffix("_us").replace("_", " "), justify="right")
    for one in profiles:
        table.add_row(one["method"], str(one["batch"]), *(f"{one[key]:.1f}" for key in numbers))
    for one in profiles:
        kernels = Table(title=f"{one['method']}, batch {one['batch']}", title_justify="left")
        for column in ("kernels", "of kind", "count", "us"):
            kernels.add_column(column, justify="left" if column in ("kernels", "of kind") else "right")
        for kind, count, us in one["kinds"]:
            kernels.add_row("all", kind, f"{count:.1f}", f"{us:.1f}")
        kernels.add_section()
        for kernel, kind, count, us in one["names"]:
            kernels.add_row(kernel, kind, f"{count:.1f}", f"{us:.1f}")
        console.print(kernels)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

"""Kernel time of a step on an NVIDIA GPU: `python -m bench.gpu_kernels [--out DIR] [--tune]`, a stage of gpu_check.sh.

What is timed: steps captured in a CUDA graph, as a decode loop launches them, so that Python and the launches' cost on
the host are out of it; bfloat16 logits, log-probabilities on. A replay's time over its steps, median and p20 to p80 of
the replays. Cold: the steps go round more logits than three L2 caches hold. Warm: one set again and again, which the L2
holds where it is small enough; a decode loop, whose models have just written the logits, is between the two.

Baselines are captured alike. Peers get the float32 combination, and no log-probabilities to compute. A mask takes out
about half of the tokens, by whole tiles or each by itself; only the backends here are timed with one. `--tune` times
the kernels at other shapes of launch instead: Triton's numbers of warps, CUDA's blocks a row.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.baselines import compiled, eager
from genarm.benchmark.machine import machine
from genarm_kernels import available_backends, guided_step, row_seed
from genarm_kernels.testing import make_logits

VOCABS, BATCHES, ARMS = (128256, 32000, 50257, 151936, 256000), (1, 8, 64, 256), (1, 2, 3)
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "k+p": {"top_k": 50, "top_p": 0.9},
    "k+p+min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "p=0.9": {"top_p": 0.9},
}
MASKS, MASKED_BATCHES, MASKED_FILTERS = ("tiles", "scattered"), (8, 64), ("none", "k+p")
_TILE = 1024  # tokens that the kernels read at once
MAIN_VOCAB = 128256
TEMPERATURE, WEIGHT = 0.8, 0.7
PLOTTED_BATCHES = (8, 64)  # over V
_DISTINCT_ROWS = 17
_STEPS, _REPLAYS = 20, 15
DEVICE = "cuda"

# Microseconds on an H200: V = 128256, N = 1, peaked rows, cold. "auto" is to meet them.
TARGETS = {
    "triton": {("none", 1): 9, ("none", 64): 14, ("none", 256): 42, ("k+p", 1): 14, ("k+p", 64): 26, ("k+p", 256): 75},
    "cuda": {
        **{("none", batch): bound for batch, bound in ((1, 6), (8, 7), (64, 12), (256, 38))},
        **{("k+p+min-p", batch): bound for batch, bound in ((1, 10), (8, 12), (64, 20), (256, 55))},
    },
}
TIMES_FASTER = {"triton": (("eager", "p=0.9", 20), ("flashinfer", "k+p", 3)), "cuda": (("flashinfer", "k+p", 5),)}
# On the CUDA backend flat rows cost at most twice what peaked ones may, and N = 3 at B = 256 1.3 times its floor of 61.
FLAT, THREE_ARMS = 2, 1.3 * 61


class Case(NamedTuple):
    vocab: int
    batch: int
    arms: int
    filters: str
    logits: str
    cache: str
    mask: str = "none"

    @property
    def bytes_read(self) -> int:
        """The floor: every operand once, and the mask. Log-probabilities need the masked tokens too."""
        mask = 0 if self.mask == "none" else self.batch * -(-self.vocab // 32) * torch.int32.itemsize
        return self.vocab * self.batch * (1 + self.arms) * torch.bfloat16.itemsize + mask

    @property
    def at_main_shape(self) -> bool:
        """Where baselines are timed, and targets set."""
        return (self.vocab, self.arms, self.logits, self.mask) == (MAIN_VOCAB, 1, "peaked", "none")


class Time(NamedTuple):
    """Microseconds a step."""

    median: float
    p20: float
    p80: float


Step = Callable[[Tensor, Sequence[Tensor], int], Any]


def cases() -> Iterator[Case]:
    shapes = [(vocab, batch, 1, "peaked") for vocab, batch in itertools.product(VOCABS, BATCHES)]
    shapes += [(MAIN_VOCAB, batch, arms, "peaked") for batch, arms in itertools.product(BATCHES, ARMS[1:])]
    shapes += [(MAIN_VOCAB, batch, 1, "flat") for batch in BATCHES]
    for (vocab, batch, arms, logits), filters in itertools.product(shapes, FILTERS):
        for cache in ("cold", "warm"):
            yield Case(vocab, batch, arms, filters, logits, cache)
    for mask, batch, filters in itertools.product(MASKS, MASKED_BATCHES, MASKED_FILTERS):
        for cache in ("cold", "warm"):
            yield Case(MAIN_VOCAB, batch, 1, filters, "peaked", cache, mask)


def sampling_of(case: Case) -> dict[str, Any]:
    sampling = {"weights": [WEIGHT] * case.arms, "temperature": TEMPERATURE, **FILTERS[case.filters]}
    return sampling if case.mask == "none" else {**sampling, "token_mask": token_mask(case)}


def token_mask(case: Case) -> Tensor:
    """int32 `[B, words]`, 32 tokens a word: every other tile allowed as a whole, or each token with probability 1/2."""
    shape = (case.batch, -(-case.vocab // 32))
    if case.mask == "tiles":
        allowed = torch.arange(shape[1]) // (_TILE // 32) % 2 == 0
        words = -allowed.long().expand(shape)
    else:
        words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(case.vocab))
    return words.to(DEVICE, torch.int32).contiguous()


def subjects(case: Case) -> dict[str, Step]:
    """What runs at a case: every GPU backend; at the main shape what people use today, and the peers that are here."""
    sampling = sampling_of(case)
    found: dict[str, Step] = {
        name: functools.partial(_ours, name, sampling) for name in available_backends() if name in ("triton", "cuda")
    }
    if not case.at_main_shape:
        return found
    found["eager"] = lambda base, arms, _: eager(base, arms, **sampling)
    if case.batch == 64:
        found["compiled"] = lambda base, arms, _: compiled(base, arms, **sampling)
    if case.filters == "k+p":
        found |= {name: peer for name, peer in (("flashinfer", _flashinfer()), ("vllm", _vllm())) if peer}
    return found


def _ours(name: str, sampling: dict[str, Any], base: Tensor, arms: Sequence[Tensor], position: int) -> Any:
    return guided_step(base, arms, position=position, backend=name, **sampling)


def _combined(base: Tensor, arms: Sequence[Tensor]) -> Tensor:
    z = base.float()
    for arm in arms:
        z.add_(arm, alpha=WEIGHT)
    return z.div_(TEMPERATURE)


@functools.cache
def _flashinfer() -> Step | None:
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits
    except ImportError:
        return None
    return lambda base, arms, _: top_k_top_p_sampling_from_logits(_combined(base, arms), **FILTERS["k+p"])


@functools.cache
def _vllm() -> Step | None:
    """vLLM's Triton filter, then its draw by a race of exponentials."""
    try:
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
    except ImportError:
        return None
    values = FILTERS["k+p"]

    def step(base: Tensor, arms: Sequence[Tensor], _: int) -> Tensor:
        k = torch.full((len(base),), values["top_k"], dtype=torch.int32, device=base.device)
        p = torch.full((len(base),), values["top_p"], device=base.device)
        kept = apply_top_k_top_p_triton(_combined(base, arms), k, p).softmax(-1)
        return kept.div_(torch.empty_like(kept).exponential_()).argmax(-1)

    return step


# ---- Timing --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def distinct(vocab: int, logits: str) -> Tensor:
    x = make_logits("peaked", (_DISTINCT_ROWS, vocab), seed=vocab, device="cpu")
    if logits == "flat":  # all within 0.1: nothing to bound a filter with
        x = 0.1 * torch.rand(_DISTINCT_ROWS, vocab, generator=torch.Generator().manual_seed(vocab)) - 0.05
    return x.to(DEVICE, torch.bfloat16)


def inputs(case: Case, sets: int) -> list[tuple[Tensor, list[Tensor]]]:
    rows = sets * case.batch * (1 + case.arms)
    pool = distinct(case.vocab, case.logits).repeat(-(-rows // _DISTINCT_ROWS), 1)[:rows]
    chunks = pool.split(case.batch)
    step = 1 + case.arms
    return [(chunks[i], list(chunks[i + 1 : i + step])) for i in range(0, len(chunks), step)]


def time_of(case: Case, step: Step) -> Time:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, -(-3 * l2 // case.bytes_read)) if case.cache == "cold" else 1
    data = inputs(case, sets)
    return graph_time(lambda position: step(*data[position % sets], position), max(_STEPS, sets))


def graph_time(call: Callable[[int], Any], calls: int) -> Time:
    """Of call(0) ... call(calls - 1) in one CUDA graph, the time of one."""
    side = torch.cuda.Stream()  # a capture needs one, warmed up
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for position in range(2):
            call(position)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for position in range(calls):
            call(position)
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPLAYS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * start.elapsed_time(end) / calls for start, end in events)
    at = [times[round(share * (len(times) - 1))] for share in (0.5, 0.2, 0.8)]
    return Time(*(round(x, 2) for x in at))


def check(case: Case, step: Step) -> None:
    """AssertionError unless a backend draws the reference's tokens, in up to 4 rows."""
    base, arms = inputs(case, 1)[0]
    got = step(base, arms, 3)
    rows = torch.linspace(0, case.batch - 1, min(4, case.batch), device=DEVICE).long()
    sampling = sampling_of(case)
    if "token_mask" in sampling:
        sampling["token_mask"] = sampling["token_mask"][rows]
    seed = torch.tensor([row_seed(0, b) for b in rows.tolist()], device=DEVICE)
    law = guided_step(base[rows], [arm[rows] for arm in arms], seed=seed, position=3, backend="reference", **sampling)
    assert torch.equal(got.token[rows], law.token), f"{case}: {got.token[rows].tolist()}, {law.token.tolist()}"
    for name in ("logprob", "log_mass", "base_logprob", "arm_logprobs"):
        torch.testing.assert_close(
            getattr(got, name)[rows], getattr(law, name), rtol=0, atol=1e-4, msg=f"{case} {name}"
        )


def measure(case: Case, name: str, step: Step) -> Time | None:
    """None, and a line that says why, where it does not run: the others' figures are worth having."""
    try:
        if name in available_backends():
            check(case, step)
        if name == "compiled":
            torch.compiler.reset()  # its limit of graphs counts over cases
        return time_of(case, step)
    except Exception as error:
        print(f"{case} {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        return None


def copy_bandwidth() -> float:
    """GB/s, read and written, of a copy of 1 GiB."""
    x = torch.ones(1 << 28, device="cuda")
    y = torch.empty_like(x)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y.copy_(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(2 * x.nbytes / statistics.median(times) / 1e6, 1)


def call_time(name: str) -> float:
    """Microseconds that a call outside a graph keeps Python busy, log-probabilities on, one row of 1,000 tokens."""
    case = Case(1000, 1, 1, "k+p", "peaked", "warm")
    base, arms = inputs(case, 1)[0]
    step = subjects(case)[name]
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for position in range(100):  # fewer than a stream's queue holds: none waits for the device
            step(base, arms, position)
        times.append((time.perf_counter() - start) / 100)
    return round(1e6 * statistics.median(times), 2)


# ---- Report --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    calls = {name: call_time(name) for name in available_backends() if name in ("triton", "cuda")}
    return {**machine("cuda"), "copy_gb_s": copy_bandwidth(), "call_us": calls}


def show(case: Case, times: dict[str, Time], copy_gb_s: float, table: Table) -> None:
    for name, t in times.items():
        gb_s = case.bytes_read / t.median / 1e3
        cells = [*map(str, case), name, f"{t.median:.1f}", f"{t.p20:.1f}-{t.p80:.1f}"]
        table.add_row(*cells, f"{gb_s:.0f}", f"{100 * gb_s / copy_gb_s:.0f}")


def verdicts(results: list[tuple[Case, dict[str, Time]]]) -> Iterator[tuple[str, float, float | None]]:
    """What is claimed, its bound and its measure; ratios are to be at least, microseconds at most."""
    found = dict(results)

    def of(name: str, filters: str, batch: int, arms: int = 1, logits: str = "peaked") -> float | None:
        times = found.get(Case(MAIN_VOCAB, batch, arms, filters, logits, "cold"), {})
        return times[name].median if name in times else None

    for name, bounds in TARGETS.items():
        for (filters, batch), bound in bounds.items():
            yield f"{name} {filters} B={batch}: us", bound, of(name, filters, batch)
        for rival, filters, bound in TIMES_FASTER[name]:
            mine, theirs = of(name, filters, 64), of(rival, filters, 64)
            yield f"{name} {filters} B=64: times faster than {rival}", bound, theirs / mine if theirs and mine else None
    for (filters, batch), bound in TARGETS["cuda"].items():
        if filters != "none":
            yield f"cuda {filters} B={batch}, flat rows: us", FLAT * bound, of("cuda", filters, batch, logits="flat")
    yield "cuda none B=256, N=3: us", THREE_ARMS, of("cuda", "none", 256, arms=3)


def save(path: Path, about: dict[str, Any], results: list[tuple[Case, dict[str, Time]]]) -> None:
    """One case a line."""
    fields = {**about, "unit": "microseconds: median, p20, p80", "targets": list(verdicts(results))}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in fields.items()]
    rows = ",\n    ".join(json.dumps(case._asdict() | times) for case, times in results)
    path.write_text("\n".join(["{", *lines, '  "cases": [', "    " + rows, "  ]", "}", ""]))


def panels(results: list[tuple[Case, dict[str, Time]]]) -> dict[tuple[str, int, str], dict[int, tuple[Case, Any]]]:
    """What is plotted: by axis ("B" or "V"), the size that is fixed and the filters; then by the size that is not."""
    found: dict[tuple[str, int, str], dict[int, tuple[Case, Any]]] = {}
    for case, times in sorted(results, key=lambda result: (result[0].vocab, result[0].batch)):
        if times and (case.arms, case.logits, case.cache, case.mask) == (1, "peaked", "cold", "none"):
            if case.vocab == MAIN_VOCAB:
                found.setdefault(("B", case.vocab, case.filters), {})[case.batch] = case, times
            if case.batch in PLOTTED_BATCHES:
                found.setdefault(("V", case.batch, case.filters), {})[case.vocab] = case, times
    return found


def plot(path: Path, about: dict[str, Any], results: list[tuple[Case, dict[str, Time]]]) -> None:
    """Microseconds over B and over V: a column for each set of filters, p20 to p80 shaded, the floor dotted."""
    from bench.report import BASELINE_COLOURS, legend, line, plt

    shown = panels(results)
    sizes: dict[tuple[str, int], set[int]] = {}
    for (over, fixed, _), panel in sorted(shown.items()):
        sizes.setdefault((over, fixed), set()).update(panel)
    rows = [row for row, found in sizes.items() if row[0] == "B" or len(found) > 1]
    columns = [name for name in FILTERS if any(name == filters for *_, filters in shown)]
    if not rows:
        return
    size = (1.2 + 3.2 * len(columns), 1.6 + 2.6 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, sharex="row", sharey="row", squeeze=False, layout="constrained"
    )
    colours = {"cuda": "tab:blue", "triton": "tab:green", **BASELINE_COLOURS, "flashinfer": "tab:brown", "vllm": "k"}
    for (i, (over, fixed)), (j, filters) in itertools.product(enumerate(rows), enumerate(columns)):
        axis, panel = axes[i, j], shown.get((over, fixed, filters), {})
        for name, colour in colours.items():
            points = {x: times[name] for x, (_, times) in panel.items() if name in times}
            line(axis, points, name, color=colour, lw=2 if name in ("cuda", "triton") else 1.2)
        floor = {x: case.bytes_read / about["copy_gb_s"] / 1e3 for x, (case, _) in panel.items()}
        axis.plot(floor.keys(), floor.values(), "k:", lw=1.2, label="bytes read / copy bandwidth")
        axis.set_title(f"{'V' if over == 'B' else 'B'}={fixed}, filters: {filters}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = sorted(sizes[over, fixed])
        names = [str(x) if over == "B" else f"{round(x / 1000)}k" for x in ticks]
        axis.set_xticks(ticks, names, fontsize=7, rotation=0 if over == "B" else 60)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(over)
    for axis in axes[:, 0]:
        axis.set_ylabel("µs a step, median")
    legend(figure, "outside lower center")
    what = "guided_step in a CUDA graph, one ARM, bfloat16, cold"
    figure.suptitle(f"{what}\n{about['device']}, torch {about['torch']}, commit {about['commit']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def shapes_of_launch() -> Iterator[tuple[str, str]]:
    """A backend and a shape in words, which is in force until the next one is asked for."""
    ours = available_backends()
    if "triton" in ours:
        from genarm_kernels.backends.triton import launch

        kept = dict(launch.OPTIONS)
        for tile_warps, row_warps in itertools.product((1, 2, 4), (8, 16)):
            launch.OPTIONS[launch.tile_pass] = {"num_warps": tile_warps}
            launch.OPTIONS[launch.row_pass] = {"num_warps": row_warps, "maxnreg": min(255, 2048 // row_warps)}
            launch._launcher.cache_clear()
            yield "triton", f"{tile_warps} + {row_warps} warps"
        launch.OPTIONS.update(kept)
        launch._launcher.cache_clear()
    if "cuda" in ours:
        from genarm_kernels.backends.cuda import _cuda

        for blocks in (0, 2, 4, 8, 16):
            _cuda.force_cluster(blocks)
            yield "cuda", f"{blocks} blocks a row" if blocks else "two launches"
        _cuda.force_cluster(-1)


def tune(out: Path) -> None:
    """The kernels at other shapes of launch, cold, at the main vocabulary."""
    table = Table(title="microseconds a step", title_justify="left")
    grid = [Case(MAIN_VOCAB, batch, 1, f, "peaked", "cold") for batch in (1, 8, 64, 256) for f in FILTERS]
    for column in ("backend", "shape", *(f"{case.filters} B={case.batch}" for case in grid)):
        table.add_column(column)
    about, rows = environment(), []
    for name, shape in shapes_of_launch():
        measured = [measure(case, name, subjects(case)[name]) for case in grid]
        times = [None if t is None else t.median for t in measured]
        rows.append({"backend": name, "shape": shape, "us": times})
        table.add_row(name, shape, *("" if t is None else f"{t:.1f}" for t in times))
        print(rows[-1], flush=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    cases_line = json.dumps([case._asdict() for case in grid])
    (out / "tune.json").write_text(
        f'{{"environment": {json.dumps(about)},\n"cases": {cases_line},\n"rows": [\n  {lines}]}}\n'
    )
    Console(width=200).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON; default bench/results/<device>")
    parser.add_argument("--tune", action="store_true", help="time other shapes of launch instead")
    parser.add_argument("--quick", action="store_true", help="the shapes that have targets only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    device = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
    out = options.out or Path(__file__).parent / "results" / device
    out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        tune(out)
        return 0

    about = environment()
    table = Table(title="\n".join(f"{name}: {value}" for name, value in about.items()), title_justify="left")
    for column in (*Case._fields, "subject", "us", "p20-p80", "GB/s", "% of copy"):
        table.add_column(column, justify="right")
    results: list[tuple[Case, dict[str, Time]]] = []
    try:
        for case in cases():
            if options.quick and not case.at_main_shape:
                continue
            measured = {name: measure(case, name, step) for name, step in subjects(case).items()}
            times = {name: t for name, t in measured.items() if t is not None}
            results.append((case, times))
            show(case, times, about["copy_gb_s"], table)
            print(json.dumps(case._asdict() | times), flush=True)
            save(out / "kernels.json", about, results)  # whatever ends the run, what was measured is there
    finally:
        try:
            plot(out / "kernels.png", about, results)
        except Exception as error:  # must not hide what ended the run
            print(f"no plot: {type(error).__name__}: {error}")
    claims = list(verdicts(results))
    console = Console(width=150)
    console.print(table)
    for text, bound, measured in claims:
        holds = measured is not None and ((measured >= bound) if "times faster" in text else (measured <= bound))
        state = "not measured" if measured is None else "holds" if holds else "MISSED"
        console.print(f"{text}: {measured if measured is None else round(measured, 1)} (bound {bound}) {state}")

    ours = [name for name in available_backends() if name in ("triton", "cuda")]
    failed = [f"{case} {name}" for case, times in results for name in ours if name not in times]
    console.print(f"{len(failed)} cases failed on a backend of ours", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

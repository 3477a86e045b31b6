"""Time of `guided_step` against its baselines: `make bench`, about ten minutes on 2 cores; `bench.report` reads it.

Environment: GENARM_BENCH_DEVICE (cpu, cuda), GENARM_BENCH_THREADS (2), GENARM_BENCH_GRID=tiny (one small case).

What is timed: one call from Python, bfloat16 logits, log-probabilities on. On a GPU the clock waits for the device.
Inputs are made before the clock starts and come cold: each call reads rows of a pool larger than the last-level cache
(at most `_MAX_POOL`) that nothing has read for a whole turn of the pool. It repeats 17 different rows.

Every backend but the reference runs the full grid. To keep within ten minutes, baselines run with one ARM on peaked
rows: torch.compile (seconds a shape) at batch 8, the reference (float64) at batch 1, the others at every batch. A test
spends `_SECONDS` on rounds, but does at least `_MIN_ROUNDS` and at most `_MAX_ROUNDS`.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines import BASELINES, Drawn, why_not_compiled
from genarm.benchmark.machine import machine, read_bandwidth
from genarm_kernels import GuidedStep, available_backends, backends, guided_log_softmax, guided_step, row_seed
from genarm_kernels.testing import make_logits

DEVICE = os.environ.get("GENARM_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
THREADS = int(os.environ.get("GENARM_BENCH_THREADS") or min(2, os.cpu_count() or 1))
TINY = os.environ.get("GENARM_BENCH_GRID") == "tiny"

VOCABS, BATCHES, ARMS = ((1000,), (2,), (1,)) if TINY else ((32000, 128256, 151936, 256000), (1, 8, 64), (1, 2, 3))
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "k=50": {"top_k": 50},
    "p=0.9": {"top_p": 0.9},
    "k+p+min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
TIMED_FILTERS = ("k+p+min-p",) if TINY else tuple(FILTERS)
TEMPERATURE, WEIGHT = 0.8, 0.7
_SECONDS, _MIN_ROUNDS, _MAX_ROUNDS = (0.01, 3, 5) if TINY else (0.2, 5, 200)
_MAX_POOL = 1 << (22 if TINY else 30)  # bytes
_DISTINCT_ROWS = 17  # prime: rows b of base and of each ARM differ for every batch of the grid
_CHECKED_ROWS = 4  # of a batch; a row's draw does not depend on the others
_TOLERANCE = 1e-4  # nats: float32 against float64


@dataclasses.dataclass(frozen=True)
class Case:
    vocab: int
    batch: int
    arms: int
    filters: str
    logits: str

    def __str__(self) -> str:
        return f"V={self.vocab} B={self.batch} N={self.arms} {self.filters} {self.logits}"

    @property
    def sampling(self) -> dict[str, Any]:
        return {"weights": [WEIGHT] * self.arms, "temperature": TEMPERATURE, **FILTERS[self.filters]}

    @property
    def bytes_read(self) -> int:
        """The floor: every operand once."""
        return self.vocab * self.batch * (1 + self.arms) * torch.bfloat16.itemsize


def serving() -> list[str]:
    """The backends that serve DEVICE, the fastest last."""

    def serves(name: str) -> bool:
        try:
            backends.load(name, DEVICE, 1)
        except RuntimeError:
            return False
        return True

    return [name for name in available_backends() if serves(name)]


def subjects(case: Case) -> Iterator[str]:
    compared = case.arms == 1 and case.logits == "peaked"
    batches = {"reference": (1,), "compiled": (2,) if TINY else (8,), "eager": BATCHES, "transformers": BATCHES}
    for name in (*serving(), *BASELINES):
        if name not in batches or (compared and case.batch in batches[name]):
            yield name


def grid() -> Iterator[Any]:
    # Rows of one pool follow one another, and all subjects of a case: what is compared is measured close in time.
    for vocab, logits in itertools.product(VOCABS, ("peaked", "flat")):
        for case in (Case(vocab, *rest, logits) for rest in itertools.product(BATCHES, ARMS, TIMED_FILTERS)):
            for subject in subjects(case):
                yield pytest.param(case, subject, id=f"{case} {subject}".replace(" ", "-").replace("=", ""))


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize(("case", "subject"), list(grid()))
def test_guided_step(benchmark: Any, case: Case, subject: str) -> None:
    if subject == "compiled":
        if reason := why_not_compiled(DEVICE):
            pytest.skip(reason)
        torch.compiler.reset()  # its limit of graphs counts over cases
    torch.manual_seed(0)  # the baselines' generator
    call = caller(case, subject)
    position = itertools.count()
    taken = pool(case.vocab, case.logits)
    check(case, call(*first_rows(case), 0))

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (*taken.take(case), next(position)), {}

    arguments, _ = setup()
    start = clock()
    call(*arguments)
    rounds = max(_MIN_ROUNDS, min(int(_SECONDS / (clock() - start)), _MAX_ROUNDS))
    benchmark.pedantic(call, setup=setup, rounds=rounds)  # two calls have warmed it up
    record(benchmark, case, subject, pool_mib=taken.rows.nbytes >> 20)


@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize("subject", serving())
def test_call_overhead(benchmark: Any, subject: str) -> None:
    """One token of one row: what remains is the way from Python to the kernel and back."""
    case = Case(1, 1, 1, "none", "peaked")
    base, arm = torch.zeros(2, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    rounds, iterations = (3, 5) if TINY else (100, 50)
    call = functools.partial(caller(case, subject), base, [arm], 0)
    assert call().token.tolist() == [0]
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=5)
    record(benchmark, case, subject, pool_mib=0)


def caller(case: Case, subject: str) -> Callable[[Tensor, list[Tensor], int], GuidedStep | Drawn]:
    """What is timed, of (base, arms, position)."""
    sampling = case.sampling
    if subject in BASELINES:
        return lambda base, arms, position: BASELINES[subject](base, arms, **sampling)
    return lambda base, arms, position: guided_step(base, arms, position=position, backend=subject, **sampling)


def check(case: Case, outcome: GuidedStep | Drawn) -> None:
    """AssertionError unless `outcome`, of the case's `first_rows` at position 0, is right in `_CHECKED_ROWS` rows.

    A backend must draw the reference's tokens. A baseline has a generator of its own: at whatever token it drew, its
    log-probabilities must be the reference's, that of the draw included, which the surviving mass is part of.
    """

    def close(name: str, got: Tensor, want: Tensor, tolerance: float | Tensor = 0.0) -> None:
        right = (got.double() - want.double()).abs() <= tolerance
        assert right.all(), f"{case}, {name}: got {got[~right].tolist()}, expected {want[~right].tolist()}"

    rows, law = expected(case)
    if isinstance(outcome, Drawn):
        logp, own = expected_logprobs(case)
        token = outcome.token[rows, None]
        edge = logp.sort(1, descending=True).values.gather(1, law.kept[:, None].long() - 1)
        # Among tokens equal at the filters' edge a baseline may keep one or all: its sort cuts between them.
        equals = ((logp - edge).abs() < _TOLERANCE).sum(1) - 1
        slack = equals * (edge[:, 0] - law.log_mass).exp()
        draw = logp.gather(1, token)[:, 0] - law.log_mass
        close("logprob", outcome.logprob[rows], draw, _TOLERANCE + slack)
        close("own_logprobs", outcome.own_logprobs[rows], torch.cat([x.gather(1, token) for x in own], 1), _TOLERANCE)
        return
    assert (outcome.status == 0).all(), f"{case}: status {outcome.status.tolist()}"
    for name, want in law._asdict().items():
        close(name, getattr(outcome, name)[rows], want, _TOLERANCE if want.is_floating_point() else 0)


@functools.lru_cache(maxsize=1)  # all subjects of a case share it
def expected(case: Case) -> tuple[Tensor, GuidedStep]:
    """The checked rows, and the reference's step of them."""
    rows = torch.linspace(0, case.batch - 1, min(_CHECKED_ROWS, case.batch), device=DEVICE).long()
    base, arms = first_rows(case)
    arms = [arm[rows] for arm in arms]
    seed = torch.tensor([row_seed(0, b) for b in rows.tolist()], device=DEVICE)
    return rows, guided_step(base[rows], arms, seed=seed, position=0, backend="reference", **case.sampling)


@functools.lru_cache(maxsize=1)
def expected_logprobs(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Of the checked rows: log p `[rows, V]` before the filters, and the log-softmax of each operand."""
    rows, _ = expected(case)
    base, arms = first_rows(case)
    operands = [x[rows] for x in (base, *arms)]
    guidance = {"weights": [WEIGHT] * case.arms, "temperature": TEMPERATURE, "backend": "reference"}
    return guided_log_softmax(operands[0], operands[1:], **guidance), [x.float().log_softmax(1) for x in operands]


def first_rows(case: Case) -> tuple[Tensor, list[Tensor]]:
    rows = pool(case.vocab, case.logits).rows[: (1 + case.arms) * case.batch]
    base, *arms = rows.split(case.batch)
    return base, arms


class Pool:
    """Rows of logits `[R, V]`, more than the last-level cache holds; `take` hands them out in turn."""

    def __init__(self, vocab: int, logits: str) -> None:
        shape = (_DISTINCT_ROWS, vocab)
        if logits == "peaked":
            distinct = make_logits("peaked", shape, torch.bfloat16, seed=vocab)
        else:  # all within 0.1: nothing to bound a filter with, and bfloat16 leaves many equals
            generator = torch.Generator().manual_seed(vocab)
            distinct = (0.1 * torch.rand(shape, generator=generator) - 0.05).bfloat16()
        largest = max(BATCHES) * (1 + max(ARMS)) * vocab * torch.bfloat16.itemsize
        size = max(2 * largest, min(last_level_cache() * 5 // 4, _MAX_POOL))
        self.rows = distinct.to(DEVICE).repeat(-(-size // distinct.nbytes), 1)
        self.next = 0

    def take(self, case: Case) -> tuple[Tensor, list[Tensor]]:
        count = (1 + case.arms) * case.batch
        if self.next + count > len(self.rows):
            self.next = 0
        base, *arms = self.rows[self.next : self.next + count].split(case.batch)
        self.next += count
        return base, arms


pool = functools.lru_cache(maxsize=1)(Pool)  # one at a time is in memory


def last_level_cache() -> int:
    """Bytes; a virtual machine reports that of its host."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=64 << 20)


@functools.cache
def environment() -> dict[str, Any]:
    """The machine, and the GB/s of reading what no cache holds."""
    bandwidth = read_bandwidth(DEVICE, min(last_level_cache() * 5 // 4, _MAX_POOL))
    return {**machine(DEVICE), "read_gb_s": round(bandwidth, 2)}


def record(benchmark: Any, case: Case, subject: str, pool_mib: int) -> None:
    benchmark.group = str(case)
    benchmark.extra_info |= environment() | dataclasses.asdict(case) | {"subject": subject, "pool_mib": pool_mib}
    if benchmark.stats is None:  # --benchmark-disable
        return
    times = benchmark.stats.stats.sorted_data
    speed = case.bytes_read / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "p20": times[round(0.2 * (len(times) - 1))],
        "p80": times[round(0.8 * (len(times) - 1))],
        "bytes": case.bytes_read,
        "gb_s": speed / 1e9,
        "percent_of_read_bandwidth": 100 * speed / 1e9 / environment()["read_gb_s"],
    }

"""The CPU core against the reference on calls of every kind, and what only it has: instruction sets, threads."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from genarm_kernels import GuidedStep, available_backends, guided_log_softmax, guided_step
from genarm_kernels.backends import cpu, reference
from genarm_kernels.decoder_step import DecoderStep
from genarm_kernels.layers import Decoder, DecoderLayer, Linear, Norm, quantize_int8
from genarm_kernels.outputs import empty_step
from genarm_kernels.parameters import Inputs, LayerPart, Sampling, SharedLayer
from genarm_kernels.shared_linear import shared_linear
from genarm_kernels.testing import make_logits, random_case

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason=f"no CPU core: {cpu.why_unavailable()}")
ISAS = cpu._cpu.supported_isas() if "cpu" in available_backends() else ()
FLOATS = ("logprob", "log_mass", "base_logprob", "arm_logprobs")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    isa, threads = cpu._cpu.isa(), torch.get_num_threads()
    yield
    cpu._cpu.set_isa(isa)
    torch.set_num_threads(threads)


# --- Calls of every kind ----------------------------------------------------------------------------------------------


def spoil(case: dict[str, Any], draw: random.Random) -> None:
    """Changes one argument into something that a careless caller might hand in, wrong or merely unusual."""
    base, arms = case["base_logits"], case["arm_logits"]
    rows, width = base.shape
    name = draw.choice(("temperature", "top_p", "min_p", "base_weight", "top_k", "seed", "position", "weights"))
    number = draw.choice(
        (-1.0, 0.0, 1.5, 1e-45, 1e-30, 1e30, 1e39, float("nan"), float("inf"), 2**63, 2**64, -(2**63), 3)
    )
    wrong = draw.choice(
        (None, "1", True, [0.5], torch.ones(rows, 2), torch.ones(rows + 1), torch.ones(rows).bool(), 1j)
    )
    change = draw.randrange(16)
    if change == 0:
        case[name] = number
    elif change == 1:
        case[name] = wrong
    elif change == 2:
        case[name] = torch.full((rows,), 1, dtype=draw.choice((torch.float64, torch.int16, torch.int32, torch.float16)))
    elif change == 3:
        case[name] = torch.tensor(1 if name in ("top_k", "seed", "position") else 0.5).expand(rows)  # stride 0
    elif change == 4:
        case["base_logits"] = draw.choice((base.double(), base.long(), base[0], base[:, :0], base.tolist()))
    elif change == 5:
        case["base_logits"] = base.repeat(1, 2)[:, ::2]  # the last dimension is not contiguous
    elif change == 6:
        case["base_logits"], case["arm_logits"] = base[:0], [arm[:0] for arm in arms]  # B = 0: parameters may not fit
    elif change == 7:
        case["base_logits"] = base[:1].expand(rows, width)  # row stride 0
    elif change == 8:
        case["arm_logits"] = draw.choice(
            (None, "x", [*arms, base[:, : width // 2]], [*arms, base[1:]], [*arms, 0.5], base)
        )
    elif change == 9:
        case["vocab_size"] = draw.choice((0, -3, 1, width, width + 1, 2**40, 1.5, None, True))
    elif change == 10:
        words = draw.choice((0, 1, (width + 31) // 32))
        mask = torch.full((rows, words), draw.choice((-1, 0, 1)), dtype=draw.choice((torch.int32, torch.int64)))
        case["token_mask"] = draw.choice((mask, mask[:, 0] if words else mask, mask.bool(), [[1]], mask[1:]))
    elif change == 11:
        case["token_mask"] = torch.randint(-(2**31), 2**31, (2 * width, rows)).int().t()[:, ::2]  # strided words
    elif change == 12:
        scale = draw.choice((1e-30, 1e4, 1e30, 1e38))
        case["base_logits"] = (base.float() * scale).to(base.dtype)
    elif change == 13:
        case["logprobs"] = draw.choice((False, False, None, 1))
    elif change == 14:
        case["base_logits"] = base.clone().requires_grad_()
    else:
        shape = torch.Size((rows, len(arms)))
        case["weights"] = torch.full(shape, draw.choice((1.0, 0.0, float("nan"), float("inf"), -1e38, 1e-40)))


def outcome(call: Any, case: dict[str, Any], backend: str) -> Any:
    try:
        return call(**case, backend=backend)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def bits(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.dtype != torch.float32 else x.nan_to_num(nan=123.0).view(torch.int32)


def assert_same_bits(ours: Any, theirs: Any, about: str) -> None:
    fields = GuidedStep._fields if isinstance(theirs, GuidedStep) else ("the distribution",)
    for field, a, b in zip(fields, *((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(bits(a), bits(b))), f"{field} differs: {about}"


def assert_close(ours: torch.Tensor, law: torch.Tensor, about: str) -> None:
    """Up to float32 sums, and temperatures so small that they magnify the rounding of z."""
    assert torch.equal(ours.isnan(), law.isnan()), f"NaN elsewhere: {about}"
    torch.testing.assert_close(ours, law, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text: f"{text} {about}")


def compare(seed: int) -> tuple[int, int]:
    """One call on every instruction set and on the reference. Returns its rows, and how many of them differ."""
    draw = random.Random(seed)
    case = random_case(seed)
    # An argument spoilt before may not allow to spoil the next one.
    with contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            spoil(case, draw)
    law, about = outcome(guided_step, case, "reference"), f"random call {seed}"
    results = []
    for isa in ISAS:
        cpu._cpu.set_isa(isa)
        results.append(outcome(guided_step, case, "cpu"))
    if isinstance(law, str):
        assert results == [law] * len(ISAS), about
        return 0, 0
    for result in results[1:]:
        assert_same_bits(result, results[0], about)
    ours, rows = results[0], len(law.token)
    same = (ours.token == law.token) & (ours.kept == law.kept) & (ours.status == law.status)
    assert torch.equal(ours.status, law.status), about
    for field in FLOATS:
        if getattr(law, field) is not None:
            assert_close(getattr(ours, field)[same], getattr(law, field)[same], f"{field} of {about}")

    if isinstance(case["base_logits"], torch.Tensor):
        case["base_logits"] = case["base_logits"].detach()
    names = ("base_logits", "arm_logits", "weights", "base_weight", "temperature", "token_mask", "vocab_size")
    whole = {name: case[name] for name in names if name in case}
    law_of_all, ours_of_all = (outcome(guided_log_softmax, whole, name) for name in ("reference", "cpu"))
    if isinstance(law_of_all, str):
        assert ours_of_all == law_of_all, about
    else:
        assert_close(ours_of_all, law_of_all, f"distribution of {about}")
    return rows, rows - int(same.sum())


@pytest.mark.parametrize("calls", [2_000, pytest.param(110_000, marks=pytest.mark.slow)])
def test_any_call_answers_as_the_reference(calls: int) -> None:
    """Of 110,000 calls some 200,000 rows get a token or a status on every instruction set; see `make test-slow`."""
    outcomes = [compare(seed) for seed in range(1_000_000, 1_000_000 + calls)]
    rows, different = (sum(column) for column in zip(*outcomes, strict=True))
    print(f"{rows} rows, {different} differ")
    assert rows > calls and different * 10_000 < max(rows, 10_000)


@pytest.mark.parametrize("vocab", [32000, pytest.param(128256, marks=pytest.mark.slow)])
def test_large_rows_answer_as_the_reference(vocab: int) -> None:
    """Candidates beyond the few that random calls have: crowded thresholds, searches without room beside them."""
    draw, rows, different, kept_elsewhere = random.Random(vocab), 0, 0, 0
    for seed in range(24):
        kinds = draw.choices(("peaked", "flat", "normal", "equal"), (3, 3, 2, 1), k=2)
        base, arm = (
            make_logits(kind, (6, vocab), draw.choice((torch.bfloat16, torch.float32)), 2 * seed + i)
            for i, kind in enumerate(kinds)
        )
        options = {
            "weights": draw.choice((0.5, 1.0, -0.3)),
            "temperature": draw.choice((0.1, 0.7, 1.0, 3.0)),
            "top_k": torch.tensor(draw.choices((0, 1, 50, 1000, 5000, 20000, vocab - 1), k=6)),
            "top_p": torch.tensor(draw.choices((1.0, 0.9, 0.5, 0.99, 0.001), k=6)),
            "min_p": draw.choice((0.0, 0.0, 0.05, 1e-6)),
            "seed": seed,
        }
        law = guided_step(base, [arm.to(base.dtype)], **options, backend="reference")
        ours = guided_step(base, [arm.to(base.dtype)], **options, backend="cpu")
        rows, different = rows + 6, different + int((ours.token != law.token).sum())
        assert torch.equal(ours.status, law.status)
        # A row of V tokens has a boundary every V-th of its mass, where sums of float32 can differ by a token.
        far = (ours.kept - law.kept).abs() > 1 + law.kept * 1e-4
        kept_elsewhere += int((ours.kept != law.kept).sum())
        assert not far.any(), f"case {seed}: kept {ours.kept.tolist()} against {law.kept.tolist()}"
        torch.testing.assert_close(ours.log_mass, law.log_mass, rtol=1e-5, atol=1e-5)
    print(f"{rows} rows, {different} tokens and {kept_elsewhere} counts differ")
    assert different == 0


# --- Instruction sets and threads -------------------------------------------------------------------------------------


def test_threads_do_not_enter() -> None:
    """Rows shared out, one row's tiles shared out, both: the same bits."""
    for rows in (1, 3, 8):
        base, arm = (make_logits("peaked", (rows, 50_000), torch.bfloat16, seed) for seed in (1, 2))
        for filters in ({}, {"top_p": 0.9}, {"top_k": 40000, "top_p": 0.95}):
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                call = {"weights": 0.5, "backend": "cpu"}
                results.append((guided_step(base, [arm], **call, **filters), guided_log_softmax(base, [arm], **call)))
            for step, distribution in results[1:]:
                assert_same_bits(step, results[0][0], f"{rows} rows, {filters}")
                assert torch.equal(distribution, results[0][1])


def test_many_threads_call_at_once() -> None:
    torch.set_num_threads(2)
    cases = [random_case(seed) for seed in range(40)]
    big = {
        "base_logits": make_logits("peaked", (4, 40_000)),
        "arm_logits": [make_logits("flat", (4, 40_000))],
        "top_p": 0.9,
    }
    cases += [{**big, "seed": seed} for seed in range(8)]
    alone = [guided_step(**case, backend="cpu") for case in cases]
    together: list[list[GuidedStep]] = [[] for _ in range(8)]

    def work(mine: list[GuidedStep]) -> None:
        mine.extend(guided_step(**case, backend="cpu") for case in cases)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in together:
        assert len(mine) == len(cases)
        for result, expected in zip(mine, alone, strict=True):
            assert_same_bits(result, expected, "eight threads")


def test_the_interpreter_is_free_meanwhile() -> None:
    """A thread counts on while another is in the core, at least once in many calls, however busy the machine is."""
    x = torch.zeros(4, 100_000)
    inputs = Inputs(x, [x], 100_000, weights=[1.0], base_weight=1.0, temperature=0.7, token_mask=None)
    sampling = Sampling(top_k=0, top_p=0.9, min_p=0.0, seed=11, position=0, logprobs=True)
    call = {"place": 1, "dtype": 0, "rows": 4, "inputs": inputs, "sampling": sampling}
    outputs = empty_step(inputs, True)
    count, counted_on = 0, False

    def work() -> None:
        nonlocal counted_on
        for _ in range(300):
            before = count
            cpu._cpu.guided_step(**call, outputs=outputs)
            if counted_on := count > before:
                return

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)  # the interpreter takes no thread off: each hands over where it waits, or in the core
    try:
        thread.start()
        while thread.is_alive():
            count += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert counted_on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_draws() -> None:
    """The parent's threads are not there: the child works on its own, instead of waiting for them."""
    torch.set_num_threads(2)
    base = make_logits("peaked", (4, 40_000))
    expected = guided_step(base, top_p=0.9, backend="cpu").token.tolist()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        # Tensors that exist already, and no operation of torch's: those do wait for the parent's threads.
        os.write(write, bytes(repr(guided_step(base, top_p=0.9, backend="cpu").token.tolist()), "ascii"))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1000).decode() == repr(expected)


def test_denormal_numbers_count_whatever_the_host_flushes() -> None:
    x = torch.tensor([[1e-40, 3e-40, 2e-40]])
    results = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        results.append(guided_step(x, temperature=0, backend="cpu").token.tolist())
        results.append(guided_step(x, min_p=torch.tensor([1e-40]), backend="cpu").kept.tolist())
        linear = cpu.linear(Linear(x.t().contiguous()))
        assert linear is not None
        y = linear(torch.ones(1, 1, 1))
        torch.set_flush_denormal(False)
        results.append([y.count_nonzero().item()])
    assert results == 2 * [[1], [3], [3]]


def test_the_environment_forces_an_instruction_set() -> None:
    def run(script: str, isa: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GENARM_CPU_ISA": isa, "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-c", script, cpu._cpu.__file__]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    for isa in ISAS:
        assert run(f"{CORE_ALONE}\nprint(core.isa())", isa).stdout.split() == [isa]
    script = """
import torch, genarm_kernels as g
from genarm_kernels.backends import cpu
print(cpu._cpu.isa(), g.available_backends()[-1])
g.guided_step(torch.zeros(1, 2), backend="cpu")
"""
    refused = run(script, "sse9")
    assert refused.stdout.split() == ["None", "reference"]
    assert "GENARM_CPU_ISA names none of what this machine runs: portable" in refused.stderr


def test_scratch_is_a_row_a_thread() -> None:
    """The peak of a process that draws with top-p from 16 rows of 8 million on 2 threads: 64 MB, and 4 % on top."""
    script = """
import resource, torch
from genarm_kernels import guided_step
torch.set_num_threads(2)
x = torch.empty(1, 8_000_000, dtype=torch.bfloat16)
x[0] = torch.arange(8_000_000).remainder_(97)  # in place: no larger tensor has been there before
x = x.div_(97).expand(16, -1)
guided_step(x[:2, :5000], [x[:2, :5000]], top_p=0.9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    guided_step(x, [x], top_k=7_000_000, top_p=0.9).raise_for_status()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 64 * 1.04


CORE_ALONE = """
import ctypes, importlib.util, sys
from types import SimpleNamespace

spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)

class Buffer:  # what the bindings want of a tensor
    def __init__(self, ctype, rows, columns, values=()):
        self.columns, self.array = columns, (ctype * (rows * columns))(*values)
    def data_ptr(self):
        return ctypes.addressof(self.array)
    def stride(self, dimension):
        return (self.columns, 1)[dimension]

f, i32, i64 = ctypes.c_float, ctypes.c_int32, ctypes.c_int64
x = Buffer(f, 3, 60_000, ((v * 7919 % 1009) / 100 for v in range(180_000)))

types = dict(token=i64, logprob=f, log_mass=f, kept=i32, base_logprob=f, arm_logprobs=f, status=i32)
inputs = SimpleNamespace(
    base_logits=x, arm_logits=[x], vocab_size=60_000, weights=[1.0], base_weight=1.0, temperature=0.7, token_mask=None
)
sampling = SimpleNamespace(top_k=500, top_p=0.9, min_p=0.0, seed=11, position=0, logprobs=True)

def draw(threads):
    outputs = SimpleNamespace(**{name: Buffer(ctype, 3, 1) for name, ctype in types.items()})
    core.guided_step(place=threads, dtype=0, rows=3, inputs=inputs, sampling=sampling, outputs=outputs)
    return [list(getattr(outputs, name).array) for name in types]
"""


def test_the_core_needs_no_torch() -> None:
    """In a process without torch, thus without its OpenMP threads: the pool of the core's own gives the same bits."""
    script = (
        CORE_ALONE
        + """
for threads in (1, 2, 4, 4):
    print(draw(threads))
assert "torch" not in sys.modules
"""
    )
    command = [sys.executable, "-c", script, cpu._cpu.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    x = (torch.arange(180_000) * 7919 % 1009 / 100).view(3, -1)
    expected = guided_step(x, [x], temperature=0.7, top_k=500, top_p=0.9, seed=11, backend="cpu")
    assert len(lines) == 4 and set(lines) == {repr([field.flatten().tolist() for field in expected])}


AT_THE_END = """
import sys, threading, time
import torch
from genarm_kernels import guided_log_softmax, guided_step

torch.set_num_threads(int(sys.argv[2]))
x = torch.arange(16 * int(sys.argv[3])).remainder(97).div(9).view(16, -1)
# Tensors neither begin nor end in the threads but in our calls: elsewhere torch aborts by itself (before Python 3.14).
weights, kept = torch.ones(1), []
rounds = 0

def work():
    global rounds
    while True:
        kept.append(guided_step(x, [x], weights, top_p=0.9, backend=sys.argv[1]))
        kept.append(guided_log_softmax(x, [x], backend=sys.argv[1]))
        rounds += 1

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
while not rounds:
    time.sleep(0)
"""


@pytest.mark.parametrize("runs", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend, threads, vocab", [("cpu", 1, 100), ("cpu", 2, 60_000), ("reference", 1, 100)])
def test_daemon_threads_inside_a_call_when_the_interpreter_ends(
    backend: str, threads: int, vocab: int, runs: int
) -> None:
    for _ in range(runs):
        command = [sys.executable, "-c", AT_THE_END, backend, str(threads), str(vocab)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("threads", [1, 4])
def test_the_core_gives_up_an_interpreter_that_has_ended(threads: int) -> None:
    """Without torch, so on the core's own pool, and nothing waits for the call: the thread is in it for certain, as the
    only place where it lets the interpreter go."""
    script = (
        CORE_ALONE
        + """
import threading, time
sys.setswitchinterval(1000)
inside = False

def work():
    global inside
    inside = True
    while True:
        draw(int(sys.argv[2]))

threading.Thread(target=work, daemon=True).start()
while not inside:
    time.sleep(0)
"""
    )
    for _ in range(10):
        command = [sys.executable, "-c", script, cpu._cpu.__file__, str(threads)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- Linear layers, and a decoder's step of them ---------------------------------------------------------------------


WEIGHTS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def amid_nan(x: torch.Tensor) -> torch.Tensor:
    """Where it begins on no boundary; what lies around it is not to be read."""
    around = torch.full((x.numel() + 40,), 77 if x.dtype is torch.int8 else torch.nan, dtype=x.dtype)
    return around[3 : 3 + x.numel()].view(x.shape).copy_(x)


def linear_case(weights: torch.dtype, width: int, height: int, ranks: dict[int, int]) -> Linear:
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int) -> torch.Tensor:
        return amid_nan(torch.randn(shape, generator=generator))

    parts = [LayerPart(operand, random(rank, width), random(rank, height)) for operand, rank in ranks.items()]
    weight, scales = random(height, width), None
    if weights is torch.int8:
        weight, scales = quantize_int8(weight)
    return Linear(amid_nan(weight.to(weights)), random(height), scales, parts)


def exact(layer: Linear, x: torch.Tensor, operands: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output in float64, and what the terms of its sums come to without their signs."""

    def output(absolute: bool) -> torch.Tensor:
        def number(x: torch.Tensor) -> torch.Tensor:
            return x.double().abs() if absolute else x.double()

        y = number(x) @ number(layer.weight).t()
        y = y * (1 if layer.scales is None else number(layer.scales)) + number(layer.bias)
        for part in layer.parts:
            own = slice(part.operand, None, operands)
            y[own] += number(x[own]) @ number(part.down).t() @ number(part.up)
        return y

    return output(absolute=False), output(absolute=True)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "tokens", "width", "height", "ranks"),
    [
        (1, 1, 64, 64, {}),
        (1, 1, 1, 1, {}),
        (2, 1, 64, 96, {1: 8}),
        (3, 3, 100, 33, {2: 5}),
        (8, 2, 15, 130, {1: 1}),
        (16, 1, 300, 257, {1: 3, 3: 6}),
        (7, 1, 2050, 5, {}),
    ],
)
@torch.no_grad()
def test_a_linear_layer_of_few_rows(weights, dtype, rows, tokens, width, height, ranks):
    layer, operands = linear_case(weights, width, height, ranks), 1 + max(ranks, default=0)
    x = amid_nan(torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(rows)).to(dtype))
    expected, size = exact(layer, x, operands)
    for isa in ISAS:
        cpu._cpu.set_isa(isa)
        core = cpu.linear(layer, operands)
        assert core is not None
        y = core(x)
        # One rounding to the dtype, after sums in float32.
        error = (y.double() - expected).abs() / (expected.abs() * torch.finfo(dtype).eps / 2 + size * 2e-6)
        assert error.max() <= 1, isa
        for row in range(0, rows, operands):
            assert torch.equal(core(x[row : row + operands]), y[row : row + operands]), isa
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(core(x), y), isa
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_a_linear_layer_of_many_rows(weights, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    layer = linear_case(weights, 100, 33, {})
    x = torch.randn(4, 9, 100).bfloat16()
    y = cpu.many_rows(x, layer.weight, layer.bias, layer.scales)
    expected, size = exact(layer, x, 1)
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + size * 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sums_are_rounded_to_the_nearest(dtype):
    """Of 1 v, for v over the whole of float32: numbers, ties and their neighbours, infinities, NaN."""
    bits = torch.cat([torch.arange(0, 2**32, 2**32 // 60_000), torch.arange(2**15) * 2**17 + 2**12])
    bits = torch.cat([bits + i for i in (-1, 0, 1, 2**15, 2**15 - 1, 2**15 + 1)]) % 2**32
    values = torch.where(bits < 2**31, bits, bits - 2**32).int().view(torch.float32)
    small = torch.arange(1, 2**12).float() * 2.0**-26  # subnormals of float16
    values = torch.cat([values, small, -small, torch.tensor([65519.0, 65520.0, -65520.0, 3.4e38])])
    expected = values.to(dtype)
    for isa in ISAS:
        cpu._cpu.set_isa(isa)
        core = cpu.linear(Linear(values[:, None]))
        assert core is not None
        y = core(torch.ones(1, 1, 1, dtype=dtype))[0, 0]
        same = (y == expected) | (y.isnan() & expected.isnan())
        assert same.all(), (isa, values[~same][:5], y[~same][:5], expected[~same][:5])


@torch.no_grad()
def test_a_linear_layer_of_another_width_is_an_error():
    core = cpu.linear(Linear(torch.ones(5, 16)))
    assert core is not None
    with pytest.raises(ValueError, match=r"x: expected \[..., 16\], got \[1, 1, 32\]"):
        core(torch.ones(1, 1, 32))


@torch.no_grad()
def test_logits_are_float32_whatever_the_default(monkeypatch):
    step = DecoderStep(*decoder_case(torch.float32, torch.float32, 32, 2), "cpu")
    fed, lengths = torch.tensor([[1]]), torch.tensor([0, 3])
    expected = step(fed, lengths)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = step(fed, lengths)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gradient", "many rows", "double", "few"])
def test_the_core_gets_few_rows_without_gradients(kind: str) -> None:
    called = []

    def core(x: torch.Tensor) -> torch.Tensor:
        called.append(x)
        return x

    layer = SharedLayer(lambda x: x, [], 1, None, core)
    x = torch.ones(20 if kind == "many rows" else 4, 1, 8)
    with torch.set_grad_enabled(kind == "gradient"):
        shared_linear(x.double() if kind == "double" else x, layer)
    assert bool(called) == (kind == "few")


@torch.no_grad()
def test_layers_that_the_core_does_not_take():
    weight, part = torch.randn(6, 4), LayerPart(1, torch.randn(2, 4), torch.randn(2, 6))
    int8, scales = quantize_int8(weight)
    assert cpu.unsuited_linear(Linear(weight, torch.ones(6), None, [part])) is None
    for layer, reason in (
        (Linear(weight.t()), "its weights or adapters are not plain"),
        (Linear(weight.double()), "its weights are torch.float64"),
        (Linear(int8), "scales and int8 weights go together"),
        (Linear(weight, scales=scales), "scales and int8 weights go together"),
        (Linear(weight, torch.ones(6).bfloat16()), "its bias, scales or adapters are torch.bfloat16"),
        (Linear(weight, torch.ones(5)), "do not fit its weights"),
        (Linear(weight, None, None, [part._replace(down=torch.randn(2, 3))]), "do not fit its weights"),
        (Linear(weight, None, None, [part._replace(up=torch.randn(3, 6))]), "do not fit its weights"),
    ):
        assert reason in str(cpu.unsuited_linear(layer))
        assert cpu.linear(layer) is None


def decoder_case(weights: torch.dtype, caches: torch.dtype, head_size: int, kv_heads: int, **options: Any) -> Any:
    """A decoder of two layers and widths that fit no vector, with its caches: what a step must not look at is NaN."""
    hidden, intermediate, heads, vocab, rows, length = 72, 344, 4, 111, 6, 40
    generator = torch.Generator().manual_seed(head_size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def linear(height: int, width: int) -> Linear:
        weight, scales = random(height, width) / width**0.5, None
        parts = [LayerPart(1, random(3, width) / width**0.5, random(3, height) / 2)]
        if weights is torch.int8:
            weight, scales = quantize_int8(weight)
        return Linear(weight.to(weights), random(height) / 10, scales, parts)

    def norm(width: int) -> Norm:
        return Norm(1 + random(width) / 10, 1e-6)

    layers = [
        DecoderLayer(
            norm(hidden),
            linear(heads * head_size, hidden),
            linear(kv_heads * head_size, hidden),
            linear(kv_heads * head_size, hidden),
            linear(hidden, heads * head_size),
            norm(head_size) if kv_heads < heads else None,
            norm(head_size) if kv_heads < heads else None,
            norm(hidden),
            linear(intermediate, hidden),
            linear(intermediate, hidden),
            linear(hidden, intermediate),
            window,
        )
        for window in (None, 5)
    ]
    angles = torch.arange(length)[:, None] * torch.rand(head_size // 2, generator=generator)
    angles = torch.cat([angles, angles], 1)
    decoder = Decoder(
        random(vocab, hidden).to(caches), layers, norm(hidden), linear(vocab, hidden), heads, kv_heads,
        angles.cos(), angles.sin(), head_size**-0.5, operands=2, **options,
    )  # fmt: skip
    shape = (rows, length, kv_heads, head_size)
    return decoder, *([random(*shape).to(caches) for _ in layers] for _ in range(2))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("rows", "tokens", "head_size", "kv_heads", "options"),
    [
        (3, 1, 32, 4, {}),
        (1, 2, 16, 1, {"activation": "gelu_tanh"}),
        (2, 3, 80, 2, {}),
    ],
)
@torch.no_grad()
def test_a_decoder_step(weights, rows, tokens, head_size, kv_heads, options):
    caches = torch.float32 if weights is torch.float32 else torch.bfloat16
    decoder, keys, values = decoder_case(weights, caches, head_size, kv_heads, **options)
    fed = torch.randint(0, 111, (rows, tokens), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([0, 7, 23, 36, 12, 1])[: 2 * rows]
    for kept in (*keys, *values):
        for row, length in enumerate(lengths.tolist()):
            kept[row, length:] = torch.nan
    by_reference = [x.clone() for x in (*keys, *values)]
    expected = reference.decoder_step(decoder, by_reference[:2], by_reference[2:], fed, lengths, torch.float64)
    for isa in ISAS:
        cpu._cpu.set_isa(isa)
        own_keys, own_values = [[x.clone() for x in kept] for kept in (keys, values)]
        step = DecoderStep(decoder, own_keys, own_values, "cpu")
        logits = step(fed, lengths)
        for own, theirs in zip((*own_keys, *own_values), by_reference, strict=True):
            # A number halfway between two of bfloat16 goes the one way or the other.
            assert torch.allclose(own.double(), theirs.double(), rtol=1e-2, atol=1e-2, equal_nan=True), isa
        assert (logits - expected).abs().max() <= (2e-5 if caches is torch.float32 else 2e-2), isa
        # Row after row, token after token: the same bits.
        again = DecoderStep(decoder, [x.clone() for x in keys], [x.clone() for x in values])
        for t in range(tokens):
            assert torch.equal(again(fed[:1, t : t + 1], lengths[:2] + t), logits[:2, t : t + 1]), isa


def test_a_decoder_step_names_what_it_cannot_run() -> None:
    decoder, keys, values = decoder_case(torch.float32, torch.float32, 24, 2)
    with pytest.raises(ValueError, match="decoder: its 4 heads of 24, 2 of keys, do not fit the core's vectors"):
        DecoderStep(decoder, keys, values, "cpu")
    step = DecoderStep(decoder, keys, values)
    assert step.backend == "reference"
    assert step(torch.tensor([[1]]), torch.tensor([0, 3])).shape == (2, 1, 111)
    with pytest.raises(ValueError, match="backend: expected 'auto', 'cpu' or 'reference', got 'gpu'"):
        DecoderStep(decoder, keys, values, "gpu")
    decoder, keys, values = decoder_case(torch.float32, torch.float32, 32, 2)
    (first, *others), short = decoder.layers, [x[:, :39].contiguous() for x in keys]
    for other, own_keys in (
        (decoder._replace(layers=[first._replace(q=first.k), *others]), keys),
        (decoder._replace(norm=Norm(torch.ones(71), 1e-6)), keys),
        (decoder._replace(layers=[first._replace(k=first.k._replace(weight=first.k.weight.half())), *others]), keys),
        (decoder._replace(layers=[first._replace(up=first.up._replace(weight=first.up.weight.half())), *others]), keys),
        (decoder, short),
        (decoder, keys[:1]),
    ):
        with pytest.raises(ValueError, match="its parts do not fit together"):
            DecoderStep(other, own_keys, values, "cpu")
    with pytest.raises(ValueError, match="its norms or its rotary embedding are not contiguous float32"):
        DecoderStep(decoder._replace(sin=decoder.sin.double()), keys, values, "cpu")
    with pytest.raises(ValueError, match="its activation is 'relu'"):
        DecoderStep(decoder_case(torch.float32, torch.float32, 32, 2, activation="relu")[0], keys, values, "cpu")


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (torch.tensor([[1, 2]]), torch.tensor([39, 3]), "lengths: expected at most 38 for 2 tokens more, got 39"),
        (torch.tensor([[1]]), torch.tensor([-1, 3]), "lengths: expected at least 0, got -1"),
        (torch.tensor([[111]]), torch.tensor([0, 3]), "tokens: expected ids from 0 to 110, got 111"),
        (torch.tensor([[1]]), torch.tensor([0, 3, 4]), r"lengths: expected int64 \[2\], got int64 \[3\]"),
        (torch.tensor([[1]] * 4), torch.tensor([0] * 8), "tokens: expected at most 3 rows, got 4"),
        (torch.tensor([[1.0]]), torch.tensor([0, 3]), r"tokens: expected int64 \[n, T\], got float32 \[1, 1\]"),
    ],
)
def test_a_decoder_step_reads_nothing_beyond_its_tensors(tokens, lengths, message) -> None:
    step = DecoderStep(*decoder_case(torch.float32, torch.float32, 32, 2))
    with pytest.raises(ValueError, match=message):
        step(tokens, lengths)


@pytest.mark.parametrize("seed", range(5))
def test_int8_weights_are_within_half_a_step(seed: int) -> None:
    weight = torch.randn(17, 33, generator=torch.Generator().manual_seed(seed)) * 10.0 ** torch.arange(17)[:, None]
    weight[3] = 0
    int8, scales = quantize_int8(weight)
    assert (int8.abs().amax(1) == torch.where(weight.abs().amax(1) > 0, 127, 0)).all()
    assert ((int8 * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Callers of every kind: lazy views, tracers, compilers, streams, graphs; the registered operators."""

import inspect
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import genarm_kernels
from genarm_kernels import (
    GuidedStep,
    available_backends,
    guided_log_softmax,
    guided_step,
    run_concurrently,
)
from genarm_kernels.backends import interpreted
from genarm_kernels.parameters import Inputs, Sampling, flatten, names, take
from genarm_kernels.testing import make_logits
from rules import LOWEST, assert_same, bitmask, on_gpu

# --- Callers of every kind --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_views_that_are_lazy_or_expanded(backend: str) -> None:
    x, everything = make_logits("normal", (2, 100)), torch.tensor(-1, dtype=torch.int32).expand(2, 4)
    assert_same(guided_step(x, token_mask=everything, backend=backend), guided_step(x, backend=backend))
    negated = torch._neg_view(x)  # as the imaginary part of a conjugate is
    assert_same(guided_step(negated, backend=backend), guided_step(-x, backend=backend))
    assert_same(guided_step(x, [negated], 2.0, backend=backend), guided_step(x, [-x], 2.0, backend=backend))
    weight = torch.tensor([1 + 2j, 1 + 1j]).conj().imag.to(x.device)
    assert_same(
        guided_step(x, base_weight=weight, backend=backend),
        guided_step(x, base_weight=torch.tensor([-2.0, -1.0]), backend=backend),
    )
    with pytest.raises(ValueError, match=r"base_logits: expected a dense tensor.+to_dense"):
        guided_step(x.to_sparse_csr(), backend=backend)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracers_and_transforms_see_the_operator(backend: str) -> None:
    x = make_logits("normal", (2, 100))
    traced = torch.jit.trace(lambda y: guided_step(y, backend=backend).token, (x,), check_trace=False)
    assert torch.equal(traced(-x), guided_step(-x, backend=backend).token)

    def total(y: Tensor) -> Tensor:
        return y.sum() + 0 * guided_step(y, backend=backend).kept.sum()

    assert torch.equal(torch.func.grad(total)(x), torch.ones_like(x))
    graph = make_fx(lambda y: guided_step(y, backend=backend).token)(x)
    assert "genarm_kernels.guided_step" in graph.code


def test_differences_beyond_float32(backend: str) -> None:
    """Twice the largest float32 apart, and close enough at such a temperature."""
    rows = 100 if interpreted(backend) else 500
    x, hot = torch.tensor([[3.4e38, -3.4e38]]).expand(rows, 2), dict(temperature=3e38, backend=backend)
    p = math.exp(-6.8 / 3) / (1 + math.exp(-6.8 / 3))
    result = guided_step(x, **hot)
    assert abs(result.token.float().mean().item() - p) < 1.4 / rows**0.5  # 4 deviations
    torch.testing.assert_close(result.logprob.exp(), torch.where(result.token == 1, p, 1 - p).float())
    torch.testing.assert_close(guided_log_softmax(x[:1], **hot).exp(), torch.tensor([[1 - p, p]]))
    low = torch.tensor([[0.0, -3.40282e38]])
    assert low[0, 1] > LOWEST[torch.float32] and guided_step(low, min_p=0.1, **hot).kept.item() == 2


# --- Operators --------------------------------------------------------------------------------------------------------


def operator_arguments(backend: str, rows: bool) -> dict[str, tuple]:
    """What the public functions hand to the operators, as numbers or as one number per row."""
    x = make_logits("normal", (3, 40))
    half, one = torch.full((3,), 0.5), torch.ones(3, dtype=torch.int64)
    inputs = Inputs(
        base_logits=x,
        arm_logits=[x + 1, x * 2],
        vocab_size=39,
        weights=torch.ones(3, 2) if rows else [0.5, 0.25],
        base_weight=half if rows else 1.0,
        temperature=half if rows else 0.7,
        token_mask=bitmask([[1, 2, 35]] * 3, 2) if rows else None,
    )
    numbers = Sampling(top_k=20, top_p=0.9, min_p=0.01, seed=7, position=5, logprobs=True)
    sampling = Sampling(top_k=one, top_p=half, min_p=half, seed=one, position=one, logprobs=True) if rows else numbers
    return {
        "guided_step": (backend, *flatten(inputs, sampling)),
        "guided_log_softmax": (backend, *flatten(inputs)),
    }


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "name, structures", [("guided_step", (Inputs, Sampling)), ("guided_log_softmax", (Inputs,))], ids=str
)
def test_the_argument_list_stands_once(name: str, structures: tuple, rows: bool) -> None:
    """The public function, the structures and the operator have the same arguments, and the way between is exact."""
    public = inspect.signature(getattr(genarm_kernels, name)).parameters
    assert {*public} == {"backend", *(field for kind in structures for field in kind._fields)}
    schema = getattr(torch.ops.genarm_kernels, name).default._schema
    assert [argument.name for argument in schema.arguments] == ["backend", *names(*structures)]
    _, *flat = operator_arguments("reference", rows)[name]
    assert len(flat) == len(schema.arguments) - 1
    values = iter(flat)
    assert flatten(*[take(kind, values) for kind in structures]) == flat  # tensors by identity


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["guided_step", "guided_log_softmax"])
def test_opcheck(backend: str, name: str, rows: bool) -> None:
    operator, arguments = getattr(torch.ops.genarm_kernels, name).default, operator_arguments(backend, rows)[name]
    if name == "guided_log_softmax" and backend == "reference":
        for x in (arguments[1], *arguments[2]):
            x.detach_().requires_grad_()
    torch.library.opcheck(operator, arguments)
    if name == "guided_step":
        torch.library.opcheck(operator, (*arguments[:-1], False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: str, dynamic: bool) -> None:
    """One graph without breaks, whose numbers are those of the eager call; dynamic: one for all B and positions."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(base: Tensor, arm: Tensor, temperature: Tensor, seed: Tensor, position: int) -> tuple:
        result = guided_step(base, [arm], [0.5], temperature=temperature, top_p=0.9, seed=seed, backend=backend)
        other = guided_step(base, [arm], 0.5, top_k=5, seed=3, position=position, logprobs=False, backend=backend)
        return result, other.token, guided_log_softmax(base, [arm], 0.5, backend=backend)

    torch._dynamo.reset()
    compiled, graphs = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter), []
    for rows in (3, 5, 4) if dynamic else (3,):
        arguments = (
            make_logits("normal", (rows, 300)),
            make_logits("normal", (rows, 300), seed=1),
            torch.linspace(0.5, 1.5, rows),
            torch.arange(rows),
            rows + 14,
        )
        eager, lazy = step(*arguments), compiled(*arguments)
        assert_same(lazy[0], eager[0])
        assert torch.equal(lazy[1], eager[1])
        torch.testing.assert_close(lazy[2], eager[2])
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


# --- Importing, streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import genarm_kernels; genarm_kernels.guided_step(x)",
        "import genarm_kernels.guided_step; genarm_kernels.guided_step(x)",
        "from genarm_kernels.guided_step import guided_step; guided_step(x)",
        "import genarm_kernels.guided_log_softmax; genarm_kernels.guided_log_softmax(x)",
        "from genarm_kernels.testing import random_case, guided_step; guided_step(**random_case(1))",
        "from genarm_kernels import *; guided_step(x); guided_log_softmax(x); run_concurrently()",
    ],
)
def test_imports_need_torch_alone(code: str) -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'triton', 'numpy', 'scipy', 'pytest']))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{block}; import torch; x = torch.zeros(2, 3); {code}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_public_names() -> None:
    assert all(getattr(genarm_kernels, name) is not None for name in genarm_kernels.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", genarm_kernels.__version__)


def test_run_concurrently() -> None:
    """In order, each once, on this thread; the first exception ends the round and comes through."""
    calls: list[int] = []

    def forward(i: int) -> int:
        calls.append(i)
        if i == 2:
            raise KeyError(i)
        return 10 * i

    assert run_concurrently() == []
    assert run_concurrently(lambda: forward(0), lambda: forward(1)) == [0, 10]
    with pytest.raises(KeyError):
        run_concurrently(*(lambda i=i: forward(i) for i in range(4)))
    assert calls == [0, 1, 0, 1, 2]


@pytest.mark.gpu
def test_run_concurrently_overlaps_and_joins() -> None:
    """By the device's own clock each is under way while the other is; what follows waits for both."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    x = torch.zeros(1, device="cuda")
    spans = []

    def forward(i: int) -> Tensor:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(200_000_000)
        end.record()
        spans.append((start, end))
        return x + i

    run_concurrently(lambda: forward(0), lambda: forward(0))
    spans.clear()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    torch.cuda._sleep(2_000_000_000)  # neither begins before both are queued, so that a slow host keeps none waiting
    zero, one = run_concurrently(lambda: forward(0), lambda: forward(1))
    assert (zero + one).item() == 1
    starts, ends = ([origin.elapsed_time(event) for event in of] for of in zip(*spans, strict=True))
    assert max(starts) < min(ends)


@pytest.mark.gpu
@on_gpu
def test_a_graph_keeps_its_workspace(name: str) -> None:
    """Larger calls after the capture, on the same stream, leave a replay's memory alone."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    base = make_logits("normal", (2, 5000), device="cuda")
    position = torch.zeros(2, dtype=torch.int64, device="cuda")

    def step() -> Any:
        return guided_step(base, top_p=0.9, position=position, backend=name)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i in range(3):
        large = make_logits("flat", (64, 50000 + 1000 * i), device="cuda")
        guided_step(large, top_p=0.9, backend=name)
        position += 1
        graph.replay()
        assert torch.equal(captured.token, step().token)


@pytest.mark.gpu
@on_gpu
def test_threads_share_a_stream(name: str) -> None:
    """Each call has a workspace of its own. (Emulations run one thread at a time.)"""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    cases = [make_logits("normal", (8, 2000), seed=i, device="cuda") for i in range(4)]
    alone = [guided_step(x, top_k=5, backend=name).token for x in cases]

    def same(i: int) -> bool:
        return all(torch.equal(guided_step(cases[i], top_k=5, backend=name).token, alone[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(4)))


@pytest.mark.gpu
@on_gpu
def test_two_streams_never_hang(name: str) -> None:
    """Launches that fill the GPU, side by side: no block waits for one that cannot start."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    rows = [make_logits("flat", (256, 128256), torch.bfloat16, seed, "cuda") for seed in range(2)]
    alone = [guided_step(x, top_k=2000, top_p=0.9, backend=name).token for x in rows]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in rows]
    drawn: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                drawn[i].append(guided_step(rows[i], top_k=2000, top_p=0.9, backend=name).token)
    torch.cuda.synchronize()
    assert all(torch.equal(token, alone[i]) for i in range(2) for token in drawn[i])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in available_backends() if name != "cpu"])
def test_graph_replays_draw_with_the_seeds_of_the_moment(name: str) -> None:
    """Rule 5: a captured step equals the eager one after seeds, positions and logits have changed in place."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    with torch.device("cuda"):
        base, arm = make_logits("flat", (4, 5000)), make_logits("flat", (4, 5000), seed=1)
        seed, position = torch.arange(4), torch.zeros(4, dtype=torch.int64)

        def step() -> GuidedStep:
            models = run_concurrently(lambda: base * 1, lambda: arm * 1)
            return guided_step(models[0], models[1:], top_p=0.9, seed=seed, position=position, backend=name)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        tokens = []
        for _ in range(4):
            seed += 100
            position += 1
            base.copy_(base.roll(1, 1))
            graph.replay()
            assert_same(captured, step())
            tokens.append(tuple(captured.token.tolist()))
        assert len(set(tokens)) == 4

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rule 7: the log-probabilities."""

import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from genarm_kernels import (
    GuidedStep,
    guided_log_softmax,
    guided_step,
)
from genarm_kernels.testing import make_logits
from rules import DTYPES, INF, NAN, Few, bitmask, large


@large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, shift", [("peaked", 0.0), ("normal", 0.0), ("flat", 0.0), ("normal", 500.0)])
def test_precision(backend: str, dtype: torch.dtype, kind: str, shift: float) -> None:
    """At most twice the error of PyTorch's float32 log_softmax against float64, plus 1e-6, in every float field."""
    base, *arms = ((make_logits(kind, (4, 32_000), seed=i) + shift).to(dtype) for i in range(3))
    weights, temperature = (0.3, -0.7), 0.9
    w = [1.0, *(float(np.float32(x)) for x in weights)]
    z, z32 = (sum(c * x.to(t) for c, x in zip(w, (base, *arms), strict=True)) for t in (torch.float64, torch.float32))
    t = float(np.float32(temperature))
    arguments = [(z / t, z32 / t), *((x.double(), x.float()) for x in (base, *arms))]
    truths = [exact.log_softmax(1) for exact, _ in arguments]
    bounds = [
        2 * (rounded.log_softmax(1) - truth).abs().amax(1) + 1e-6
        for truth, (_, rounded) in zip(truths, arguments, strict=True)
    ]
    case = dict(weights=weights, temperature=temperature)
    result = guided_step(base, arms, **case, top_k=7, backend=backend)
    fields = [result.logprob, result.base_logprob, *result.arm_logprobs.unbind(1)]
    for field, truth, limit in zip(fields, truths, bounds, strict=True):
        assert ((field - truth.gather(1, result.token[:, None])[:, 0]).abs() <= limit).all()
    whole = guided_log_softmax(base, arms, **case, backend=backend)
    assert ((whole - truths[0]).abs().amax(1) <= bounds[0]).all()
    assert (result.kept >= 7).all()
    for b, kept in enumerate(result.kept.tolist()):  # more than 7 where tokens are equal
        assert (result.log_mass[b] - truths[0][b].topk(kept).values.logsumexp(0)).abs() <= bounds[0][b]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 2048])
def test_a_certain_token(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Rule 7: of log-probability 0, exactly, wherever its logit lies and whatever is done with it."""
    rows = 12
    x = torch.full((rows, vocab), -3e4, dtype=dtype)
    token = torch.arange(rows) * 37 % vocab
    top = make_logits("normal", (rows,), dtype) * 40
    x[torch.arange(rows), token] = top
    for parameters in ({}, {"temperature": 0.0}, {"temperature": 0.3, "weights": -0.07}, {"top_p": 0.5, "min_p": 0.1}):
        result = guided_step(x, [x], **parameters, backend=backend)
        assert torch.equal(result.token, token)
        assert not any(field.any() for field in (result.logprob, result.log_mass, result.base_logprob))
        assert not result.arm_logprobs.any()
    whole = guided_log_softmax(x, [x], 0.13, temperature=0.7, backend=backend)
    assert not whole[torch.arange(rows), token].any()
    alone = bitmask([[v] for v in token.tolist()], -(-vocab // 32))
    flat = make_logits("normal", (rows, vocab), dtype)
    assert not guided_step(flat, temperature=0.9, token_mask=alone, backend=backend).logprob.any()


@pytest.mark.parametrize("vocab", [300, 2048])
def test_no_log_probability_is_above_zero(backend: str, few: Few, vocab: int) -> None:
    """Where rounding could bring it there: tokens that have nearly all of the mass."""
    rows = len(few(range(64), 8))
    gap = torch.linspace(8, 24, rows)[:, None]
    x = make_logits("flat", (rows, vocab)) - gap
    x[:, 5] = make_logits("normal", (rows,))
    result = guided_step(x, [x * 0.9], 0.01, temperature=0.99, top_k=3, seed=1, backend=backend)
    whole = guided_log_softmax(x, [x], 0.01, temperature=0.99, backend=backend)
    assert all((field <= 0).all() for field in (*result[1:3], *result[4:6], whole))
    certain = guided_step(x, [x * 0.9], 0.01, temperature=0.99, top_k=1, backend=backend)
    assert certain.kept.tolist() == [1] * rows and torch.equal(certain.log_mass, certain.logprob)
    truth = x.double().log_softmax(1)
    limit = 2 * (x.log_softmax(1) - truth).abs().amax(1) + 1e-6
    assert ((result.base_logprob - truth.gather(1, result.token[:, None])[:, 0]).abs() <= limit).all()


@pytest.mark.parametrize("top", [10.0, 20.0, 40.0, 80.0])
def test_precision_where_the_largest_comes_late(backend: str, top: float) -> None:
    """A kernel that adds up exponentials relative to what it saw first rounds exponents as large as the gap."""
    x = torch.zeros(1, 5000)
    x[0, 0], x[0, 700], x[0, 4000] = 0.1, top / 2, top
    result = guided_step(x, [x], weights=0.37, temperature=0.9, backend=backend)
    for field, logits in ((result.logprob, (1 + float(np.float32(0.37))) / 0.9 * x.double()), (result.base_logprob, x)):
        truth = logits.double().log_softmax(1)[0, result.token]
        assert (field - truth).abs().item() <= 1e-6 * (1 + truth.abs().item())


def test_operand_of_weight_zero_reports_its_log_softmax(backend: str) -> None:
    x, y = make_logits("normal", (3, 200)), make_logits("normal", (3, 200), seed=1)
    result = guided_step(x, [y], 0.0, seed=2, backend=backend)
    torch.testing.assert_close(result.arm_logprobs, y.log_softmax(1).gather(1, result.token[:, None]))
    assert torch.equal(result.token, guided_step(x, seed=2, backend=backend).token)
    only_arm = guided_step(x, [y], base_weight=0.0, seed=2, backend=backend)
    torch.testing.assert_close(only_arm.base_logprob, x.log_softmax(1).gather(1, only_arm.token[:, None])[:, 0])
    assert torch.equal(only_arm.token, guided_step(y, seed=2, backend=backend).token)


def test_operand_with_a_blocked_tile_far_below_zero(backend: str) -> None:
    """What stands for the largest of a tile that has none must not count beside largest of -1000."""
    x = make_logits("normal", (2, 2100)) - 1000
    x[:, 1024:2048] = -INF
    result = guided_step(x, [x - 1e5, x], [0.5, 0.0], seed=1, backend=backend)
    torch.testing.assert_close(result.base_logprob, x.log_softmax(1).gather(1, result.token[:, None])[:, 0])
    for arm in range(2):
        own = (x - (1e5, 0)[arm]).double().log_softmax(1).gather(1, result.token[:, None])[:, 0]
        torch.testing.assert_close(result.arm_logprobs[:, arm].double(), own, rtol=1e-5, atol=1e-5)


def test_min_p_of_one_keeps_what_rounds_to_the_largest(backend: str) -> None:
    flat = make_logits("normal", (2, 1100))
    assert guided_step(flat, temperature=1e20, min_p=1.0, backend=backend).kept.tolist() == [1100, 1100]
    assert guided_step(flat, min_p=1.0, backend=backend).kept.tolist() == [1, 1]


def test_without_logprobs(backend: str) -> None:
    x = make_logits("normal", (3, 200))
    full, lean = (guided_step(x, [x], top_p=0.9, logprobs=flag, backend=backend) for flag in (True, False))
    assert [name for name, field in zip(GuidedStep._fields, lean, strict=True) if field is None] == [
        "logprob", "log_mass", "base_logprob", "arm_logprobs"
    ]  # fmt: skip
    for name in ("token", "kept", "status"):
        assert torch.equal(getattr(full, name), getattr(lean, name))


@pytest.mark.parametrize("who", ["operands", "weights", "base_weight", "temperature", "top_p", "min_p"])
def test_no_output_carries_a_gradient(backend: str, who: str) -> None:
    x = make_logits("normal", (3, 200))
    parameters = {name: torch.full((3,), 0.5) for name in ("base_weight", "temperature", "top_p", "min_p")}
    parameters["weights"] = torch.full((3, 1), 0.5)
    arm = x.clone()
    for tensor in (x, arm) if who == "operands" else (parameters[who],):
        tensor.requires_grad_()
    result = guided_step(x, [arm], **parameters, backend=backend)
    assert not any(field.requires_grad for field in result)


def test_raise_for_status(backend: str) -> None:
    x = torch.zeros(5, 4)
    guided_step(x, backend=backend).raise_for_status()
    x[1], x[2:4] = NAN, -INF
    with pytest.raises(ValueError, match="drew no token") as caught:
        guided_step(x, backend=backend).raise_for_status()
    message = str(caught.value)
    assert re.search(r"NaN.*\[1\].*no allowed token.*\[2, 3\]", message), message
    x[1] = 0.0
    with pytest.raises(ValueError, match=r"\[2, 3\]") as caught:
        guided_step(x, backend=backend).raise_for_status()
    assert "NaN" not in str(caught.value)

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Rule 9: errors speak."""

import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from genarm_kernels import (
    available_backends,
    guided_log_softmax,
    guided_step,
)
from genarm_kernels.testing import make_logits
from rules import INF, NAN

X = torch.zeros(2, 40)
LONG = torch.zeros(3)
BAD_CALLS: list[tuple[str, type[Exception], dict]] = [
    ("base_logits", TypeError, dict(base_logits=[[1.0, 2.0]])),
    ("base_logits", TypeError, dict(base_logits=None)),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(40))),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(1, 2, 40))),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(2, 0))),
    ("base_logits", ValueError, dict(base_logits=X.double())),
    ("base_logits", ValueError, dict(base_logits=X.int())),
    ("base_logits", ValueError, dict(base_logits=torch.zeros(40, 2).t())),
    ("arm_logits", TypeError, dict(arm_logits=None)),
    ("arm_logits", TypeError, dict(arm_logits="arm")),
    ("arm_logits", ValueError, dict(arm_logits=X)),
    ("arm_logits[0]", TypeError, dict(arm_logits=[1.0])),
    ("arm_logits[1]", ValueError, dict(arm_logits=[X, torch.zeros(3, 40)])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[X.half()])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[X.to("meta")])),
    ("arm_logits[0]", ValueError, dict(arm_logits=[torch.zeros(2, 80)[:, ::2]])),
    ("arm_logits[0]", ValueError, dict(arm_logits=torch.zeros(1, 3, 40))),
    ("weights", TypeError, dict(weights="1")),
    ("weights", TypeError, dict(weights=True)),
    ("weights", TypeError, dict(weights=None)),
    ("weights", TypeError, dict(weights=np.array([1.0, 2.0]), arm_logits=[X, X])),
    ("weights[1]", TypeError, dict(weights=[1.0, "2"], arm_logits=[X, X])),
    ("weights", ValueError, dict(weights=[1.0, 2.0])),
    ("weights[0]", ValueError, dict(weights=[NAN])),
    ("weights", ValueError, dict(weights=1e39)),
    ("weights", ValueError, dict(weights=LONG)),
    ("weights", ValueError, dict(weights=torch.zeros(2, 2))),
    ("weights", ValueError, dict(weights=torch.zeros(1).int())),
    ("weights", ValueError, dict(weights=torch.zeros(1, device="meta"))),
    ("temperature", TypeError, dict(temperature="hot")),
    ("temperature", TypeError, dict(temperature=True)),
    ("temperature", TypeError, dict(temperature=[1.0, 1.0])),
    ("temperature", ValueError, dict(temperature=10**400)),
    ("temperature", ValueError, dict(temperature=LONG)),
    ("temperature", ValueError, dict(temperature=torch.ones(2).int())),
    ("base_weight", TypeError, dict(base_weight=None)),
    ("base_weight", ValueError, dict(base_weight=LONG)),
    ("top_k", TypeError, dict(top_k=1.5)),
    ("top_k", TypeError, dict(top_k=True)),
    ("top_k", ValueError, dict(top_k=torch.ones(2))),
    ("top_k", ValueError, dict(top_k=LONG.int())),
    ("top_k", ValueError, dict(top_k=torch.ones(2, dtype=torch.int16))),
    ("top_p", TypeError, dict(top_p=None)),
    ("top_p", ValueError, dict(top_p=torch.ones(2, 1))),
    ("min_p", TypeError, dict(min_p="0")),
    ("min_p", ValueError, dict(min_p=LONG)),
    ("seed", TypeError, dict(seed=1.0)),
    ("seed", TypeError, dict(seed=None)),
    ("seed", ValueError, dict(seed=2**64)),
    ("seed", ValueError, dict(seed=-(2**63) - 1)),
    ("seed", ValueError, dict(seed=LONG.long())),
    ("seed", ValueError, dict(seed=torch.zeros(2))),
    ("seed", ValueError, dict(seed=torch.zeros(2, device="meta").long())),
    ("position", TypeError, dict(position=0.5)),
    ("position", ValueError, dict(position=2**64)),
    ("position", ValueError, dict(position=torch.zeros(2, 1).long())),
    ("token_mask", TypeError, dict(token_mask=[[1]])),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 2).long())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 40).bool())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 1).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(1, 2).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2).int())),
    ("token_mask", ValueError, dict(token_mask=torch.zeros(2, 2, device="meta").int())),
    ("vocab_size", ValueError, dict(vocab_size=41)),
    ("vocab_size", ValueError, dict(vocab_size=0)),
    ("vocab_size", TypeError, dict(vocab_size=4.0)),
    ("vocab_size", ValueError, dict(arm_logits=[torch.zeros(2, 41)])),
    ("vocab_size", ValueError, dict(arm_logits=[torch.zeros(2, 39)], vocab_size=40)),
    ("logprobs", TypeError, dict(logprobs=1)),
    ("backend", TypeError, dict(backend=None)),
    ("backend", ValueError, dict(backend="CPU")),
]
IN_BOTH = ("base_logits", "arm_logits", "weights", "base_weight", "temperature", "token_mask", "vocab_size", "backend")


@pytest.mark.parametrize("argument, error, kwargs", BAD_CALLS)
def test_errors_name_the_argument(argument: str, error: type[Exception], kwargs: dict) -> None:
    """... and say what was expected and what came."""
    calls = [guided_step, guided_log_softmax] if set(kwargs) <= set(IN_BOTH) else [guided_step]
    for call in calls:
        with pytest.raises(error, match=rf"^{re.escape(argument)}: expected .+ got |^{argument}: operands .+ got "):
            call(**{"base_logits": X, "arm_logits": [X], **kwargs})


def test_errors_show_the_way_out() -> None:
    for weights in ([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 3, [torch.ones(3)] * 2):
        with pytest.raises((TypeError, ValueError), match=r"pass a tensor \[B, N\] for weights per row"):
            guided_step(torch.zeros(3, 40), torch.zeros(2, 3, 40), weights)
    with pytest.raises(ValueError, match=r"genarm_kernels.token_mask makes one$"):
        guided_step(X, token_mask=X.bool())


def test_log_softmax_needs_a_temperature_above_zero(backend: str) -> None:
    for value in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match=r"^temperature: "):
            guided_log_softmax(make_logits("normal", (2, 5)), temperature=value, backend=backend)
    tensor = torch.tensor([0.0, 0.5, -1.0, NAN, INF])
    whole = guided_log_softmax(make_logits("normal", (5, 5)), temperature=tensor, backend=backend)
    assert whole.isnan().all(1).tolist() == [True, False, True, True, True]


def test_a_named_backend_runs_or_raises() -> None:
    for name in {"reference", "cpu", "triton", "cuda"} - set(available_backends()):
        with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run: .+ available here: reference"):
            guided_step(X, backend=name)
    assert available_backends()[0] == "reference"
    guided_step(X, backend="auto").raise_for_status()

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Parameters as numbers and as tensors with one value per row; seeds and positions."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from genarm_kernels import (
    GuidedStep,
    guided_step,
    row_seed,
)
from genarm_kernels.testing import make_logits
from rules import DTYPES, SEED_STEP, Few, assert_same, check, oracle

ROW_VALUES = {
    "weights": [0.5, -1.0, 0.0, 2.0],
    "base_weight": [1.0, 0.0, -0.5, 2.0],
    "temperature": [0.5, 1.0, 0.0, 3.0],
    "top_k": [0, 1, 5, 100],
    "top_p": [0.0, 0.5, 0.9, 1.0],
    "min_p": [0.0, 0.01, 0.3, 1.0],
    "seed": [7, -1, 2**40, 2**63 - 1],
    "position": [0, 1, 2**33, -(2**63)],
}


def forms(name: str, values: list[Any]) -> list[Tensor]:
    """The tensors that may carry a parameter: each dtype that holds it, and a strided one."""
    if name in ("seed", "position"):
        tensors = [torch.tensor(values)]
    elif name == "top_k":
        tensors = [torch.tensor(values), torch.tensor(values, dtype=torch.int32)]
    else:
        tensors = [torch.tensor(values, dtype=dtype) for dtype in (*DTYPES, torch.float64)]
    return [*tensors, torch.stack([tensors[0]] * 3, 1)[:, 1], tensors[0].flip(0).contiguous().flip(0)]


@pytest.mark.parametrize("name", ROW_VALUES)
def test_parameters_per_row(backend: str, few: Few, name: str) -> None:
    """A tensor of one value a row gives each row what that value gives it alone, as a number and as a 0-dim tensor."""
    values = ROW_VALUES[name]
    base, arm = make_logits("normal", (1, 300)).expand(4, -1), make_logits("normal", (1, 300), seed=1).expand(4, -1)
    fixed = dict(seed=torch.tensor([5] * 4), min_p=0.001)
    alone = []
    for b, value in enumerate(values):
        kwargs = {**fixed, "seed": 5, name: value}
        alone.append(guided_step(base[b : b + 1], [arm[b : b + 1]], **kwargs, backend=backend))
        tensor = torch.tensor(value, dtype=forms(name, values)[0].dtype)
        kwargs[name] = tensor
        assert_same(guided_step(base[b : b + 1], [arm[b : b + 1]], **kwargs, backend=backend), alone[b])
    assert len({tuple(map(str, (r.token, r.logprob, r.log_mass))) for r in alone}) > 2, "the rows must differ"
    for tensor in few(forms(name, values), 3):
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.double().tolist() != values:
            continue  # this type rounds these values
        together = guided_step(
            base, [arm], **{**fixed, name: tensor[:, None] if name == "weights" else tensor}, backend=backend
        )
        for b in range(4):
            assert_same(alone[b], together, slice(b, b + 1))


@pytest.mark.parametrize("vocab", [1111, 1112])
def test_a_row_alone_and_in_a_batch(backend: str, few: Few, vocab: int) -> None:
    """To the last bit, also where rows begin on no boundary: what a request draws is not its neighbours' affair."""
    base, arm = (make_logits("normal", (5, vocab), torch.bfloat16, seed) for seed in range(2))
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        together = guided_step(base, [arm], 0.7, **filters, seed=3, backend=backend)
        for b in few(range(5), 3):
            for row in ((base[b : b + 1], arm[b : b + 1]), (base[b : b + 1].clone(), arm[b : b + 1].clone())):
                alone = guided_step(row[0], [row[1]], 0.7, **filters, seed=row_seed(3, b), backend=backend)
                for name, mine, theirs in zip(GuidedStep._fields, alone, together, strict=True):
                    assert torch.equal(mine, theirs[b : b + 1]), (name, b, mine, theirs)


def test_int32_seed_and_position(backend: str) -> None:
    base = make_logits("flat", (3, 300))
    wide, narrow = (
        guided_step(
            base, seed=torch.tensor([-1, 0, 9], dtype=d), position=torch.tensor([5, -7, 0], dtype=d), backend=backend
        )
        for d in (torch.int64, torch.int32)
    )
    assert_same(wide, narrow)


def test_forms_of_weights(backend: str, few: Few) -> None:
    base, arms = make_logits("normal", (3, 300)), make_logits("normal", (3, 3, 300), seed=1)
    w = torch.tensor([0.5, 0.5, 0.5])
    ways = [
        0.5,
        [0.5] * 3,
        (0.5,) * 3,
        w,
        torch.tensor(0.5),
        w.double(),
        w.expand(3, 3),
        torch.full((3, 6), 0.5)[:, ::2],
    ]
    results = [guided_step(base, arms, way, seed=4, backend=backend) for way in few(ways, 4)]
    for result in results[1:]:
        assert_same(result, results[0])
    # With B = N a tensor [N] is still one weight an ARM.
    check(
        guided_step(base, arms, torch.tensor([0.25, 0.0, -1.0]), backend=backend),
        oracle(base, arms, [0.25, 0.0, -1.0]),
    )


def test_every_seed_and_position_is_read(backend: str, few: Few) -> None:
    """Equal rows draw each by its own seed and position, the tile as well as the token in it."""
    base = make_logits("flat", (1, 5000)).expand(8, -1)
    for name, other in (("seed", "position"), ("position", "seed")):
        fixed = {other: torch.full((8,), 3)}
        tokens = guided_step(base, **{name: torch.arange(8)}, **fixed, backend=backend).token.tolist()
        for i in few(range(8), 3):
            assert guided_step(base[:1], **{name: i, other: 3}, backend=backend).token.item() == tokens[i]
        assert len(set(tokens)) > 4
        assert len(set(guided_step(base, **{name: torch.full((8,), 3)}, **fixed, backend=backend).token.tolist())) == 1


@pytest.mark.parametrize("s", [0, 41, -3, 2**32 - 2, 2**63 - 2, 2**64 - 2, -(2**63)])
def test_a_number_seeds_row_b_with_its_step(backend: str, s: int) -> None:
    base = make_logits("flat", (4, 5000))
    wrapped = [(s + b * SEED_STEP + 2**63) % 2**64 - 2**63 for b in range(4)]
    assert [row_seed(s, b) for b in range(4)] == wrapped
    expected = guided_step(base, seed=torch.tensor(wrapped), backend=backend)
    assert_same(guided_step(base, seed=s, backend=backend), expected)
    assert_same(guided_step(base, seed=torch.tensor(wrapped[0]), backend=backend), expected)


def test_batches_of_neighbouring_seeds_share_no_draw(backend: str, few: Few) -> None:
    """Of 50,000 tokens two of 80 are the same by chance once in 16 times; rows of one seed would always be."""
    base = torch.zeros(8, 50_000)
    seeds = few(range(10), 2)
    tokens = torch.cat([guided_step(base, seed=s, logprobs=False, backend=backend).token for s in seeds])
    assert len(set(tokens.tolist())) >= len(tokens) - 2


@pytest.mark.parametrize("seed, row, error", [(2**64, 0, ValueError), (0, -1, ValueError), (1.0, 0, TypeError)])
def test_row_seed_refuses(seed: Any, row: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{'row' if row else 'seed'}: expected an .+, got "):
        row_seed(seed, row)


@pytest.mark.parametrize("name", ["seed", "position"])
def test_counters_have_64_bits_and_wrap(backend: str, name: str) -> None:
    base = make_logits("flat", (1, 5000))

    def tokens(value: int) -> tuple[Any, ...]:
        steps = [guided_step(base, **{"seed": 1, "position": p, name: value}, backend=backend) for p in range(3)]
        return tuple(step.token.item() for step in steps)

    if name == "seed":
        assert tokens(-1) == tokens(2**64 - 1) and tokens(-(2**63)) == tokens(2**63)
    else:
        step = [guided_step(base, position=p, backend=backend).token for p in (-1, 2**64 - 1, 2**32 - 1)]
        assert step[0] == step[1] != step[2]
    values = (0, 2**32, 2**63, 1)
    draws = [guided_step(base, **{name: value}, backend=backend).token.item() for value in values]
    assert len(set(draws)) == 4, "the high bits are in use"

# ruff: noqa: C408 - dict(top_k=5) reads as the call that it stands for
"""Calls that reach every path of the CUDA kernels under the emulation, checked against the reference.

`python tests/backends/simt/steps.py MODULE BLOCKS...`: the module as test_cuda.py builds it, and the blocks that share
a row, 0 for two launches: however it is shared out, aligned or batched, the bits of all returned are the same. Rows:
unfiltered, greedy, with few candidates, with many (one round of bins, and two), with equal ones.
"""

import importlib.util
import sys
from typing import Any

import torch


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("genarm_kernels._cuda", path)
    assert spec and spec.loader
    sys.modules["genarm_kernels._cuda"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["genarm_kernels._cuda"])


def cases() -> list[dict[str, Any]]:
    from genarm_kernels.testing import make_logits

    filters = (
        {},
        {"temperature": 0.0},
        {"top_k": 20},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"top_p": 0.9, "temperature": 3.0},
        {"top_k": 600, "top_p": 0.95},
        {"min_p": 0.001},
        {"top_p": 0.0},
    )
    made: list[dict[str, Any]] = []
    for i, each in enumerate(filters):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        base, *arms = (make_logits("normal", (2, 3100), dtype, seed) for seed in (i, 50 + i, 99 + i)[: 2 + i % 2])
        made.append(dict(base_logits=base, arm_logits=arms, weights=0.5, seed=i, position=3, **each))
    ties = torch.arange(3100).remainder(3).float().expand(2, -1).contiguous()
    made.append(dict(base_logits=ties, top_p=0.5, token_mask=torch.full((2, 97), 0x7FFFFFFF, dtype=torch.int32)))
    # 700 neighbours, which bins of equal width share.
    close = 1 + torch.arange(2100).remainder(700).float()[None] * 2**-22
    close[0, 0] = 5
    light = 0.1 * make_logits("normal", (1, 3100), seed=1)  # together 5 % of the mass: of a bin, what carries bring
    light[0, 0] = 11
    made += [dict(base_logits=close, top_p=0.4), dict(base_logits=close, top_k=1500)]
    return [*made, dict(base_logits=light, top_p=0.99)]


def misaligned(case: dict[str, Any]) -> dict[str, Any]:
    """The same rows where none begins at a multiple of 16 bytes."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        rows, vocab = x.shape
        return x.new_empty(rows, vocab + 16)[:, 1 : vocab + 1].copy_(x)

    return case | {"base_logits": moved(case["base_logits"]), "arm_logits": [*map(moved, case.get("arm_logits", ()))]}


def alone(case: dict[str, Any]) -> dict[str, Any]:
    """The first row, which a number seeds as in the batch."""
    mask = {"token_mask": case["token_mask"][:1]} if "token_mask" in case else {}
    arms = [x[:1] for x in case.get("arm_logits", ())]
    return case | mask | {"base_logits": case["base_logits"][:1], "arm_logits": arms}


def main(path: str, *ways: str) -> int:
    load(path)
    from genarm_kernels import guided_log_softmax, guided_step
    from genarm_kernels._cuda import force_cluster

    calls = 0
    for case in cases():
        law = guided_step(**case, backend="reference")
        whole = {name: case[name] for name in ("base_logits", "arm_logits", "weights", "token_mask") if name in case}
        law_whole = guided_log_softmax(**whole, backend="reference")
        first = None
        for blocks in map(int, ways):
            force_cluster(blocks)
            mine, mine_whole = guided_step(**case, backend="cuda"), guided_log_softmax(**whole, backend="cuda")
            for name, got, expected in zip(mine._fields, mine, law, strict=True):
                if got.is_floating_point():
                    torch.testing.assert_close(
                        got, expected, rtol=1e-5, atol=3e-6, equal_nan=True, msg=f"{case} {name}"
                    )
                else:
                    assert torch.equal(got, expected), (case, blocks, name, got, expected)
            torch.testing.assert_close(mine_whole, law_whole, rtol=1e-6, atol=1e-5)
            first = first or (mine, mine_whole)
            assert all(map(torch.equal, mine, first[0])) and torch.equal(mine_whole, first[1]), (case, blocks)
            for other in (misaligned(case), alone(case)):
                rows = len(other["base_logits"])
                again = guided_step(**other, backend="cuda")
                assert all(torch.equal(a, b[:rows]) for a, b in zip(again, mine, strict=True)), (other, blocks)
            calls += 1
    print(f"{calls} calls agree with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

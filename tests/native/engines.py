"""What the example engines (csrc/examples) must print."""

import os
import subprocess
from pathlib import Path

import torch

from genarm_kernels import guided_step

CASES: list[dict[str, float]] = [
    {},
    {"vocab": 1, "tokens": 2},
    {"vocab": 1025, "sequences": 7, "seed": -3, "weight": -0.75},
    {"temperature": 0.0, "weight": 0.5},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2**63 - 2},
    {"top_k": 40, "temperature": 1.5},
    {"vocab": 3000, "min_p": 0.05, "weight": 2.0},
    {"vocab": 777, "top_k": 200, "top_p": 0.8, "min_p": 0.01, "sequences": 1, "tokens": 64},
]


def run(*command: object, **environment: str) -> str:
    """What the command prints; its failure is the test's."""
    done = subprocess.run([str(part) for part in command], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended in {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def bigram(model: int, vocab: int) -> torch.Tensor:
    """The engine's table: multiples of 1/64 in [0, 8)."""
    word = 0xFFFFFFFF
    h = ((torch.arange(vocab * vocab) + model * 0x9E3779B9) & word) * 0x85EBCA6B & word
    h = (h ^ h >> 15) * 0xC2B2AE35 & word
    return ((h >> 23).float() / 64).view(vocab, vocab)


def expected(vocab: int = 2000, **options: float) -> list[list[int]]:
    """What the engine must print, from the reference."""
    count, steps, seed = options.pop("sequences", 4), options.pop("tokens", 16), options.pop("seed", 0)
    weight = options.pop("weight", 1.0)
    base, arm = bigram(0, vocab), bigram(1, vocab)
    token = torch.zeros(int(count), dtype=torch.int64)
    drawn = []
    for position in range(int(steps)):
        step = guided_step(
            base[token],
            [arm[token]],
            weight,
            seed=seed,
            position=position,
            backend="reference",
            logprobs=False,
            **options,
        )
        step.raise_for_status()
        token = step.token
        drawn.append(token)
    return torch.stack(drawn, 1).tolist()


def tokens(engine: Path, *arguments: str, **environment: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in run(engine, *arguments, **environment).splitlines()]


def arguments(options: dict[str, float]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", repr(value))]

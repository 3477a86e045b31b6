"""The tokens of 200 seeded generations, one JSON line each: `python tools/seeded_tokens.py > FILE`.

A change that is to change no token is tried by running this before and after it, and comparing the two files. The
generations go over the bundled models with separate ARMs and with LoRA ARMs that share the base's weights, every
backend that runs here, batches of 1 and 8, and several kinds of sampling. Only the public interface is used.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before anything imports triton: without a GPU it runs in its interpreter

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm import GuidedDecoder, bundled
from genarm_kernels import available_backends

QUESTIONS = [
    "How do I sleep better?",
    "I want to save money. What should I do?",
    "Can you help me bake bread?",
    "How?",
    "Tell me about running, please, in two sentences.",
]
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
]
NEW_TOKENS = {"reference": 24, "cpu": 24, "triton": 3, "cuda": 24}  # Triton's interpreter takes a second for a token
GENERATIONS = 200


def lora_arms(folder: Path) -> dict[str, Path]:
    """Two LoRA adapters of the bundled base, with random weights."""
    for seed, name in enumerate(("helpful", "polite")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(bundled.path("base"))
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(bundled.path("base")).save_pretrained(folder / name)
    return {name: folder / name for name in ("helpful", "polite")}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        arms = {
            "separate": {name: bundled.path(name) for name in ("helpful", "polite")},
            "LoRA": lora_arms(Path(scratch)),
        }
        backends = available_backends()
        each = -(-GENERATIONS // (len(arms) * len(backends) * 2))
        done = 0
        for kind, own in arms.items():
            for backend in backends:
                decoder = GuidedDecoder.from_pretrained(bundled.path("base"), own, backend=backend, device="cpu")
                for size in (1, 8):
                    n = min(each, GENERATIONS - done)
                    prompts = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(n)]
                    weights = {"helpful": [0.5 + i % 3 for i in range(n)], "polite": [-0.5 * (i % 2) for i in range(n)]}
                    columns = [
                        {**SAMPLING[1], "top_k": 0, "top_p": 1.0, "min_p": 0.0, **SAMPLING[i % 4]} for i in range(n)
                    ]
                    sampling: dict[str, Any] = {name: [one[name] for one in columns] for name in columns[0]}
                    result = decoder.generate(
                        messages=prompts,
                        weights=weights,
                        seed=done,
                        max_new_tokens=NEW_TOKENS[backend],
                        batch_size=size,
                        **sampling,
                    )
                    for tokens, reason in zip(result.tokens, result.finish_reasons, strict=True):
                        print(json.dumps([kind, backend, size, tokens, reason]))
                    done += n
                    print(f"{done} of {GENERATIONS}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""`make demo`: what guidance does to three prompts, and how fast it goes. Runs on the bundled models."""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from genarm import GuidedDecoder, bundled, world
from genarm.benchmark import naive

PROMPTS = ("How do I sleep better?", "I want to save money. What should I do?", "Can you help me bake bread?")
SETTINGS = {
    "unguided": {},
    "helpful": {"helpful": 1.0},
    "polite": {"polite": 1.0},
    "both": {"helpful": 1.0, "polite": 1.0},
}
TOKENS, ROUNDS = 128, 5


def show_texts(console: Console) -> None:
    """Each prompt unguided, guided by each ARM and by both, with the true rewards of the answers."""
    arms = {name: bundled.path(name) for name in world.ATTRIBUTES}
    decoder = GuidedDecoder.from_pretrained(bundled.path("base"), arms)
    decoder.require_fast_path()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    results = {name: decoder.generate(messages=chats, weights=weights, seed=2) for name, weights in SETTINGS.items()}
    for i, prompt in enumerate(PROMPTS):
        table = Table(title=prompt, title_justify="left", show_lines=True)
        table.add_column("guided by")
        table.add_column("answer", ratio=1)
        for attribute in world.ATTRIBUTES:
            table.add_column(f"true {attribute}", justify="right")
        for name, result in results.items():
            rewards = world.true_rewards([result.texts[i]])
            values = [f"{rewards[attribute][0]:+.2f}" for attribute in world.ATTRIBUTES]
            table.add_row(name, result.texts[i].strip(), *values)
        console.print(table)


def show_speed(console: Console) -> None:
    """Tokens/s of naive guided decoding and of ours, in turn on the same models and prompts, medians."""
    base, arm = (AutoModelForCausalLM.from_pretrained(bundled.path(name)).eval() for name in ("base", "helpful"))
    tokenizer = AutoTokenizer.from_pretrained(bundled.path("base"))
    base.generation_config.eos_token_id = None  # every run makes all its tokens
    decoder = GuidedDecoder(base, tokenizer, {"helpful": arm})
    decoder.require_fast_path()
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    console.print(f"Tokens/s, CPU, {torch.get_num_threads()} threads: one ARM, top-p 0.9, {TOKENS} tokens a prompt")
    table = Table()
    for column in ("prompts at once", "naive loop", "genarm", "ratio"):
        table.add_column(column, justify="right")
    for batch in (1, 8):
        prompts = [f"User: {PROMPTS[b % len(PROMPTS)]}\nAssistant:" for b in range(batch)]
        runs = (
            lambda prompts=prompts: naive.generate(base, tokenizer, prompts, {arm: 1.0}, TOKENS, **sampling),
            lambda prompts=prompts: decoder.generate(prompts, max_new_tokens=TOKENS, **sampling),
        )
        seconds = [[_seconds(run) for run in runs] for _ in range(ROUNDS + 1)][1:]  # the first round warms up
        slow, fast = (batch * TOKENS / statistics.median(column) for column in zip(*seconds, strict=True))
        table.add_row(str(batch), f"{slow:.0f}", f"{fast:.0f}", f"{fast / slow:.2f}x")
    console.print(table)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    show_texts(console)
    show_speed(console)


if __name__ == "__main__":
    main()

"""Mean true reward of the bundled models over the guidance weight: `python -m bench.guidance [--samples 500]`."""

import argparse
import math
import statistics

from rich.console import Console
from rich.table import Table

from genarm import GuidedDecoder, bundled, world

WEIGHTS = (0.0, 0.5, 1.0, 2.0)


def true_rewards(
    decoder: GuidedDecoder, weights: dict[str, float], samples: int, seed: int = 0
) -> dict[str, list[float]]:
    """By attribute, the true reward of one guided answer to each of `samples` prompts of the world."""
    chats = [[{"role": "user", "content": prompt}] for prompt in world.sample_prompts(samples, seed)]
    return world.true_rewards(decoder.generate(messages=chats, weights=weights, seed=seed).texts)


def p_value(lower: list[float], higher: list[float]) -> float:
    """One-sided p of Welch's test that the mean of `higher` is above that of `lower`, by the normal tail."""
    difference = statistics.fmean(higher) - statistics.fmean(lower)
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (lower, higher)))
    return 0.5 * math.erfc(difference / error / math.sqrt(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    samples = parser.parse_args().samples
    decoder = GuidedDecoder.from_pretrained(
        bundled.path("base"), {name: bundled.path(name) for name in world.ATTRIBUTES}
    )
    decoder.require_fast_path()
    unguided = true_rewards(decoder, {}, samples)
    table = Table(title=f"mean true reward of {samples} answers, and p against weight 0")
    for column in ("guided by", "weight", *(f"true {name}" for name in world.ATTRIBUTES), "p"):
        table.add_column(column, justify="right")
    for attribute in world.ATTRIBUTES:
        for weight in WEIGHTS:
            rewards = true_rewards(decoder, {attribute: weight}, samples) if weight else unguided
            means = [f"{statistics.fmean(rewards[name]):+.3f}" for name in world.ATTRIBUTES]
            p = f"{p_value(unguided[attribute], rewards[attribute]):.1e}" if weight else ""
            table.add_row(attribute, f"{weight:g}", *means, p)
    Console().print(table)


if __name__ == "__main__":
    main()

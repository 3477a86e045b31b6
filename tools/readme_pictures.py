"""Draws the README's picture of token rewards: `python tools/readme_pictures.py`, which writes docs/token_rewards.svg.

Two answers to one question, each token coloured by the reward that the bundled ARM `helpful` gives it:
log pi_r(token | prefix), less the base's own log-probability of the token, as in Figure 3 of the GenARM paper.
"""

from html import escape
from pathlib import Path

import torch

from genarm import GuidedDecoder, bundled
from genarm.decoding.results import GenerationResult

QUESTION = "I want to save money. What should I do?"
ANSWERS = {"unguided (weight 0)": (0.0, 7), "guided by the ARM (weight 1)": (1.0, 7)}  # weight and seed
OUT = Path(__file__).parents[1] / "docs" / "token_rewards.svg"
WIDTH, CHARACTER, LINE = 860, 8.43, 24  # pixels; 14 px monospace


def colour(advantage: float) -> str:
    """Blue where the ARM prefers the token more than the base does, red where less; full at 3 nats."""
    share = min(1.0, abs(advantage) / 3)
    far = (33, 102, 172) if advantage > 0 else (178, 24, 43)
    return "#" + "".join(f"{round(255 + share * (x - 255)):02x}" for x in far)


def answer(decoder: GuidedDecoder, weight: float, seed: int) -> GenerationResult:
    chat = [{"role": "user", "content": QUESTION}]
    return decoder.generate(messages=chat, weights={"helpful": weight}, seed=seed, top_p=0.9)


def draw(results: dict[str, GenerationResult]) -> str:
    shapes, y = [], 22.0

    def text(x: float, content: str, style: str = "") -> None:
        shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve" {style}>{escape(content)}</text>')

    text(10, QUESTION, 'font-weight="bold"')
    for title, result in results.items():
        y += 34
        text(10, title, 'fill="#666"')
        y, x = y + LINE, 10.0
        for event in result.events(0):
            wide = len(event.text) * CHARACTER
            if x + wide > WIDTH - 10:
                y, x = y + LINE, 10.0
            advantage = event.rewards["helpful"] - event.base_logprob
            shapes.append(
                f'<rect x="{x:.1f}" y="{y - 16:.1f}" width="{wide:.1f}" height="21" fill="{colour(advantage)}"/>'
            )
            dark = abs(advantage) > 1.8
            text(x, event.text, f'textLength="{wide:.1f}" fill="{"white" if dark else "black"}"')
            x += wide
    height = y + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" font-family="monospace"'
    return f'{head} font-size="14"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"


def main() -> None:
    torch.set_num_threads(1)
    decoder = GuidedDecoder.from_pretrained(
        bundled.path("base"), {"helpful": bundled.path("helpful")}, backend="reference", device="cpu"
    )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(draw({title: answer(decoder, *how) for title, how in ANSWERS.items()}))
    print(f"{OUT} written")


if __name__ == "__main__":
    main()

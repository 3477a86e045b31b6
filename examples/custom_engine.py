"""Guided decoding in an engine of your own: `python examples/custom_engine.py`.

The two untrained models stand for yours. `decode` is what carries over: the forward passes run side by side, then comes
one `guided_step`, whose draw depends on a request's own seed and position, not on the requests that share its batch.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from genarm_kernels import GuidedStep, guided_step, run_concurrently

WORDS = ("the", "a", "cat", "dog", "bird", "sees", "likes", "finds", "small", "old", "and", ".")
END = WORDS.index(".")


class RecurrentModel(nn.Module):
    """Gives the logits of the next token and its new state, as a transformer gives logits and its KV cache."""

    def __init__(self, seed: int, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(len(WORDS), width)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, len(WORDS))

    def forward(self, token: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = self.cell(self.embedding(token), state)
        return 3 * self.head(state), state  # times 3: opinions, though untrained


class LastTokenModel(nn.Module):
    """Looks at the last token alone: an ARM need not be built as the base is, it must only share its vocabulary."""

    def __init__(self, seed: int, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Embedding(len(WORDS), width), nn.Tanh(), nn.Linear(width, len(WORDS)))

    def forward(self, token: Tensor, state: None) -> tuple[Tensor, None]:
        return 3 * self.layers(token), state


@torch.inference_mode()
def decode(base: nn.Module, arm: nn.Module, token: Tensor, weights: Tensor, seeds: Tensor) -> Iterator[GuidedStep]:
    """Yields step after step of the requests that start with `token` `[B]`; `weights` `[B, 1]` are the ARM's."""
    base_state = arm_state = None
    for position in range(16):
        (base_logits, base_state), (arm_logits, arm_state) = run_concurrently(
            partial(base, token, base_state), partial(arm, token, arm_state)
        )
        step = guided_step(base_logits, [arm_logits], weights, top_p=0.9, seed=seeds, position=position)
        yield step
        token = step.token


def main() -> None:
    base, arm = RecurrentModel(seed=0).eval(), LastTokenModel(seed=16).eval()
    weights, seeds = torch.tensor([[0.0], [0.5], [2.0]]), torch.tensor([11, 12, 13])
    start = torch.full((len(seeds),), WORDS.index("the"))
    live, rewards = torch.ones(len(seeds), dtype=torch.bool), []
    print("".join(f"weight {weight:<9g}" for weight in weights[:, 0].tolist()))
    for step in decode(base, arm, start, weights, seeds):
        step.raise_for_status()  # waits for the device, as printing does
        rewards.append(torch.where(live, step.arm_logprobs[:, 0], torch.nan))
        words = [WORDS[token] if alive else "" for token, alive in zip(step.token.tolist(), live.tolist(), strict=True)]
        print("".join(f"{word:<16}" for word in words).rstrip(), flush=True)
        live = live & (step.token != END)  # an engine would give the place of a finished request to the next one
        if not live.any():
            break
    print("\nmean log pi_r of a token, what each request was guided towards:")
    print("".join(f"{reward:<16.2f}" for reward in torch.stack(rewards).nanmean(0).tolist()).rstrip())


if __name__ == "__main__":
    main()

"""A custom engine whose step is one CUDA graph: `python examples/cuda_graph_engine.py`.

Everything that a step reads or writes lies in tensors that stay where they are: tokens, states, positions, weights and
seeds. The step runs once to compile and to allocate, is captured, and is replayed. Between replays the host may change
the tensors, here a request's weight. Where there is no GPU the same step is called in place of a replay.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genarm_kernels import guided_step, run_concurrently

VOCABULARY, ROWS, STEPS = 1000, 4, 12


class Model(nn.Module):
    """This stands for your model: its state is written in place, as a KV cache is."""

    def __init__(self, seed: int, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.cell = nn.Embedding(VOCABULARY, width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.register_buffer("state", torch.zeros(ROWS, width))

    def forward(self, tokens: Tensor) -> Tensor:
        self.state.copy_(self.cell(self.embedding(tokens), self.state))
        return 5 * self.head(self.state)


class Engine:
    def __init__(self, base: Model, arm: Model, device: str) -> None:
        self.base, self.arm = base.to(device), arm.to(device)
        self.tokens = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.position = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.seeds = torch.arange(ROWS, device=device)
        self.weights = torch.zeros(ROWS, 1, device=device)
        self.rewards = torch.zeros(ROWS, device=device)

    def step(self) -> None:
        base, arm = run_concurrently(lambda: self.base(self.tokens), lambda: self.arm(self.tokens))
        drawn = guided_step(base, [arm], self.weights, top_p=0.9, seed=self.seeds, position=self.position)
        self.tokens.copy_(drawn.token)
        self.rewards.copy_(drawn.arm_logprobs[:, 0])
        self.position += 1

    def captured(self) -> Callable[[], None]:
        """Takes the first step, which compiles, and returns the step as one CUDA graph."""
        self.step()
        if not self.tokens.is_cuda:
            return self.step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and draws nothing
            self.step()
        return graph.replay


@torch.inference_mode()
def main() -> None:
    engine = Engine(Model(seed=0), Model(seed=1), "cuda" if torch.cuda.is_available() else "cpu")
    step = engine.captured()
    for i in range(STEPS):
        if i == STEPS // 2:
            engine.weights[1:] = 1.5  # live: the graph reads it at its next replay
        step()
        tokens = " ".join(f"{token:>4}" for token in engine.tokens.tolist())  # waits for the device, as printing does
        print(f"{tokens}   mean log pi_r of rows 1 to 3: {engine.rewards[1:].mean().item():.2f}")


if __name__ == "__main__":
    main()

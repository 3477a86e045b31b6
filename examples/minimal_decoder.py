"""Guided decoding in one file, the whole loop: `python examples/minimal_decoder.py [QUESTION ...]`.

The base model and every autoregressive reward model (ARM) read the prompts, each into a KV cache of its own. Then, step
after step, `guided_step` draws one token for each row from all their logits, and every model reads it. This is the loop
that `genarm.GuidedDecoder` makes fast, and it draws the same tokens. The decoder adds what is left out here: a row that
ends gives its place to the next prompt, LoRA ARMs run within the base's forward pass, a step is one CUDA graph, text is
streamed and stopped at strings, and what does not fit is refused by name.

The loop needs torch, transformers and genarm_kernels; of genarm it takes the folders of the bundled models alone.
"""

import inspect
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from genarm import bundled
from genarm_kernels import guided_step, run_concurrently

BASE = bundled.path("base")
WEIGHTS = {"helpful": 1.0, "polite": 0.5}
QUESTIONS = ["How do I sleep better?", "I want to save money. What should I do?"]


class Model:
    """A transformers causal language model and its KV cache: from tokens to the logits `[B, V]` of the next ones."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # transformers 5.24 renamed it

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads B prompts of any lengths into a new cache."""
        # Padding goes to the left, so that the last tokens stand in one column and all rows grow from there.
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.mask = mask.to(self.model.device)
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(ids.to(self.model.device))

    def step(self, tokens: Tensor) -> Tensor:
        """Reads one more token of each row, `[B]`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)  # a row's first token has position 0, wherever it stands
        outputs = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions[:, -ids.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        return outputs.logits[:, -1]


@dataclass
class Row:
    """What has been drawn for one prompt."""

    tokens: list[int] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    """For each token, log pi_r(token | what stands before it) of each ARM."""
    ended: bool = False


@torch.inference_mode()
def generate(
    base: Model,
    arms: Sequence[Model],
    prompts: Sequence[Sequence[int]],
    weights: Sequence[float],
    *,
    eos: Collection[int],
    max_new_tokens: int = 128,
    seed: int = 0,
    **sampling: Any,
) -> list[Row]:
    """Continues each prompt, a list of ids, until an EOS token or `max_new_tokens`.

    Args:
        weights: one for each ARM.
        sampling: temperature, top_k, top_p and min_p of `guided_step`: a number for all rows or a tensor `[B]`.
    """
    models, rows = [base, *arms], [Row() for _ in prompts]
    logits = run_concurrently(*(partial(model.prefill, prompts) for model in models))
    vocab_size = min(x.shape[1] for x in logits)  # some models pad their embeddings beyond the shared vocabulary
    for position in range(max_new_tokens):
        # The draw depends on the row's logits, its seed and the position alone, not on the rows beside it.
        step = guided_step(
            logits[0], logits[1:], weights, seed=seed, position=position, vocab_size=vocab_size, **sampling
        )
        step.raise_for_status()
        for row, token, rewards in zip(rows, step.token.tolist(), step.arm_logprobs.tolist(), strict=True):
            if not row.ended:  # a row that has ended grows on beside the others, and nobody reads it
                row.tokens.append(token)
                row.rewards.append(rewards)
                row.ended = token in eos
        if all(row.ended for row in rows):
            break
        logits = run_concurrently(*(partial(model.step, step.token) for model in models))
    return rows


def load(folder: str | Path) -> Model:
    """A model from a folder or the hub, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(AutoModelForCausalLM.from_pretrained(folder).to(device))


def main(questions: Sequence[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    rows = generate(
        load(BASE),
        [load(bundled.path(name)) for name in WEIGHTS],
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],  # the template writes BOS itself
        list(WEIGHTS.values()),
        eos={tokenizer.eos_token_id},
        top_p=0.9,
    )
    for question, row in zip(questions, rows, strict=True):
        print(f"{question}\n  {tokenizer.decode(row.tokens, skip_special_tokens=True).strip()}")
        for name, rewards in zip(WEIGHTS, zip(*row.rewards, strict=True), strict=True):
            print(f"  {name}: {mean(rewards):.2f} nats a token")


if __name__ == "__main__":
    main(sys.argv[1:] or QUESTIONS)

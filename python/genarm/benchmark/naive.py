"""Guided decoding as people write it today: the baseline of every speed figure of this project.

`base.generate` with a LogitsProcessor that runs each ARM with its own KV cache, takes a float log-softmax of every
model, and leaves the rest to transformers: its temperature and top-k/top-p/min-p warpers, softmax and multinomial.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..models import transformers_api


class NaiveGuidance(LogitsProcessor):
    """Adds the ARMs' weighted log-probabilities to the base's, one ARM after another."""

    def __init__(self, arms: Sequence[Any], weights: Sequence[float], attention_mask: Tensor) -> None:
        self.arms = arms
        self.weights = weights
        self.attention_mask = attention_mask
        self.caches: list[Any] = [None] * len(arms)
        self.cache_arguments = [str(transformers_api.cache_argument(arm)) for arm in arms]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids.shape[1] - self.attention_mask.shape[1]
        self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, new), value=1)
        positions = (self.attention_mask.cumsum(1) - 1).clamp_min(0)
        guided = scores.float().log_softmax(-1)
        for i, (arm, weight) in enumerate(zip(self.arms, self.weights, strict=True)):
            fed = input_ids if self.caches[i] is None else input_ids[:, -1:]
            outputs = arm(
                input_ids=fed,
                attention_mask=self.attention_mask,
                position_ids=positions[:, -fed.shape[1] :],
                use_cache=True,
                **{self.cache_arguments[i]: self.caches[i]},
            )
            self.caches[i] = transformers_api.cache_of(outputs)
            guided += weight * outputs.logits[:, -1].float().log_softmax(-1)
        return guided


def generate(
    base: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    arms: Mapping[Any, float] | None,
    max_new_tokens: int,
    **sampling: Any,
) -> Tensor:
    """Continuations `[B, T]` of the prompts; `arms` maps each ARM to its weight, `sampling` goes to `base.generate`.

    None in place of ARMs leaves the processor out: transformers' own decoding of the base.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(base.device)
    guidance = [NaiveGuidance(list(arms), list(arms.values()), inputs["attention_mask"])] if arms is not None else []
    sequences = base.generate(
        **inputs,
        logits_processor=LogitsProcessorList(guidance),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        **sampling,
    )
    return sequences[:, inputs["input_ids"].shape[1] :]

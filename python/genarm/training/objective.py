"""The objective of GenARM (arXiv 2410.08193), the batches it is computed on, and the trainer that minimises it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from ..errors import GenarmError


def response_logps(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """log pi(y | x) of each sequence: the sum over its response tokens only, in nats, without length normalisation.

    The three tensors are (B, L); ``response_mask`` is True where ``input_ids`` holds a token of the response, never
    in column 0. Returns (B,) float32, differentiable in the model's parameters.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    targets, mask = input_ids[:, 1:], response_mask[:, 1:]  # the logits at position t are for the token at t + 1
    # Only the response's rows become float32: the whole (B, L, V) would be most of the memory.
    logps = -functional.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)


def preference_loss(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """The mean over pairs of -log sigmoid(beta * (log pi_r(y_w | x) - log pi_r(y_l | x))).

    The training objective of the Autoregressive RM in GenARM (arXiv 2410.08193), which is DPO's with the reference
    model's terms zero. ``margins`` are the (B,) differences of log-probabilities in nats; the result is a scalar.

    >>> preference_loss(torch.tensor([0.0, 0.0]), beta=0.05)
    tensor(0.6931)
    """
    return -functional.logsigmoid(beta * margins).mean()


def collate_pairs(pairs: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of B pairs as right-padded (2 B, L) ``input_ids``, ``attention_mask`` and ``response_mask``.

    The first B sequences are prompt + chosen, the last B prompt + rejected. The padding's id is 0, which nothing
    sees: attention is causal and the masks leave it out.
    """
    sequences = [(pair["prompt"], pair[key]) for key in ("chosen", "rejected") for pair in pairs]
    shape = len(sequences), max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor(prompt + response)
        attention_mask[row, :length] = 1
        response_mask[row, len(prompt) : length] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


class ArmTrainer(Trainer):
    """A ``transformers.Trainer`` whose batches are those of ``collate_pairs`` and whose loss is GenARM's."""

    def __init__(self, *, beta: float, **kwargs: Any) -> None:
        super().__init__(data_collator=collate_pairs, **kwargs)
        self.beta = beta

    def margins(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """log pi(y_w | x) - log pi(y_l | x) of the B pairs: (B,), in nats."""
        chosen, rejected = response_logps(model, **batch).chunk(2)
        return chosen - rejected

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        margins = self.margins(model, inputs)
        loss = preference_loss(margins, self.beta)
        return (loss, {"margins": margins}) if return_outputs else loss

    @torch.no_grad()
    def held_out_metrics(self) -> dict[str, float]:
        """Loss, accuracy and margins on ``eval_dataset``; ``train_arm`` documents them."""
        self.model.eval()
        batches = self.get_eval_dataloader()
        margins = torch.cat([self.margins(self.model, batch) for batch in batches])
        metrics = {
            "eval_loss": preference_loss(margins, self.beta).item(),
            "preference_accuracy": (margins > 0).float().mean().item(),
            "reward_margin": self.beta * margins.mean().item(),
            "reward_margin_nats": margins.mean().item(),
        }
        self.log(dict(metrics))
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Every step is logged, and before it is saved, so no checkpoint has seen a loss that is not finite.
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise GenarmError(
                    f"training stopped: {name} is {value} at step {self.state.global_step}; "
                    "a lower learning rate usually helps"
                )
        super().log(logs, *args, **kwargs)

"""What people write today in place of `guided_step`: the baselines of its benchmark.

All do the same job and are given every advantage that keeps it the same: they return the log-probability of the draw
where it falls out of the work (after the filters, so no further pass over the vocabulary), and no kept count or mass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Drawn(NamedTuple):
    token: Tensor
    """`[B]`."""
    logprob: Tensor
    """`[B]`: log-probability of the draw, after the filters; `guided_step` calls it `logprob - log_mass`."""
    own_logprobs: Tensor
    """`[B, 1 + N]`: log-softmax at the token of the base and of each ARM."""


def eager(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Drawn:
    """Straight PyTorch by someone who knows it: the sort only where top-p needs it, no wait for the device."""
    z = base.float()
    for arm, weight in zip(arms, weights, strict=True):
        z = torch.add(z, arm, alpha=weight)
    p, tokens = eager_filtered(z / temperature, top_k, top_p, min_p)
    # The race of exponentials draws as multinomial does, without its host-side check; rand and log are 6 times faster
    # than exponential_ on a CPU.
    choice = (p / torch.rand_like(p).log_().neg_()).argmax(1, keepdim=True)
    token = choice if tokens is None else tokens.gather(1, choice)
    logprob = (p.gather(1, choice) / p.sum(1, keepdim=True)).log()
    own = [x.log_softmax(1, dtype=torch.float32).gather(1, token) for x in (base, *arms)]
    return Drawn(token[:, 0], logprob[:, 0], torch.cat(own, 1))


def eager_filtered(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Probabilities (0: filtered out, their sum is the surviving mass) and the tokens they stand for; None: all."""
    tokens = None
    if top_k > 0:
        scaled, tokens = scaled.topk(min(top_k, scaled.shape[1]), dim=1)
    elif top_p < 1:
        scaled, tokens = scaled.sort(dim=1, descending=True)
    p = scaled.softmax(1)
    smallest = min_p * p.amax(1, keepdim=True)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(1) - p >= top_p, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < smallest, 0.0)
    return p, tokens


# One graph a shape, as a server with fixed shapes would have; more shapes than dynamo's limit need a reset between.
compiled = torch.compile(eager, dynamic=False)


def transformers_pipeline(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Drawn:
    """`benchmark.naive` without its models: float log-softmaxes, their sum, transformers' warpers, softmax, draw."""
    own = [x.float().log_softmax(-1) for x in (base, *arms)]
    p = pipeline_scores(own, weights, temperature, top_k, top_p, min_p).softmax(-1)
    token = torch.multinomial(p, 1)
    return Drawn(token[:, 0], p.gather(1, token).log()[:, 0], torch.cat([x.gather(1, token) for x in own], 1))


def pipeline_scores(
    own: Sequence[Tensor], weights: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Guided scores `[B, V]` from the models' log-probabilities; -inf: filtered out."""
    guided = own[0]
    for logprobs, weight in zip(own[1:], weights, strict=True):
        guided = guided + weight * logprobs
    return _warpers(temperature, top_k, top_p, min_p)(None, guided)


@functools.cache
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """In the order of `generate`, which leaves out those that are off."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


BASELINES: dict[str, Callable[..., Drawn]] = {
    "eager": eager,
    "compiled": compiled,
    "transformers": transformers_pipeline,
}


@functools.cache
def why_not_compiled(device: str) -> str | None:
    """None where `torch.compile` works, otherwise what it says."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None

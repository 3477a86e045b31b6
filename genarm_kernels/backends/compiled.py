"""What the compiled backends share: their modules (csrc/python/bindings.h) take the same calls, each at a place of its
own."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..outputs import GuidedStep, empty_step, empty_whole
from ..parameters import Inputs, Sampling

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # genarm_dtype
Place = TypeVar("Place", contravariant=True)


class Step(Protocol[Place]):
    def __call__(
        self, *, place: Place, dtype: int, rows: int, inputs: Inputs, sampling: Sampling, outputs: GuidedStep
    ) -> None: ...


class LogSoftmax(Protocol[Place]):
    def __call__(self, *, place: Place, dtype: int, rows: int, inputs: Inputs, logp: Tensor) -> None: ...


def guided_step(core: Step[Place], place: Place, inputs: Inputs, sampling: Sampling) -> GuidedStep:
    base, outputs = inputs.base_logits, empty_step(inputs, sampling.logprobs)
    core(
        place=place,
        dtype=DTYPES[base.dtype],
        rows=base.shape[0],
        inputs=inputs,
        sampling=sampling,
        outputs=outputs,
    )
    return outputs


def guided_log_softmax(core: LogSoftmax[Place], place: Place, inputs: Inputs) -> Tensor:
    base, logp = inputs.base_logits, empty_whole(inputs)
    core(place=place, dtype=DTYPES[base.dtype], rows=base.shape[0], inputs=inputs, logp=logp)
    if inputs.vocab_size < logp.shape[1]:
        # A bad row is NaN throughout.
        logp[:, inputs.vocab_size :] = torch.where(logp[:, :1].isnan(), torch.nan, -torch.inf)
    return logp

"""The Triton backend: two launches a step, `tile_pass` over all the logits and `row_pass` over what it found.

Runs on NVIDIA GPUs, and for tests on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

import os

import torch
from torch import Tensor

from ...outputs import GuidedStep, empty_step, empty_whole
from ...parameters import Inputs, Sampling, WholeLayer

# Rows, and ranks of all adapters together, up to which one kernel does a whole layer: by reckoning, since the rows are
# read again by every program. `bench/gpu_linear.py` measures it.
_MOST_ROWS, _MOST_RANKS = 16, 64


def why_unavailable() -> str | None:
    """None when the kernels can run here, otherwise the reason in words."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    if not interpreted() and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def guided_step(inputs: Inputs, sampling: Sampling) -> GuidedStep:
    outputs = empty_step(inputs, sampling.logprobs)
    if len(inputs.base_logits):
        from . import launch  # Triton is there

        launch.guided_step(outputs, inputs, sampling)
    return outputs


def guided_log_softmax(inputs: Inputs) -> Tensor:
    logp = empty_whole(inputs)
    if len(logp):
        from . import launch

        launch.guided_log_softmax(logp, inputs)
    return logp


def suits_shared_linear(x: Tensor, layer: WholeLayer) -> bool:
    """A step of decoding in 16 bits."""
    weight, down = layer.weight, layer.down
    return (
        x.shape[1] == 1
        and len(x) <= _MOST_ROWS
        and len(down) <= _MOST_RANKS
        and x.dtype == weight.dtype == down.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
    )

"""Fused sampling for reward-guided decoding. Needs torch alone.

`guided_step` draws one token per row from softmax(base + sum of weight_i * ARM_i); `guided_log_softmax` gives the whole
distribution; `token_mask` makes the masks of allowed tokens that both take; `run_concurrently` runs the models' forward
passes side by side.
"""

from importlib.metadata import PackageNotFoundError, version

from . import token_mask
from .backends import available_backends
from .guided_log_softmax import guided_log_softmax
from .guided_step import guided_step, row_seed
from .outputs import GuidedStep
from .streams import run_concurrently

try:
    __version__ = version("genarm-kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"
__all__ = [
    "GuidedStep",
    "available_backends",
    "guided_log_softmax",
    "guided_step",
    "row_seed",
    "run_concurrently",
    "token_mask",
]

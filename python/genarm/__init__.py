"""GenARM on transformers models: guided decoding, ARM training, a small world with known rewards, a command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding.decoder import GuidedDecoder, GuidedStream
    from .decoding.request import Request
    from .decoding.results import GenerationResult, StreamEvent
    from .errors import GenarmError
    from .training.arm import train_arm

_HOME = {
    "GenarmError": "errors",
    "GenerationResult": "decoding.results",
    "GuidedDecoder": "decoding.decoder",
    "GuidedStream": "decoding.decoder",
    "Request": "decoding.request",
    "StreamEvent": "decoding.results",
    "train_arm": "training.arm",
}
__all__ = ["GenarmError", "GenerationResult", "GuidedDecoder", "GuidedStream", "Request", "StreamEvent", "train_arm"]


def __getattr__(name: str) -> Any:
    # On first use: importing transformers takes seconds, which `genarm --help` should not.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

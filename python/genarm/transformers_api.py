"""What genarm uses of transformers that transformers does not promise: names of arguments and outputs, cache classes,
attention registration, what configurations call things. All of it stands here, so that a release that renames
something is met in one place. Tried with transformers 5.17 to 5.24 (`make test-oldest`, `make test-newest`).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

__all__ = ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "Cache", "CacheLayerMixin", "find_adapter_config_file"]

# What a forward's cache argument and its output are called: the first from 5.24 on, the others before, the last by
# state-space models. A model of the user's own may keep an old name under a new transformers.
_CACHE = ("cache", "past_key_values", "cache_params")
# Numbers of a configuration at which a model changes how it computes a longer sequence: sliding_window,
# attention_chunk_size, chunk_size, original_max_position_embeddings, ...
_THRESHOLDS = ("window", "chunk_size", "original_max_position")


def versions() -> str:
    """For messages about what a model cannot do."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose own forward hides its parameters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The configuration of the language model, also where it is a part of something larger."""
    return unwrapped(model).config.get_text_config()


def parameters(model: Any) -> frozenset[str]:
    """The names of the forward's arguments."""
    return frozenset(inspect.signature(unwrapped(model).forward).parameters)


def cache_argument(model: Any) -> str | None:
    """What the model's forward calls its cache; None where it takes none."""
    return next((name for name in _CACHE if name in parameters(model)), None)


def cache_of(outputs: Any) -> Any:
    """The cache among a forward's outputs; None where there is none."""
    return next((cache for name in _CACHE if (cache := outputs.get(name)) is not None), None)


def last_logits_only(model: Any) -> dict[str, int]:
    """The arguments that keep a forward from making logits which nobody reads."""
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters(model) else {}


def register_attention(name: str, attend: Callable[..., Any]) -> None:
    """Makes `attend` an attention implementation that `set_attention` can name."""
    AttentionInterface.register(name, attend)


def set_attention(model: Any, name: str) -> None:
    """Has the model attend by the registered implementation. Eager models keep theirs, in which some do more."""
    config = text_config(model)
    if config._attn_implementation != "eager":
        config._attn_implementation = name


def layer_windows(model: Any) -> list[int | None] | str:
    """By layer, how many tokens a query sees, itself included (None: all); or why that cannot be said of a layer."""
    config = text_config(model)
    if "local" in getattr(config, "attention_layers", ()):
        return "its local attention counts from the end of what it is given"
    kinds, sliding = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        return f"it has layers of kind {', '.join(sorted(other))}"
    return [None if kind == "full_attention" else sliding for kind in kinds]


def thresholds(model: Any) -> list[int]:
    """The lengths at which the model, by its configuration, begins to compute otherwise."""

    def numbers(settings: Mapping[str, Any]) -> Iterator[int]:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from numbers(value)
            elif isinstance(value, int) and value > 1 and any(part in name for part in _THRESHOLDS):
                yield value

    return sorted(set(numbers(text_config(model).to_dict())))


def rope_switches(model: Any) -> frozenset[int]:
    """Lengths beyond which every position of a sequence, those before included, is embedded otherwise (longrope): a
    cache that was filled before is then wrong.
    """
    return frozenset(length for module in model.modules() for length in _switches(module).values())


def switch_rope_by_row(model: Any) -> None:
    """Has rotary embeddings that choose their frequencies by the longest row of a batch choose by each row's own.

    In the tree of `model`'s modules, which a caller must own.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _switches(child):
                # A copy: it keeps its last frequencies in a buffer, which another forward may be using on its stream.
                setattr(parent, name, _RopeByRow(copy.deepcopy(child)))


class _RopeByRow(nn.Module):
    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        layer_type = args[0] if args else kwargs.get("layer_type")
        if (switch := _switches(self.rope).get(layer_type)) is None:
            return self.rope(x, position_ids, *args, **kwargs)
        # A row more is beyond the switch in any case; in the other call no row is.
        beyond = torch.full_like(position_ids[:1], switch)
        long = self.rope(x, torch.cat([position_ids, beyond]), *args, **kwargs)
        short = self.rope(x, position_ids.clamp_max(switch - 1), *args, **kwargs)
        is_long = (position_ids.amax(-1) >= switch)[:, None, None]
        return tuple(torch.where(is_long, one[:-1], other) for one, other in zip(long, short, strict=True))


def _switches(module: Any) -> dict[str | None, int]:
    """By kind of layer (None: all), the length beyond which a rotary embedding takes its long factors."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    by_layer = kinds if isinstance(kinds, Mapping) else {None: kinds}
    found: dict[str | None, int] = {}
    for layer, kind in by_layer.items():
        if kind == "longrope" and config is not None:
            settings = config.rope_parameters if layer is None else config.rope_parameters[layer]
            found[layer] = settings["original_max_position_embeddings"]
    return found

"""What genarm uses of transformers that transformers does not promise: names of arguments and outputs, cache classes,
attention registration, what configurations call things. All of it stands here, so that a release that renames
something is met in one place. Tried with transformers 5.17 to 5.24 (`make test-oldest`, `make test-newest`).
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

__all__ = ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "Cache", "CacheLayerMixin", "Conv1D", "find_adapter_config_file"]

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


def sliding_windows(model: Any) -> list[int | None] | str:
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
    """The lengths beyond which the model, by its configuration, computes otherwise."""

    def numbers(settings: Mapping[str, Any]) -> Iterator[int]:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from numbers(value)
            elif isinstance(value, int) and value > 1 and any(part in name for part in _THRESHOLDS):
                yield value

    found = {*numbers(text_config(model).to_dict()), rope(model).grows_from} - {math.inf}
    return sorted(int(length) for length in found)


class Rope(NamedTuple):
    """At which lengths of a sequence every position of it, those before included, is embedded otherwise: a cache that
    was filled before is then wrong.
    """

    switches: frozenset[int]
    """Beyond each of these once (longrope)."""
    grows_from: float
    """Beyond this with every token (dynamic NTK)."""

    @property
    def constant(self) -> bool:
        return not self.switches and self.grows_from == math.inf

    def outgrown(self, length: int, tokens: int = 1) -> bool:
        """Whether a row that becomes `length` tokens long by its last `tokens` is embedded otherwise on the way."""
        return any(length - tokens <= switch < length for switch in self.switches) or length > self.grows_from


def rope(model: Any) -> Rope:
    """Of all the model's rotary embeddings."""
    found = [(kind, length) for module in model.modules() for kind, length in _changes(module).values()]
    switches = frozenset(length for kind, length in found if kind == "longrope")
    return Rope(switches, min((length for kind, length in found if kind == "dynamic"), default=math.inf))


def max_positions(model: Any) -> int | None:
    """How long a sequence the model can be given; None where its configuration sets no limit."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or limit < 0:
        return None
    settings = getattr(config, "rope_parameters", None) or {}
    stretched = settings.get("factor", 1.0) if settings.get("rope_type") == "dynamic" else 1.0
    return int(limit * stretched)


def embed_positions_by_row(model: Any) -> None:
    """Has rotary embeddings that choose their frequencies by the longest row of a batch, or by what they were given
    before, choose by each row's own length. In the tree of `model`'s modules, which a caller must own.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _changes(child):
                # A copy: it keeps its last frequencies in a buffer, which another forward may be using on its stream.
                setattr(parent, name, _RopeByRow(copy.deepcopy(child)))


class _RopeByRow(nn.Module):
    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        def call(rows: Tensor) -> tuple[Tensor, ...]:
            return self.rope(x, rows, *args, **kwargs)

        layer_type = args[0] if args else kwargs.get("layer_type")
        kind, length = _changes(self.rope).get(layer_type, ("", 0))
        if kind == "dynamic":
            rows = []
            for row in position_ids.split(1):
                call(torch.zeros_like(row))  # a short sequence takes back what a long one has changed
                rows.append(call(row))
            return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
        if kind == "longrope":
            # A row more is beyond the switch in any case; in the other call no row is.
            long = call(torch.cat([position_ids, torch.full_like(position_ids[:1], length)]))
            short = call(position_ids.clamp_max(length - 1))
            is_long = (position_ids.amax(-1) >= length)[:, None, None]
            return tuple(torch.where(is_long, one[:-1], other) for one, other in zip(long, short, strict=True))
        return tuple(call(position_ids))


def _changes(module: Any) -> dict[str | None, tuple[str, int]]:
    """Of a rotary embedding, by kind of layer (None: all), how its frequencies change and beyond which length."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    by_layer = kinds if isinstance(kinds, Mapping) else {None: kinds}
    found: dict[str | None, tuple[str, int]] = {}
    for layer, kind in by_layer.items():
        if kind == "longrope" and config is not None:
            settings = config.rope_parameters if layer is None else config.rope_parameters[layer]
            found[layer] = kind, settings["original_max_position_embeddings"]
        elif kind == "dynamic" and config is not None:
            found[layer] = kind, config.max_position_embeddings
    return found

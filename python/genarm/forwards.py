"""Forward passes over rows that grow one token a step, each at a length of its own.

`StaticForward` keeps the KV caches in slots that are allocated once: a row can end and another begin at any step, and
a step has no shape that depends on the tokens, so that it can be captured in a CUDA graph. `PlainForward` takes any
other model: a batch that begins and ends together, in the caches that the model makes for itself.
"""

import inspect
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from . import loading
from .errors import GenarmError

Prompts = Sequence[Sequence[Sequence[int]]]
"""Token ids by row, then by operand."""


class Forward(Protocol):
    """What the engine needs of one forward pass. An operand is a model whose logits it gives: more than one where
    models share their weights (`shared.py`).
    """

    operands: int
    device: torch.device

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        """Puts prompts into slots; logits `[n, operands, V]` of the token after each."""

    def step(self, tokens: Tensor, live: Tensor, window: int) -> Tensor:
        """Logits `[n, operands, V]` after `tokens` `[n]` int64, one for each of the first n slots.

        No row that is live `[n]` bool may be longer than `window` afterwards; of the others nothing is kept.
        """

    def advance(self, live: Tensor) -> None:
        """Makes the rows `[n]` bool that took a token in a step longer by it."""

    def move(self, source: int, target: int, window: int) -> None:
        """Copies the row of a slot, no longer than `window`, into another slot."""


@dataclass(frozen=True)
class LayerShape:
    """Of one layer's KV cache."""

    key: tuple[int, int]  # heads, width of a head
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    window: int | None  # tokens that a query sees, itself included; None: all

    @property
    def bytes_per_token(self) -> int:
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


class _Layer(CacheLayerMixin):
    """Keys and values `[rows, length, heads, width]`: a token's are contiguous, and written by its index in rows."""

    is_sliding = False  # also where the layer attends to a window: the mask says so
    is_compileable = True

    def __init__(self, shape: LayerShape, rows: int, length: int) -> None:
        super().__init__()
        # Zeros: what has not been written is multiplied by a probability of 0, which NaN would survive.
        self.keys = torch.zeros(rows, length, *shape.key, dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros(rows, length, *shape.value, dtype=shape.dtype, device=shape.device)
        self._by_token = [x.flatten(0, 1).flatten(1) for x in (self.keys, self.values)]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, index: Tensor, rows: int, window: int
    ) -> tuple[Tensor, Tensor]:
        index = index.to(self.keys.device)
        for stored, new in zip(self._by_token, (key_states, value_states), strict=True):
            stored.index_copy_(0, index, new.transpose(1, 2).reshape(len(index), -1))
        if not window:
            return key_states, value_states
        return self.keys[:rows, :window].transpose(1, 2), self.values[:rows, :window].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # for prefill, where a prompt attends to itself; a step brings its own mask

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[1])


class _SlotCache(Cache):
    """What transformers' models call: `update` with a layer's new keys and values `[rows, heads, T, width]`."""

    def __init__(self, shapes: Sequence[LayerShape], rows: int, length: int) -> None:
        super().__init__(layers=[_Layer(shape, rows, length) for shape in shapes])
        self._index: Tensor
        self._rows = self._window = 0

    def clear(self, rows: Tensor) -> None:
        """Takes out what earlier rows have left, which may be NaN."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored.index_fill_(0, rows.to(stored.device), 0)

    def begin(self, index: Tensor, rows: int, window: int) -> None:
        """The next forward writes at `index` `[rows * T]` of the flattened rows, and attends to the first `window`
        tokens of each row; to nothing but itself where `window` is 0.
        """
        self._index, self._rows, self._window = index, rows, window

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        return layer.update(key_states, value_states, index=self._index, rows=self._rows, window=self._window)


class StaticForward:
    """One model over slots of `operands` rows each, in caches of `length` tokens a row that are allocated here.

    Rows lie slot after slot, so that the first n slots are the first rows. `lengths` `[slots, operands]` tokens are in
    the cache.
    """

    def __init__(
        self, models: "StaticModels", shapes: Sequence[LayerShape], slots: int, length: int, operands: int = 1
    ) -> None:
        self.operands = operands
        self.device = models.device
        self._models = models
        self._length = length
        self._cache = _SlotCache(shapes, slots * operands, length)
        self._windows = {shape.window for shape in shapes}
        self._dtype = shapes[0].dtype
        self._options = _logits_of_last(models.prefill)
        self.lengths = torch.zeros(slots, operands, dtype=torch.int64, device=self.device)
        self._starts = torch.arange(slots * operands, device=self.device) * length
        self._columns = torch.arange(length, device=self.device)

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        ids, mask, places = _left_padded([ids for operands in prompts for ids in operands])
        where = torch.tensor([slot * self.operands + i for slot in slots for i in range(self.operands)])
        # Around the width: padding goes behind the prompt, where no query looks until a token has taken its place.
        index = (where * self._length)[:, None] + places % ids.shape[1]
        self._cache.clear(to_device(where, self.device))
        self._cache.begin(to_device(index.flatten(), self.device), len(ids), 0)
        outputs = self._models.prefill(
            input_ids=to_device(ids, self.device),
            position_ids=to_device(places.clamp_min(0), self.device),
            attention_mask=None if mask.all() else to_device(mask.long(), self.device),
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        at = to_device(torch.tensor(slots), self.device)
        self.lengths[at] = to_device(mask.sum(1).view(-1, self.operands), self.device)
        return self._by_operand(outputs.logits)

    def step(self, tokens: Tensor, live: Tensor, window: int) -> Tensor:
        # A row that has ended takes its first place: its last may lie behind the window, or off a position table.
        lengths = torch.where(live.to(self.device)[:, None], self.lengths[: len(tokens)], 0).flatten()
        rows = len(lengths)
        self._cache.begin(self._starts[:rows] + lengths, rows, window)
        outputs = self._models.step(
            input_ids=tokens.to(self.device)[:, None].expand(-1, self.operands).reshape(rows, 1),
            position_ids=lengths[:, None],
            attention_mask=self._mask(lengths, window),
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        return self._by_operand(outputs.logits)

    def advance(self, live: Tensor) -> None:
        self.lengths[: len(live)] += live.to(self.device)[:, None]

    def move(self, source: int, target: int, window: int) -> None:
        rows, to = (slice(slot * self.operands, (slot + 1) * self.operands) for slot in (source, target))
        for layer in self._cache.layers:
            for stored in (layer.keys, layer.values):
                stored[to, :window] = stored[rows, :window]
        self.lengths[target] = self.lengths[source]

    def _mask(self, lengths: Tensor, window: int) -> Any:
        """Added to the scores, `[rows, 1, 1, window]`: 0 where a row's new token looks, -inf elsewhere; by the layer's
        kind where there are two.
        """
        columns, last = self._columns[:window], lengths[:, None]
        causal = columns <= last
        masks = {
            "full_attention" if span is None else "sliding_attention": torch.where(
                causal if span is None else causal & (columns > last - span), 0.0, -torch.inf
            ).to(self._dtype)[:, None, None]
            for span in self._windows
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _by_operand(self, logits: Tensor) -> Tensor:
        return logits[:, -1].unflatten(0, (-1, self.operands))


class StaticModels:
    """A model as `StaticForward` calls it. Both are twins over the model's own weights, which stays as it is."""

    def __init__(self, model: Any, fuse: bool = False) -> None:
        self.device = torch.device(model.device)
        self.prefill = loading.twin(model)
        if head := self.prefill.get_output_embeddings():
            # On a CPU torch copies the head's weights, a row at a time, for strided states: the last column of many.
            # A clone even of a single row, which counts as contiguous and is copied for all the same.
            head.register_forward_pre_hook(lambda _, args: (args[0].clone(memory_format=torch.contiguous_format),))
        self.one_token = loading.twin(model)
        config = unwrapped(self.one_token).config.get_text_config()
        if config._attn_implementation != "eager":  # in which some models do more
            config._attn_implementation = "genarm_decode"
        self.step = _Compiled(self.one_token) if fuse else self.one_token


class _Compiled:
    """`torch.compile` of a model's step, for each number of rows and each window anew; its results stay on disk."""

    def __init__(self, model: Any) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genarm" / "inductor"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # torch's own default is cleared at a restart
        self._name = type(unwrapped(model)).__name__
        self._model = torch.compile(model, dynamic=False)
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, *, input_ids: Tensor, attention_mask: Any, **inputs: Any) -> Any:
        mask = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
        sizes = len(input_ids), mask.shape[-1]
        start = time.perf_counter()
        if new := sizes not in self._seen:
            self._seen.add(sizes)
            print(f"genarm: compiling {self._name} for {sizes[0]} rows ...", end="", file=sys.stderr, flush=True)
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            outputs = self._model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        if new:
            print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return outputs


class PlainForward:
    """One model over a batch of rows that begin together, in whatever cache the model makes.

    Prompts are padded on the left, so that all rows grow at their right end together; rows that have ended grow on.
    """

    operands = 1

    def __init__(self, model: Any) -> None:
        self.device = torch.device(model.device)
        self._model = model
        parameters = inspect.signature(unwrapped(model).forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._options = _logits_of_last(model)
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._max_positions = loading.max_positions(model)
        self._mask: Tensor | None = None
        self._positions: Tensor
        self._cache: Any = None

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        ids, mask, places = _left_padded([ids for (ids,) in prompts])
        self._mask = None if mask.all() else mask.long().to(self.device)
        self._positions = places.clamp_min(0).to(self.device)
        self._cache = None
        return self._forward(ids.to(self.device))

    def step(self, tokens: Tensor, live: Tensor, window: int) -> Tensor:
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, 1), value=1)
        self._positions = self._positions[:, -1:] + 1
        if self._max_positions is not None:  # a row that has ended must not run off the end of a position table
            self._positions = self._positions.clamp_max(self._max_positions - 1)
        return self._forward(tokens[:, None].to(self.device))

    def advance(self, live: Tensor) -> None:
        pass

    def move(self, source: int, target: int, window: int) -> None:
        raise NotImplementedError("a model with a cache of its own keeps its rows")

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, self._cache_name: self._cache, "use_cache": True, **self._options}
        if self._mask is not None and (self._cache is None or self._cache_name == "past_key_values"):
            # A state-space cache has taken the padding in; its steps would multiply the whole mask into one token.
            inputs["attention_mask"] = self._mask
        if self._takes_positions:
            inputs["position_ids"] = self._positions
        outputs = self._model(**inputs)
        self._cache = outputs.get(self._cache_name)
        if self._cache is None:
            raise GenarmError(f"{type(unwrapped(self._model)).__name__} gives no cache to decode with")
        logits: Tensor = outputs.logits
        return logits[:, -1:]


@torch.inference_mode()
def static_shapes(model: Any) -> list[LayerShape] | str:
    """The shapes of the model's KV caches, seen in a forward pass of a few tokens; or why `StaticForward` cannot run
    it. A second pass, through static caches, must give the same logits.
    """
    bare = unwrapped(model)
    lacks = {"past_key_values", "position_ids", "attention_mask"} - set(inspect.signature(bare.forward).parameters)
    if lacks:
        return f"its forward takes no {' nor '.join(sorted(lacks))}"
    config = bare.config.get_text_config()
    if "local" in getattr(config, "attention_layers", ()):
        return "its local attention counts from the end of what it is given"
    tokens = list(range(2, 7))
    try:
        kinds, sliding = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if kinds is None:
            kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
        if other := set(kinds) - {"full_attention", "sliding_attention"}:
            return f"it has layers of kind {', '.join(sorted(other))}"
        seen = _Shapes()
        model(input_ids=_ids(model, tokens), past_key_values=seen, use_cache=True)
        windows = [None if kind == "full_attention" else sliding for kind in kinds]
        shapes = [LayerShape(*shape, window) for shape, window in zip(seen.shapes, windows, strict=True)]
        wrong = differs(StaticModels(model), shapes, [model])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a cache that it has not seen before
        return f"static caches fail in it: {type(error).__name__}: {loading.first_line(error)}"
    return "its logits differ with static caches" if wrong else shapes


@torch.inference_mode()
def differs(models: StaticModels, shapes: Sequence[LayerShape], alone: Sequence[Any]) -> bool:
    """Whether static caches change the logits that each of the operands' models gives `alone`, by more than rounding
    does: for prompts of different lengths, and a token later.
    """
    rows = [[2 + i + j for j in range(3 + i)] for i in range(len(alone))]
    forward = StaticForward(models, shapes, slots=3, length=16, operands=len(alone))
    last = 2 + len(alone)
    vocabulary = min(map(loading.embeddings, alone))
    rows, last = [[token % vocabulary for token in row] for row in rows], last % vocabulary
    first = forward.prefill([2, 1], [[row[:1] for row in rows], rows])[1]
    live = torch.tensor([False, True, True], device=models.device)
    tokens = torch.full((3,), last, device=models.device)
    second = forward.step(tokens, live, window=16)[1]
    for logits, fed in ((first, rows), (second, [[*row, last] for row in rows])):
        for one, model, ids in zip(logits, alone, fed, strict=True):
            expected = model(input_ids=_ids(model, ids), use_cache=False).logits[0, -1].float()
            if not (one.float() - expected).norm() <= 0.1 * (expected - expected.mean()).norm():
                return True
    return False


def _ids(model: Any, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([tokens], device=model.device) % loading.embeddings(model)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From the host, which does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and place in the row, each `[rows, T]`: on the left, so that every row's last token is in the
    last column. Places before the first token are negative.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    places = torch.arange(width) - torch.tensor([[width - len(row)] for row in rows])
    return ids, places >= 0, places


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose own forward hides its parameters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Shapes(Cache):
    """Keeps nothing but the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, torch.device]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx != len(self.shapes):
            raise GenarmError(f"layer {layer_idx} has no cache of its own")
        key, value = ((x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.shapes.append((key, value, key_states.dtype, key_states.device))
        return key_states, value_states


def _logits_of_last(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters else {}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one token a row, `query` `[B, heads, 1, width]`, without a copy of the cache for each query head of
    a group: the group's queries go where a prompt's tokens would.
    """
    if more := {name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None}:
        raise NotImplementedError(f"attention with {', '.join(sorted(more))}")
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.flatten(1, 2)[:, None], None


AttentionInterface.register("genarm_decode", _attend)

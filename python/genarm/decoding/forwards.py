"""Forward passes over rows that grow by up to T tokens a step, each at a length of its own.

`StaticForward` keeps the KV caches in slots that are allocated once: a row can end and another begin at any step, and
a step has no shape that depends on the tokens, so that it can be captured in a CUDA graph. `PlainForward` takes any
other model, one token a step: a batch that begins and ends together, in the caches that the model makes for itself.
Which of them a model gets, `checks.py` decides.

How long the rows are, the engine knows and says at each step. A step writes the keys and values of its tokens behind a
row; the next step writes over those that the row did not become longer by, and no token looks at them.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from genarm_kernels.backends import cpu

from ..models import loading, transformers_api
from ..models.transformers_api import Cache, CacheLayerMixin
from . import fused
from .linears import replace_linears

Prompts = Sequence[Sequence[Sequence[int]]]
"""Token ids by row, then by operand."""


class Forward(Protocol):
    """What the engine needs of one forward pass. An operand is a model whose logits it gives: more than one where
    models share their weights (`lora.py`).
    """

    operands: int
    device: torch.device
    grows_freely: bool
    """No row outgrows its cache."""

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        """Puts prompts into slots; logits `[n, operands, 1, V]` of the token after each."""

    def step(self, tokens: Tensor, lengths: Tensor, covered: int) -> Tensor:
        """Feeds `tokens` `[n, T]` int64 to the rows of the first n slots, each behind the `lengths` `[n, operands]`
        int64 tokens that it has; logits `[n, operands, T, V]` after each token.

        With its T tokens a row may be neither longer than `covered` nor `outgrown`. A row that has ended is given
        length 0: its tokens then have a place, however far it had come, and nothing of it is kept.
        """

    def move(self, source: int, target: int, covered: int) -> None:
        """Copies the row of a slot, no longer than `covered`, into another slot."""

    def outgrown(self, length: int, tokens: int = 1) -> bool:
        """Whether a row that becomes `length` tokens long by a step of `tokens` needs another cache on the way: it is
        to be prefilled, or stepped by fewer.
        """


class UnsuitedError(Exception):
    """A model does what `StaticForward` cannot run; the message says what."""


@dataclass(frozen=True)
class LayerShape:
    """Of one layer's KV cache."""

    key: tuple[int, int]  # heads, width of a head
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    sliding_window: int | None  # tokens that a query sees, itself included; None: all

    @property
    def bytes_per_token(self) -> int:
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


class _Layer(CacheLayerMixin):
    """Keys and values `[rows, length, heads, width]`: a token's are contiguous, and written by its index in rows."""

    is_sliding = False  # also where the layer's attention slides: the mask says so
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
        self, key_states: Tensor, value_states: Tensor, *args: Any, index: Tensor, rows: int, covered: int
    ) -> tuple[Tensor, Tensor]:
        index = index.to(self.keys.device)
        for stored, new in zip(self._by_token, (key_states, value_states), strict=True):
            stored.index_copy_(0, index, new.transpose(1, 2).reshape(len(index), -1))
        if not covered:
            return key_states, value_states
        return self.keys[:rows, :covered].transpose(1, 2), self.values[:rows, :covered].transpose(1, 2)

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
        self._rows = self._covered = 0

    def clear(self, rows: Tensor) -> None:
        """Takes out what earlier rows have left, which may be NaN."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored.index_fill_(0, rows.to(stored.device), 0)

    def begin(self, index: Tensor, rows: int, covered: int) -> None:
        """The next forward writes at `index` `[rows * T]` of the flattened rows, and attends to the first `covered`
        tokens of each row; to nothing but itself where `covered` is 0.
        """
        self._index, self._rows, self._covered = index, rows, covered

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        return layer.update(key_states, value_states, index=self._index, rows=self._rows, covered=self._covered)


class StaticForward:
    """One model over slots of `operands` rows each, in caches of `length` tokens a row that are allocated here.

    Rows lie slot after slot, so that the first n slots are the first rows.
    """

    def __init__(
        self, models: "StaticModels", shapes: Sequence[LayerShape], slots: int, length: int, operands: int = 1
    ) -> None:
        self.operands = operands
        self.device = models.device
        self.grows_freely = models.rope.constant
        self._models = models
        self._length = length
        self._cache = _SlotCache(shapes, slots * operands, length)
        self._sliding_windows = {shape.sliding_window for shape in shapes}
        self._dtype = shapes[0].dtype
        self._last_only = transformers_api.last_logits_only(models.prefill)
        self._options: dict[str, Any] = {models.cache_argument: self._cache, "use_cache": True}
        self._starts = torch.arange(slots * operands, device=self.device) * length
        self._columns = torch.arange(length, device=self.device)
        self._core: cpu.DecoderStep | None = None
        self.pads_prompts = False
        """Whether short prompts too go through `models.prefill`, padded: for the check of it."""
        if models.decoder is not None:
            decoder = fused.with_positions(models.decoder, models.prefill, length, operands)
            caches = ([layer.keys for layer in self._cache.layers], [layer.values for layer in self._cache.layers])
            if (reason := cpu.unsuited_decoder(decoder, *caches)) is not None:
                raise UnsuitedError(reason)
            self._core = cpu.DecoderStep(decoder, *caches)

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        longest = max(len(ids) for operands in prompts for ids in operands)
        if self._core is not None and self._core.prefills(longest) and not self.pads_prompts:
            return self._prefill_by_core(self._core, slots, prompts)
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
            **self._last_only,
            **self._options,
        )
        return self._by_operand(outputs.logits[:, -1:])

    def _prefill_by_core(self, core: cpu.DecoderStep, slots: Sequence[int], prompts: Prompts) -> Tensor:
        """Row after row: a prompt has rows enough for a product, and needs no padding."""
        none = torch.zeros(1, dtype=torch.int64)
        rows = [
            (slot * self.operands + i, ids) for slot, of in zip(slots, prompts, strict=True) for i, ids in enumerate(of)
        ]
        return self._by_operand(torch.cat([core(torch.tensor([ids]), none, row, last=True) for row, ids in rows]))

    def step(self, tokens: Tensor, lengths: Tensor, covered: int) -> Tensor:
        width = tokens.shape[1]
        if self._core is not None:
            return self._by_operand(self._core(self._of_rows(tokens), lengths.flatten()))
        places = lengths.to(self.device).flatten()[:, None] + self._columns[:width]
        rows = len(places)
        self._cache.begin((self._starts[:rows, None] + places).flatten(), rows, covered)
        outputs = self._models.step(
            input_ids=self._of_rows(tokens.to(self.device)),
            position_ids=places,
            attention_mask=self._mask(places, covered),
            **self._options,
        )
        return self._by_operand(outputs.logits)

    def outgrown(self, length: int, tokens: int = 1) -> bool:
        return self._models.rope.outgrown(length, tokens)

    def move(self, source: int, target: int, covered: int) -> None:
        rows, to = (slice(slot * self.operands, (slot + 1) * self.operands) for slot in (source, target))
        for layer in self._cache.layers:
            for stored in (layer.keys, layer.values):
                stored[to, :covered] = stored[rows, :covered]

    def _mask(self, places: Tensor, covered: int) -> Any:
        """Added to the scores, `[rows, 1, T, covered]`: 0 where a row's token at a place looks, -inf elsewhere; by the
        layer's kind where there are two.
        """
        columns, own = self._columns[:covered], places[..., None]
        causal = columns <= own
        masks = {
            "full_attention" if span is None else "sliding_attention": torch.where(
                causal if span is None else causal & (columns > own - span), 0.0, -torch.inf
            ).to(self._dtype)[:, None]
            for span in self._sliding_windows
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _of_rows(self, tokens: Tensor) -> Tensor:
        return tokens.repeat_interleave(self.operands, 0) if self.operands > 1 else tokens

    def _by_operand(self, logits: Tensor) -> Tensor:
        return logits.unflatten(0, (-1, self.operands))


LINEAR = ("fused", "core", "torch")
"""Whose linear layers a step may have, the fastest first."""


class StaticModels:
    """A model as `StaticForward` calls it: twins over the model's own weights, which stays as it is."""

    def __init__(self, model: Any, shapes: Sequence[LayerShape], linear: str = "torch") -> None:
        """`linear`: one of `LINEAR`; what cannot be had is the next one (`kind`)."""
        self.device = torch.device(model.device)
        self.cache_argument = transformers_api.cache_argument(model) or ""
        self.rope = transformers_api.rope(model)
        self.compiled = False
        self.kind = linear
        """Whose linear layers a step has, see `ModelPath.linear`."""
        self.prefill = self._twin(model)
        self.decoder = None
        if self.kind == "fused":
            self.decoder = fused.describe(self.prefill, [shape.sliding_window for shape in shapes])
            self.kind = "core" if self.decoder is None else "fused"
        if head := self.prefill.get_output_embeddings():
            # On a CPU torch copies the head's weights, a row at a time, for strided states: the last column of many.
            # A clone even of a single row, which counts as contiguous and is copied for all the same.
            head.register_forward_pre_hook(lambda _, args: (args[0].clone(memory_format=torch.contiguous_format),))
        if self.decoder is None:
            self.step = self._twin(model)
            transformers_api.set_attention(self.step, "genarm_decode")

    def compile(self) -> None:
        """`torch.compile` for a step."""
        self.step, self.compiled = _Compiled(self.step), True

    def _twin(self, model: Any) -> Any:
        twin = loading.twin(model)
        transformers_api.embed_positions_by_row(twin)
        if self.kind != "torch":
            replace_linears(twin)
        return twin


class _Compiled:
    """`torch.compile` of a model's step, anew for each number of rows, tokens and places covered. Its results stay on
    disk.
    """

    def __init__(self, model: Any) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genarm" / "inductor"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # torch's own default is cleared at a restart
        self._name = type(transformers_api.unwrapped(model)).__name__
        self._model = torch.compile(model, dynamic=False)
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, *, input_ids: Tensor, attention_mask: Any, **inputs: Any) -> Any:
        mask = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
        sizes = (*input_ids.shape, mask.shape[-1])
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

    Prompts are padded on the left, so that all rows grow at their right end together, one token a step; rows that have
    ended grow on.
    """

    operands = 1

    def __init__(self, model: Any, kind: "PlainKind") -> None:
        self.device = torch.device(model.device)
        self._rope = transformers_api.rope(model)
        self._model = model
        if not self._rope.constant:
            self._model = loading.twin(model)
            transformers_api.embed_positions_by_row(self._model)
        self.grows_freely = self._rope.constant and kind is not PlainKind.UNCACHED
        self._kind = kind
        self._takes_positions = "position_ids" in transformers_api.parameters(model)
        self._options = transformers_api.last_logits_only(model)
        self._cache_name = transformers_api.cache_argument(model) or ""
        self._mask: Tensor | None = None
        self._cache: Any = None

    def prefill(self, slots: Sequence[int], prompts: Prompts) -> Tensor:
        ids, mask, places = _left_padded([ids for (ids,) in prompts])
        self._mask = None if mask.all() else mask.long().to(self.device)
        self._cache = None
        return self._forward(ids.to(self.device), places.clamp_min(0).to(self.device))

    def step(self, tokens: Tensor, lengths: Tensor, covered: int) -> Tensor:
        if tokens.shape[1] != 1:
            raise ValueError(
                f"tokens: expected one per row, as a cache of the model's own takes none back, got {tokens.shape[1]}"
            )
        if self._mask is not None:
            # A state-space cache has taken the padding in; a step would multiply the whole mask into one token.
            grown = F.pad(self._mask, (0, 1), value=1)
            self._mask = None if self._kind is PlainKind.MASKED_PROMPTS else grown
        return self._forward(tokens.to(self.device), lengths.to(self.device))

    def move(self, source: int, target: int, covered: int) -> None:
        raise NotImplementedError("a model with a cache of its own keeps its rows")

    def outgrown(self, length: int, tokens: int = 1) -> bool:
        return self._kind is PlainKind.UNCACHED or self._rope.outgrown(length, tokens)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        cached = self._kind is not PlainKind.UNCACHED
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cached, **self._options}
        if self._cache is not None:
            inputs[self._cache_name] = self._cache
        if self._mask is not None:
            inputs["attention_mask"] = self._mask
        if self._takes_positions and cached:
            inputs["position_ids"] = positions
        outputs = self._model(**inputs)
        if cached and (cache := transformers_api.cache_of(outputs)) is None:
            raise UnsuitedError("it gives no cache")
        self._cache = cache if cached else None
        logits: Tensor = outputs.logits
        return logits[:, None, -1:]


class PlainKind(Enum):
    """What a model in the plain loop allows, the fastest first; the value says it to the user."""

    BATCHED = "a batch at a time"
    MASKED_PROMPTS = "a batch at a time, padding masked in prompts alone"
    ALONE = "one prompt at a time"
    UNCACHED = "one prompt at a time and without a cache, all its tokens anew for each one"

    @property
    def batched(self) -> bool:
        return self in (PlainKind.BATCHED, PlainKind.MASKED_PROMPTS)


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


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of T tokens a row, `query` `[B, heads, T, width]`, without a copy of the cache for each query head of a
    group: the group's queries go where a longer prompt's tokens would, T of a head after T of the one before.
    """
    # A softcap is passed over as PyTorch's own attention passes it over; where the model's does not, the logits differ.
    if more := {name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None}:
        raise UnsuitedError(f"its attention has {', '.join(sorted(more))}")
    heads, tokens = query.shape[1:3]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    if tokens > 1:  # the mask of a single one is that of every head
        attention_mask = attention_mask.repeat(1, 1, heads // key.shape[1], 1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2), None


transformers_api.register_attention("genarm_decode", _attend)

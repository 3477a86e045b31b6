"""Which forward pass a model gets: the fastest whose logits are those of the model alone, without a cache.

Nothing is believed of a model: a few rows of different lengths are run, prompts and steps, across the lengths at which
its configuration says that it changes (sliding windows, chunks, long rope), and every row's logits are compared with a
forward over the whole row.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..models import loading, transformers_api
from ..models.transformers_api import Cache
from .forwards import LINEAR, Forward, LayerShape, PlainForward, PlainKind, StaticForward, StaticModels, UnsuitedError

# Parameters times tokens of a forward that a check may cost: what a device computes in about half a second.
_AFFORDABLE = {"cuda": 5e13}
_AFFORDABLE_ELSEWHERE = 2e10
_SHORTEST = 8  # the length that rows cross where no threshold does
_STEPS = 2  # after a prompt: with its own, three places of a row are compared
# How far logits may be from those of the model alone, relative to their spread: what roundings alone may do to a deep
# model (0.05 was seen of 24 layers in bfloat16), or so many times what company (more tokens behind, more rows beside)
# does to a row of this one, but never more than the second number.
_ROUNDING = {torch.float32: (1e-3, 1e-2), torch.float16: (0.02, 0.1), torch.bfloat16: (0.07, 0.1)}
_TIMES_NOISE = 8
# What a model raises that is given a cache or an argument it does not know.
_MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@torch.inference_mode()
def static_models(model: Any, linear: str = "auto") -> tuple[StaticModels, list[LayerShape]] | str:
    """The model as `StaticForward` runs it, and the shapes of its KV caches, seen in a forward pass of a few tokens; or
    why `StaticForward` cannot run it. `linear`: "auto", or "torch" for the model's own linear layers.
    """
    name = transformers_api.cache_argument(model)
    missing = {"position_ids", "attention_mask"} - transformers_api.parameters(model)
    if lacks := sorted(missing | (set() if name else {"cache"})):
        return f"its forward takes no {' nor '.join(lacks)}"
    sliding_windows = transformers_api.sliding_windows(model)
    if isinstance(sliding_windows, str):
        return sliding_windows

    def shapes() -> list[LayerShape]:
        seen = _Shapes()
        model(input_ids=_tensor(model, [_tokens(model, 5)]), use_cache=True, **{str(name): seen})
        if len(seen.shapes) != len(sliding_windows):
            raise UnsuitedError(f"{len(seen.shapes)} of its {len(sliding_windows)} layers use a cache")
        return [LayerShape(*shape, window) for shape, window in zip(seen.shapes, sliding_windows, strict=True)]

    found = attempt(shapes)
    if isinstance(found, str):
        return f"static caches fail in it: {found}"
    models = same_logits(lambda _: model, found, [model], linear)
    if isinstance(models, StaticModels):
        return models, found
    return f"static caches fail in it: {models}" if models else "its logits differ with static caches"


def same_logits(
    make: Callable[[str], Any], shapes: Sequence[LayerShape], alone: Sequence[Any], linear: str
) -> StaticModels | str | None:
    """The model that `make` makes, with the fastest linear layers with which its logits are those that each operand's
    model gives `alone`. Otherwise what was raised, in words, or None: the logits differ with all of them.
    """
    wrong: Any = None
    for kind in LINEAR if linear == "auto" else ("torch",):
        wrong = attempt(partial(_tried, make, shapes, alone, kind))
        if isinstance(wrong, StaticModels):
            return wrong
    return str(wrong) if wrong else None


def _tried(
    make: Callable[[str], Any], shapes: Sequence[LayerShape], alone: Sequence[Any], linear: str
) -> StaticModels | None:
    models = StaticModels(make(linear), shapes, linear)
    return None if differs(models, shapes, alone) else models


def plain_kind(model: Any) -> PlainKind:
    """How the model runs in a plain loop."""
    for kind in (PlainKind.BATCHED, PlainKind.MASKED_PROMPTS, PlainKind.ALONE):
        if attempt(partial(_differs, PlainForward(model, kind), [model], kind.batched)) is False:
            return kind
    return PlainKind.UNCACHED  # what the others are compared with


@torch.inference_mode()
def differs(models: StaticModels, shapes: Sequence[LayerShape], alone: Sequence[Any]) -> bool:
    """Whether static caches change the logits that each of the operands' models gives `alone`."""
    longest = _lengths(alone)[-1] + 2 + _STEPS + len(alone)
    length = -(-longest // 16) * 16
    forward = StaticForward(models, shapes, slots=3, length=length, operands=len(alone))
    if models.kind == "fused" and _differs(forward, alone, batched=True, covered=length):
        return True
    forward.pads_prompts = True  # as long ones are, also where steps are fused
    return _differs(forward, alone, batched=True, covered=length)


@torch.inference_mode()
def _differs(forward: Forward, alone: Sequence[Any], batched: bool, covered: int = 0) -> bool:
    """Whether the logits of rows in `forward` are other than those of each operand's own model, alone and uncached."""
    expected = [_Uncached(model) for model in alone]
    for length in _lengths(alone):
        # One row is far shorter than the length, one grows across it, one begins beyond it; an operand's is longer by
        # a token than that of the one before.
        rows = [
            [_tokens(model, start + i, seed=i) for i, model in enumerate(alone)] for start in (2, length, length + 2)
        ]
        for group in [rows] if batched else [[row] for row in rows]:
            if _group_differs(forward, group, expected, covered):
                return True
    return False


def _group_differs(
    forward: Forward, rows: list[list[list[int]]], expected: Sequence["_Uncached"], covered: int
) -> bool:
    slots = list(range(len(rows)))
    logits = forward.prefill(slots, rows)
    distances: list[list[list[float]]] = [[[] for _ in expected] for _ in slots]
    for step in range(_STEPS + 1):
        for slot in slots:
            for operand, own in enumerate(expected):
                distances[slot][operand].append(own.distance(logits[slot, operand, 0], rows[slot][operand]))
        if step == _STEPS:
            break
        fed = [expected[0].token(5 * step + slot) for slot in slots]
        lengths = torch.tensor([[len(ids) for ids in row] for row in rows])
        rows = [[[*ids, token] for ids in row] for row, token in zip(rows, fed, strict=True)]
        again = [slot for slot in slots if any(forward.outgrown(len(ids)) for ids in rows[slot])]
        if len(again) < len(slots):
            lengths[again] = 0
            logits = forward.step(torch.tensor(fed)[:, None], lengths, covered)
        if again:
            logits = logits.clone()
            logits[again] = forward.prefill(again, [rows[slot] for slot in again])
    # Of most of a row's tokens: a rounding may send one to another expert, but a wrong position is wrong from there on.
    return any(not median(row[operand]) <= own.tolerance for row in distances for operand, own in enumerate(expected))


class _Uncached:
    """A model alone: the logits after a row of tokens, from a forward over all of them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._last_only = transformers_api.last_logits_only(model)
        self._keeps_lengths = not transformers_api.rope(model).constant
        rows = [_tokens(model, _SHORTEST + 3, seed=i) for i in range(3)]
        alone = self._logits([rows[0][:_SHORTEST]])[0, -1]
        longer = self._logits([rows[0]])[0, _SHORTEST - 1]
        beside = self._logits([row[:_SHORTEST] for row in rows])[0, -1]
        noise = max(_distance(longer, alone), _distance(beside, alone))
        least, most = _ROUNDING.get(model.dtype, _ROUNDING[torch.bfloat16])
        self.tolerance = min(most, max(least, _TIMES_NOISE * noise))

    def token(self, i: int) -> int:
        return _tokens(self._model, 1, seed=i)[0]

    def distance(self, logits: Tensor, ids: Sequence[int]) -> float:
        """Of logits from those after a row; infinite where they are NaN."""
        distance = _distance(logits, self._logits([ids], **self._last_only)[0, -1])
        return math.inf if math.isnan(distance) else distance

    def _logits(self, rows: Sequence[Sequence[int]], **options: int) -> Tensor:
        if self._keeps_lengths:  # of longer rows that it was given before; a short one makes it forget them
            self._model(input_ids=_tensor(self._model, [rows[0][:1]]), use_cache=False)
        logits: Tensor = self._model(input_ids=_tensor(self._model, rows), use_cache=False, **options).logits
        return logits


class _Shapes(Cache):
    """Keeps nothing but the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, torch.device]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx != len(self.shapes):
            raise UnsuitedError(f"layer {layer_idx} has no cache of its own")
        key, value = ((x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.shapes.append((key, value, key_states.dtype, key_states.device))
        return key_states, value_states


def attempt(call: Callable[[], Any]) -> Any:
    """What the call gives, or in words what a model raised in it. An error of our own code is a bug, and speaks."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except UnsuitedError as error:
        return str(error)
    except _MODEL_ERRORS as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("genarm")
        if ours and not isinstance(error, RuntimeError):  # torch's word on tensors that a model has given us
            raise
        return f"{type(error).__name__}: {loading.first_line(error)}"


def _lengths(models: Sequence[Any]) -> list[int]:
    """Of rows to try: the models' thresholds, as far as they can be reached in a moment."""
    found = {_SHORTEST}
    for model in models:
        affordable = _AFFORDABLE.get(torch.device(model.device).type, _AFFORDABLE_ELSEWHERE)
        size = sum(parameter.numel() for parameter in model.parameters())
        limit = transformers_api.max_positions(model)
        found |= {
            length
            for length in transformers_api.thresholds(model)
            if length > 4 and length * size <= affordable and (limit is None or length + 8 + len(models) <= limit)
        }
    return sorted(found)


def _tokens(model: Any, n: int, seed: int = 0) -> list[int]:
    return [(3 + 7919 * (i + 13 * seed)) % loading.embeddings(model) for i in range(n)]


def _tensor(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=model.device)


def _distance(one: Tensor, other: Tensor) -> float:
    other = other.float()
    return float((one.float() - other).norm() / (other - other.mean()).norm())

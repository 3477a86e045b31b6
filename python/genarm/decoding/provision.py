"""Engines for a base and its ARMs: which forward passes they need, and how many prompts fit into memory at once."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genarm_kernels.backends import cpu

from ..errors import GenarmError
from ..models import transformers_api
from . import checks, lora
from .engine import Engine, Operand
from .forwards import LayerShape, PlainForward, PlainKind, StaticForward, StaticModels

_LOGGER = logging.getLogger("genarm")

# Attention covers so many tokens more at a time, masked to those there are; on a GPU each is a CUDA graph of its own.
_GRANULARITY = {"cuda": 256}
_GRANULARITY_ELSEWHERE = 16
# Prompts decoded at once where the caller leaves it open.
_MOST_AT_ONCE = {"cuda": 256}
_MOST_ELSEWHERE = 32
# Of the memory that is free, what caches may take; forward passes and logits need some too.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Options:
    """How an engine runs; see `GuidedDecoder`."""

    backend: str
    streams: bool
    cuda_graph: bool
    share_weights: bool
    compile: bool
    linear: str


@dataclass(frozen=True)
class ModelPath:
    """How one model's logits are computed."""

    model: str
    """ "the base", "ARM 'polite'"."""
    path: str
    """ "static" (slots, caches allocated once, the fast path) or "plain"."""
    why: str | None
    """Why this model has no static caches; of a model that has them None, also where it decodes in the plain loop
    for the sake of another.
    """
    shared: bool
    """Whether its rows are a part of the base's forward pass."""
    compiled: bool
    captured: bool
    """Whether its steps are in a CUDA graph, as far as has been seen."""
    linear: str
    """Whose linear layers it has: "torch", "core" (the CPU core's, one call each), or "fused" (a step is one call)."""

    def __str__(self) -> str:
        if self.path == "plain":
            return f"plain loop: {self.why}" if self.why else "plain loop"
        more = {"in the base's forward pass": self.shared, "compiled": self.compiled, "in a CUDA graph": self.captured}
        more |= {"the CPU core's linear layers": self.linear == "core", "fused steps": self.linear == "fused"}
        return ", ".join(["static caches", *(words for words, true in more.items() if true)])


@dataclass(frozen=True)
class Pass:
    """A forward pass: whose logits it gives (0: the base's), and its model, with the shapes of static caches if it has
    them.
    """

    operands: list[int]
    models: Any
    """`StaticModels`, or in the plain loop the model itself."""
    shapes: list[LayerShape]
    plain: PlainKind | None = None

    def bytes_per_token(self) -> int:
        return len(self.operands) * sum(shape.bytes_per_token for shape in self.shapes)


class Provider:
    """Makes engines, and keeps the last one: its caches and CUDA graphs serve the next request."""

    def __init__(
        self, base: Any, arms: Mapping[str, Any], vocab_size: int, eos: Sequence[int], options: Options
    ) -> None:
        self._models = {"the base": base, **{f"ARM {name!r}": arm for name, arm in arms.items()}}
        self._vocab_size = vocab_size
        self._eos = eos
        self._options = options
        self._device = torch.device(base.device)
        self._granularity = _GRANULARITY.get(self._device.type, _GRANULARITY_ELSEWHERE)
        self._cuda_graph = options.cuda_graph and self._device.type == "cuda"  # until a model cannot be captured
        self._passes: list[Pass] | None = None
        self._seen: list[Any] = []  # of the parameters, when the passes were planned
        self._why: dict[str, str] = {}  # a model has no static caches
        self._kept: Engine | None = None
        self._kept_is_full = False  # memory gave it fewer slots than were asked for

    def take(self, prompts: int, length: int, batch_size: int | None) -> tuple[Engine, int]:
        """An engine for so many prompts, each of at most `length` tokens with its continuation, and how many of them
        to decode at once. Give it back.

        Raises:
            GenarmError: memory for not even one of them.
        """
        passes = self.passes
        kept, self._kept = self._kept, None
        length = -(-length // self._granularity) * self._granularity
        slots = max(1, min(prompts, batch_size or _MOST_AT_ONCE.get(self._device.type, _MOST_ELSEWHERE)))
        if not all(one.plain is None or one.plain.batched for one in passes):
            slots = 1
        if kept is not None and kept.length >= length and (kept.slots >= slots or self._kept_is_full):
            return kept, min(slots, kept.slots)
        del kept  # its memory is free for the new one
        wanted = slots
        if self._fast:
            slots = min(slots, self._slots_that_fit(passes, length))
        engine = self._make(passes, slots, length)
        self._kept_is_full = engine.slots < wanted
        return engine, engine.slots

    def give_back(self, engine: Engine) -> None:
        """Only what ended well: after an error the caches may hold NaN."""
        self._kept = engine
        self._cuda_graph = self._cuda_graph and engine.cuda_graph

    def _make(self, passes: list[Pass], slots: int, length: int) -> Engine:
        try:
            return self._engine(passes, slots, length)
        except torch.OutOfMemoryError as error:  # others took it in the meantime
            if slots == 1:
                raise GenarmError(f"the KV caches of one prompt do not fit: {error}") from error
        torch.cuda.empty_cache()
        return self._make(passes, slots // 2, length)

    def _engine(self, passes: list[Pass], slots: int, length: int) -> Engine:
        operands: list[Any] = [None] * len(self._models)
        for forward, one in enumerate(passes):
            for index, operand in enumerate(one.operands):
                operands[operand] = Operand(forward, index)
        with torch.inference_mode():
            forwards = [
                StaticForward(one.models, one.shapes, slots, length, len(one.operands))
                if one.plain is None
                else PlainForward(one.models, one.plain)
                for one in passes
            ]
        return Engine(
            forwards,
            operands,
            slots,
            length=length,
            granularity=self._granularity,
            refill=self._fast,
            vocab_size=self._vocab_size,
            eos=self._eos,
            backend=self._options.backend,
            device=self._device,
            streams=self._options.streams,
            cuda_graph=self._cuda_graph and self._fast,
        )

    @property
    def passes(self) -> list[Pass]:
        """Decided once for models that stay where they are: which ARMs share the base's pass, and whether static caches
        work in every model.
        """
        # A CPU's core reads matrices by their addresses, which change when a model is moved or converted, and has norms
        # and biases in float32, which are others when the model's have been written to.
        parameters = [x for model in self._models.values() for x in model.parameters()]
        seen = [_address(x) if x.dim() > 1 else (_address(x), _version(x)) for x in parameters]
        if self._passes is None or seen != self._seen:
            self._kept, self._passes, self._seen = None, self._plan(), seen
        return self._passes

    @property
    def paths(self) -> list[ModelPath]:
        """By model, base first, how it is run."""
        of = {operand: one for one in self.passes for operand in one.operands}
        return [
            ModelPath(
                model=label,
                path="static" if self._fast else "plain",
                why=self._why.get(label),
                shared=i > 0 and 0 in of[i].operands,
                compiled=self._fast and of[i].models.compiled,
                captured=self._cuda_graph and self._fast,
                linear=of[i].models.kind if self._fast else "torch",
            )
            for i, label in enumerate(self._models)
        ]

    @property
    def _fast(self) -> bool:
        return all(one.plain is None for one in self.passes)

    def require_fast_path(self) -> None:
        """GenarmError, with all that is known of why, unless every model has static caches."""
        if not self._fast:
            raise GenarmError(f"not the fast path ({transformers_api.versions()}): {self._reasons()}")

    def _reasons(self) -> str:
        return "; ".join(f"{label}: {why}" for label, why in self._why.items())

    def _plan(self) -> list[Pass]:
        base, *arms = self._models.values()
        by_core = self._device.type == "cpu" and not self._options.compile and cpu.why_unavailable() is None
        linear = self._options.linear if by_core else "torch"
        found = {label: checks.static_models(model, linear) for label, model in self._models.items()}
        self._why = {label: why for label, why in found.items() if isinstance(why, str)}
        if self._why:
            kinds = [checks.plain_kind(model) for model in self._models.values()]
            slowest = max(kinds, key=list(PlainKind).index)
            _LOGGER.warning(
                "decoding in the plain loop, %s and without CUDA graphs (%s): %s",
                slowest.value,
                transformers_api.versions(),
                self._reasons(),
            )
            return [Pass([i], model, [], kinds[i]) for i, model in enumerate(self._models.values())]
        static = [one for one in found.values() if not isinstance(one, str)]
        models, shapes = [one for one, _ in static], [one for _, one in static]
        found_parts = {i: lora.low_rank_parts(base, arm) for i, arm in enumerate(arms, start=1)}
        parts = {i: part for i, part in found_parts.items() if part is not None and self._options.share_weights}
        with_base = list(parts)
        joint = _joint(base, [arms[i - 1] for i in with_base], [parts[i] for i in with_base], shapes[0], linear)
        if joint is None:
            with_base = []
        else:
            models[0] = joint
        alone = [i for i in range(1, len(models)) if i not in with_base]
        passes = [Pass([0, *with_base], models[0], shapes[0]), *(Pass([i], models[i], shapes[i]) for i in alone)]
        if self._options.compile:
            for one in passes:
                one.models.compile()
        return passes

    def _slots_that_fit(self, passes: list[Pass], length: int) -> int:
        free = _free_bytes(self._device)
        if free is None:
            return 2**31
        needed = length * sum(one.bytes_per_token() for one in passes)
        fit = int(free * _SHARE_OF_MEMORY) // needed
        if fit == 0:
            raise GenarmError(
                f"a prompt with its continuation, {length} tokens, needs {_in_words(needed)} of KV caches; of the "
                f"{_in_words(free)} free on {self._device} they may take {_in_words(free * _SHARE_OF_MEMORY)}: "
                "shorten max_new_tokens or the prompt"
            )
        return fit


def _joint(
    base: Any, arms: Sequence[Any], parts: Sequence[dict[str, lora.LowRank]], shapes: list[LayerShape], linear: str
) -> StaticModels | None:
    """The base with its adapters' rows in one pass, if each model's logits there are those that it gives alone."""
    if not arms:
        return None

    def make(kind: str) -> Any:
        return lora.share(base, parts, core=kind != "torch")

    found = checks.same_logits(make, shapes, [base, *arms], linear)
    if isinstance(found, StaticModels):
        return found
    _LOGGER.warning(
        "adapters run apart from the base, for which a pass with their rows does not work: %s",
        found or "its logits differ there",
    )
    return None


def _address(x: Tensor) -> int:
    return x.data_ptr() if type(x) is torch.nn.Parameter else id(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device now; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = []
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    if device.type == "cpu" and (group / "memory.max").exists():
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["file"])  # files' pages can be dropped
            limits.append(int(most) - used)
    return min(limits, default=None)


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"

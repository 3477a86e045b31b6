"""Engines for a base and its ARMs: which forward passes they need, and how many prompts fit into memory at once."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import shared
from .engine import Engine, Operand
from .errors import GenarmError
from .forwards import LayerShape, PlainForward, StaticForward, static_shapes

_LOGGER = logging.getLogger("genarm")

# Attention covers so many tokens more at a time, masked to those there are; on a GPU each is a CUDA graph of its own.
_WINDOW = {"cuda": 256}
_WINDOW_ELSEWHERE = 16
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


@dataclass(frozen=True)
class _Pass:
    """A forward pass: its model, whose logits it gives (0: the base's), and the shapes of static caches, if it can have
    them.
    """

    model: Any
    operands: list[int]
    shapes: list[LayerShape] | str

    def bytes_per_token(self) -> int:
        assert not isinstance(self.shapes, str)
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
        self._passes: list[_Pass] | None = None
        self._kept: Engine | None = None

    def take(self, prompts: int, length: int, batch_size: int | None) -> tuple[Engine, int]:
        """An engine for so many prompts, each of at most `length` tokens with its continuation, and how many of them
        to decode at once. Give it back.

        Raises:
            GenarmError: memory for not even one of them.
        """
        passes = self.passes
        kept, self._kept = self._kept, None
        window = _WINDOW.get(self._device.type, _WINDOW_ELSEWHERE)
        length = -(-length // window) * window
        slots = max(1, min(prompts, batch_size or _MOST_AT_ONCE.get(self._device.type, _MOST_ELSEWHERE)))
        if kept is not None and kept.slots >= slots and kept.length >= length:
            return kept, slots
        del kept  # its memory is free for the new one
        refill = not any(isinstance(one.shapes, str) for one in passes)
        if refill:
            slots = min(slots, self._slots_that_fit(passes, length))
        engine = self._make(passes, slots, length, window, refill)
        return engine, engine.slots

    def give_back(self, engine: Engine) -> None:
        """Only what ended well: after an error the caches may hold NaN."""
        self._kept = engine

    def _make(self, passes: list[_Pass], slots: int, length: int, window: int, refill: bool) -> Engine:
        try:
            return self._engine(passes, slots, length, window, refill)
        except torch.OutOfMemoryError as error:  # others took it in the meantime
            if slots == 1:
                raise GenarmError(f"the KV caches of one prompt do not fit: {error}") from error
        torch.cuda.empty_cache()
        return self._make(passes, slots // 2, length, window, refill)

    def _engine(self, passes: list[_Pass], slots: int, length: int, window: int, refill: bool) -> Engine:
        operands: list[Any] = [None] * len(self._models)
        for forward, one in enumerate(passes):
            for index, operand in enumerate(one.operands):
                operands[operand] = Operand(forward, index)
        with torch.inference_mode():
            forwards = [
                StaticForward(one.model, one.shapes, slots, length, len(one.operands), self._options.compile)
                if refill and not isinstance(one.shapes, str)
                else PlainForward(one.model)
                for one in passes
            ]
        return Engine(
            forwards,
            operands,
            slots,
            length=length,
            window=window,
            refill=refill,
            vocab_size=self._vocab_size,
            eos=self._eos,
            backend=self._options.backend,
            device=self._device,
            streams=self._options.streams,
            cuda_graph=self._options.cuda_graph,
        )

    @property
    def passes(self) -> list[_Pass]:
        """Decided once: which ARMs share the base's pass, and whether static caches work in every model."""
        if self._passes is not None:
            return self._passes
        base, *arms = self._models.values()
        shapes = {label: static_shapes(model) for label, model in self._models.items()}
        if reasons := [f"{label}: {why}" for label, why in shapes.items() if isinstance(why, str)]:
            _LOGGER.warning(
                "decoding in the plain loop, a batch at a time and without CUDA graphs: %s", "; ".join(reasons)
            )
            self._passes = [_Pass(model, [i], "plain") for i, model in enumerate(self._models.values())]
            return self._passes
        parts = [shared.low_rank_parts(base, arm) if self._options.share_weights else None for arm in arms]
        with_base = [i for i, part in enumerate(parts, start=1) if part is not None]
        model = shared.share(base, [part for part in parts if part is not None]) if with_base else base
        self._passes = [_Pass(model, [0, *with_base], shapes["the base"])]
        self._passes += [
            _Pass(model, [i], shapes[label])
            for i, (label, model) in enumerate(self._models.items())
            if i and i not in with_base
        ]
        return self._passes

    def _slots_that_fit(self, passes: list[_Pass], length: int) -> int:
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

"""Prompts through the slots of an engine: begun as slots fall free, recorded as their tokens arrive.

On a GPU the host runs a few steps behind the device: it queues steps ahead and reads what earlier ones drew once it has
arrived. Tokens that a row draws after its end are dropped here.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from genarm_kernels.reference import BAD_ROW

from ..errors import GenarmError, PromptError
from ..text import TextStream
from .engine import PER_ROW, Begin, Drawn, Engine
from .request import Request

_LOGGER = logging.getLogger("genarm")

# Steps that may be queued before the oldest one's tokens are here: enough that the device never waits for the host.
_AHEAD = 4
# Tokens, padding included, of the prompts that begin in one pass: more would take memory and save no time.
_PREFILL_TOKENS = 8192


@dataclass(eq=False)
class Row:
    """One prompt and its continuation as it grows."""

    index: int
    request: Request  # checked
    prompts: list[list[int]]  # by operand
    weights: list[float]  # by ARM: the request's, until they are changed
    text: TextStream
    incremental: bool  # the text is needed at every step: to find a stop string, or to be shown
    rewards: dict[str, list[float]]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    base_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    shown: str = ""
    queued: int = 0  # tokens drawn on the device, read or not

    def begin(self) -> Begin:
        """After the tokens that have been read."""
        prompts = [prompt + self.tokens for prompt in self.prompts]
        return Begin(self.request, prompts, len(self.tokens), self.weights)

    @property
    def limit(self) -> int:
        return self.request.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens of its longest operand, with all that is queued."""
        return max(map(len, self.prompts)) + self.queued

    def append(
        self, token: int, logprob: float, base_logprob: float, rewards: Sequence[float], eos: frozenset[int]
    ) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.base_logprobs.append(base_logprob)
        for values, reward in zip(self.rewards.values(), rewards, strict=True):
            values.append(reward)
        ended = token in eos
        last = ended or len(self.tokens) == self.limit
        if self.incremental:
            self.shown = self.text.push(*([] if ended else [token]), last=last)
        if ended:
            self.finish_reason = "eos"
        elif self.text.stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"

    def finish_text(self) -> str:
        if not self.incremental:
            self.text.push(*(self.tokens[:-1] if self.finish_reason == "eos" else self.tokens), last=True)
        return self.text.text


class _Flight(NamedTuple):
    """A step on its way: whose token each value is (None: nobody's)."""

    rows: list[Row | None]
    drawn: Drawn


def run_for(engine: Engine, at_once: int, rows: Sequence[Row], eos: frozenset[int]) -> "Run":
    """Decodes rows, at most so many at once, in an engine that no other run uses."""
    return (Run if engine.refill else BatchRun)(engine, at_once, rows, eos)


class Run:
    """Rows in the slots of an engine's static caches, where a row begins as soon as there is room."""

    def __init__(self, engine: Engine, at_once: int, rows: Sequence[Row], eos: frozenset[int]) -> None:
        self._engine = engine
        self._waiting = deque(rows)
        self._slots: list[Row | None] = [None] * engine.slots
        self._usable = at_once
        self._error: PromptError | None = None
        self._flights: deque[_Flight] = deque()
        self._eos = eos
        self._ahead = _AHEAD if engine.device_type == "cuda" else 0
        self._alone = len(rows) == 1
        values = {name: {getattr(row.request, name) for row in rows} for name in PER_ROW}
        engine.reset({name: one.pop() for name, one in values.items() if len(one) == 1})

    def __iter__(self) -> Iterator[list[Row]]:
        """The rows that have got a token, step after step, until every row has finished."""
        while self._waiting or self._flights or any(self._slots):
            if self._error is not None:  # now that those which got a token in the same step have been given out
                raise self._error
            if self._may_begin():
                self._begin()
            elif self._may_step():
                self._step()
            while self._flights and self._is_due():
                yield self._read()

    def set_weights(self, row: Row, weights: Sequence[float]) -> None:
        """The row's next token uses them. What has been drawn ahead is drawn again."""
        row.weights = list(weights)
        if row in self._slots:
            slot = self._slots.index(row)
            if self._flights:
                self._again(slot)
            else:
                self._engine.set_weights(slot, weights)

    def _is_due(self) -> bool:
        """Whether the oldest flight is to be read now."""
        # At a fixed distance, lest what is batched with what, and so the last bits, depend on how fast the host is.
        early = self._alone and self._flights[0].drawn.ready()
        if not early and len(self._flights) <= self._ahead and (self._may_begin() or self._may_step()):
            return False
        while not self._flights[0].drawn.ready():
            time.sleep(2e-5)  # not a synchronisation: other threads run, the device goes on
        return True

    def _may_begin(self) -> bool:
        occupied = sum(row is not None for row in self._slots)
        return bool(self._waiting) and occupied < self._usable

    def _may_step(self) -> bool:
        if self._flights and self._outgrown():
            return False  # what has been drawn is read first: a row begins again after it
        return any(row is not None and row.queued < row.limit for row in self._slots)

    def _outgrown(self) -> list[int]:
        """The slots whose rows' caches will not do for the next token."""
        if self._engine.grows_freely:
            return []
        growing = [(slot, row) for slot, row in enumerate(self._slots) if row is not None and row.queued < row.limit]
        return [slot for slot, row in growing if self._engine.outgrown([len(one) + row.queued for one in row.prompts])]

    def _begin(self) -> None:
        slots = [slot for slot in range(self._usable) if self._slots[slot] is None]
        slots = slots[: self._usable - sum(row is not None for row in self._slots)]
        rows = self._next_rows(len(slots))
        slots = slots[: len(rows)]
        try:
            drawn = self._engine.begin(slots, [row.begin() for row in rows])
        except torch.OutOfMemoryError as error:
            self._waiting.extendleft(reversed(rows))
            self._lower_batch(sum(row is not None for row in self._slots) + len(rows) // 2, error)
            return
        for slot, row in zip(slots, rows, strict=True):
            self._slots[slot] = row
            row.queued = len(row.tokens) + 1
        self._flights.append(_Flight(list(rows), drawn))

    def _next_rows(self, free: int) -> list[Row]:
        """The rows that begin together: as many as fit into one pass."""
        rows: list[Row] = []
        longest = 0
        while self._waiting and len(rows) < free:
            longest = max(longest, *map(len, self._waiting[0].prompts))
            if rows and longest * (len(rows) + 1) * len(rows[0].prompts) > _PREFILL_TOKENS:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _step(self) -> None:
        if outgrown := self._outgrown():
            for slot in reversed(outgrown):
                self._again(slot)
            return
        self._compact()
        n = self._bucket(1 + max(slot for slot, row in enumerate(self._slots) if row is not None))
        try:
            drawn = self._engine.step(n, self._covering(max(row.length for row in self._slots if row is not None)))
        except torch.OutOfMemoryError as error:
            # A model with a cache of its own may have taken the token: all rows begin again, half of them at a time.
            occupied = [slot for slot, row in enumerate(self._slots) if row is not None]
            for slot in reversed(occupied):
                self._again(slot)
            self._lower_batch(len(occupied) // 2, error)
            return
        rows = self._slots[:n]
        for row in rows:
            if row is not None:
                row.queued = min(row.queued + 1, row.limit)
        self._flights.append(_Flight(rows, drawn))

    def _read(self) -> list[Row]:
        rows, drawn = self._flights.popleft()
        grown = []
        for row, ((token, status), (logprob, base_logprob, *rewards)) in zip(rows, drawn.read(), strict=True):
            if row is None or row.finish_reason is not None:
                continue
            if token < 0:
                bad = status == BAD_ROW
                reason = "the models' logits hold NaN or infinity" if bad else "the models allow no token"
                self._error = PromptError(row.index, f"token {len(row.tokens)} cannot be drawn: {reason}")
                continue
            row.append(token, logprob, base_logprob, rewards, self._eos)
            grown.append(row)
            if row.finish_reason is not None:
                self._slots[self._slots.index(row)] = None
        return grown

    def _compact(self) -> None:
        """Moves rows to lower slots, when fewer slots would do for those that are left."""
        occupied = [slot for slot, row in enumerate(self._slots) if row is not None]
        if self._bucket(len(occupied)) >= self._bucket(1 + occupied[-1]):
            return
        free = [slot for slot in range(len(occupied)) if self._slots[slot] is None]
        for source, target in zip(reversed(occupied), free, strict=False):
            row = self._slots[source]
            assert row is not None
            self._engine.move(source, target, self._covering(row.length))
            self._slots[source], self._slots[target] = None, row

    def _bucket(self, n: int) -> int:
        """How many slots a step covers for n: a CUDA graph for each would be too many."""
        if self._engine.device_type != "cuda":
            return n
        return min(1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8, self._engine.slots)

    def _covering(self, length: int) -> int:
        """How much of the caches a step covers for rows of a length: a CUDA graph for each would be too many."""
        return -(-length // self._engine.granularity) * self._engine.granularity

    def _again(self, slot: int) -> None:
        """Takes a row out of its slot, to begin again after the tokens that have been read."""
        row = self._slots[slot]
        assert row is not None
        self._slots[slot] = None
        self._flights = deque(
            _Flight([None if one is row else one for one in rows], drawn) for rows, drawn in self._flights
        )
        row.queued = len(row.tokens)
        self._waiting.appendleft(row)

    def _lower_batch(self, at_once: int, error: torch.OutOfMemoryError) -> None:
        """Goes on with fewer rows after the device ran out of memory."""
        torch.cuda.empty_cache()
        if at_once < 1:
            reason = str(error).splitlines()[0]
            raise GenarmError(f"one prompt does not fit into the device's memory: {reason}") from error
        _LOGGER.warning("out of memory: decoding at most %d prompts at once from here on", at_once)
        self._usable = at_once


class BatchRun(Run):
    """Rows in caches that the models make for themselves: a batch begins and ends together, and no row moves."""

    def _may_begin(self) -> bool:
        return bool(self._waiting) and not any(self._slots)

    def _next_rows(self, free: int) -> list[Row]:
        self._batch = min(free, len(self._waiting))
        return [self._waiting.popleft() for _ in range(self._batch)]

    def _compact(self) -> None:
        pass

    def _bucket(self, n: int) -> int:
        return self._batch

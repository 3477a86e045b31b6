"""The step of decoding over slots: forward passes, `guided_step`, next tokens, all on the device.

    tokens [n] -> forwards, side by side -> logits of base and ARMs -> guided_step -> tokens [n]

What a step reads and writes lies in tensors that stay where they are, so that on a GPU the whole of it is one CUDA
graph, and nothing waits for the host.

A row's length in the caches follows from its position in the continuation. `_forward` takes any number of tokens per
row, and `_advance` makes each row longer by as many of them as it accepts; the others are as if they had never been.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genarm_kernels import guided_step, run_concurrently

from .forwards import Forward, to_device
from .request import Request

_LOGGER = logging.getLogger("genarm")
PER_ROW = ("temperature", "top_k", "top_p", "min_p")
_DTYPES = {"top_k": torch.int64, "seed": torch.int64, "position": torch.int64, "limit": torch.int64}


class Operand(NamedTuple):
    """Where a model's logits come from."""

    forward: int
    within: int


class Begin(NamedTuple):
    """A row to begin, or to begin again at a later token."""

    request: Request
    prompts: list[list[int]]
    """Token ids by operand, base first: all that the next token follows."""
    position: int
    """Index of the next token in the continuation."""
    weights: list[float]
    """By ARM: the request's, unless they have been changed since."""


class Drawn(NamedTuple):
    """What a step drew, on its way to the host."""

    values: Tensor
    event: torch.cuda.Event | None

    def ready(self) -> bool:
        """Whether `read` need not wait. Asks, and so synchronises nothing."""
        return self.event is None or self.event.query()

    def read(self) -> list[tuple[list[int], list[float]]]:
        """By row: [token (-1: none could be drawn), status] and [logprob, base_logprob, reward of each ARM]."""
        integers, floats = self.values[:, :2], self.values[:, 2:].view(torch.float32)
        return list(zip(integers.tolist(), floats.tolist(), strict=True))


class Engine:
    """Slots over the forward passes of a base and its ARMs. A row ends on the device at an EOS token or at its limit,
    and stays as it is until the next row begins in its slot.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        operands: Sequence[Operand],
        slots: int,
        *,
        length: int,
        granularity: int,
        refill: bool,
        vocab_size: int,
        eos: Sequence[int],
        backend: str,
        device: torch.device,
        streams: bool,
        cuda_graph: bool,
    ) -> None:
        """`operands`: of the base, then of each ARM in order; `length`: tokens a row may have; `granularity`: a step's
        attention covers a multiple of so many; `refill`: a row may begin while others go on.
        """
        self.slots = slots
        self.length = length
        self.granularity = granularity
        self.refill = refill
        self._forwards = list(forwards)
        self.grows_freely = all(forward.grows_freely for forward in forwards)
        self._operands = list(operands)
        self._of_forwards = [  # by forward pass, which operands (0: base) its rows are, in its order
            [operand for operand, (forward, _) in enumerate(operands) if forward == f] for f in range(len(forwards))
        ]
        self._arms = len(operands) - 1
        self._vocab_size = vocab_size
        self._backend = backend
        self._device = device
        self._streams = streams
        one_device = {x.device for x in forwards} == {device}
        self.cuda_graph = cuda_graph and device.type == "cuda" and one_device
        self._capture_stream = torch.cuda.Stream(device) if self.cuda_graph else None
        with torch.inference_mode():
            self._eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
            self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
            self._live = torch.zeros(slots, dtype=torch.bool, device=device)
            self._weights = torch.zeros(slots, self._arms, device=device)
            # Of a row's length in a cache, what its position must be added to; by operand, in the forwards' order.
            self._offsets = torch.zeros(slots, len(operands), dtype=torch.int64, device=device)
            self._rows = {
                name: torch.zeros(slots, dtype=_DTYPES.get(name, torch.float32), device=device)
                for name in (*PER_ROW, "seed", "position", "limit")
            }
        self._numbers: dict[str, float] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._pool: Any = None

    @property
    def device_type(self) -> str:
        return self._device.type

    def reset(self, numbers: Mapping[str, float]) -> None:
        """Ends all rows. `numbers`: parameters of `guided_step` that all rows to come share, for which a backend leaves
        whole passes out where they ask for nothing; in CUDA graphs, one for each set of them, only those that do.
        """
        off = {"top_k": 0, "top_p": 1, "min_p": 0}
        self._numbers = {
            name: value for name, value in numbers.items() if not self.cuda_graph or value == off.get(name)
        }
        with self._context():
            self._live.fill_(False)

    def begin(self, slots: Sequence[int], rows: Sequence[Begin]) -> Drawn:
        """Puts rows into slots and draws the next token of each. Their operands' prompts go through one pass each."""
        with self._context():
            at = self._upload(slots, torch.int64)
            prompts = [[[row.prompts[i] for i in of] for row in rows] for of in self._of_forwards]
            logits = self._run([partial(x.prefill, slots, one) for x, one in zip(self._forwards, prompts, strict=True)])
            self._weights[at] = self._upload([row.weights for row in rows], torch.float32)
            # The last token drawn is not in the cache yet: the next step feeds it.
            offsets = [[len(row.prompts[i]) - row.position - 1 for of in self._of_forwards for i in of] for row in rows]
            self._offsets[at] = self._upload(offsets, torch.int64)
            columns = {name: [getattr(row.request, name) for row in rows] for name in (*PER_ROW, "seed")}
            columns |= {"position": [x.position for x in rows], "limit": [x.request.max_new_tokens for x in rows]}
            for name, column in columns.items():
                self._rows[name][at] = self._upload(column, self._rows[name].dtype)
            self._live[at] = True
            return self._send(self._draw(logits, at))

    def step(self, n: int, covered: int) -> Drawn:
        """Draws the next token of the first n slots; no live row is longer than `covered` tokens with its last one."""
        with self._context():
            if not self.cuda_graph:
                return self._send(self._step(n, covered))
            key = (n, covered, tuple(sorted(self._numbers.items())))
            if key not in self._graphs:
                drawn = self._send(self._step(n, covered))
                self._graphs[key] = None  # compiled, loaded and allocated: it can be captured the next time
                return drawn
            captured = self._graphs[key] or self._capture(n, covered)
            if captured is None:
                return self._send(self._step(n, covered))
            self._graphs[key] = captured
            graph, values = captured
            graph.replay()
            return self._send(values)

    def outgrown(self, lengths: Sequence[int], tokens: int = 1) -> bool:
        """Whether a row whose operands become so long is to begin again, in place of a step of `tokens` per row."""
        return any(
            self._forwards[operand.forward].outgrown(length, tokens)
            for operand, length in zip(self._operands, lengths, strict=True)
        )

    def set_weights(self, slot: int, weights: Sequence[float]) -> None:
        """Of the tokens that are not drawn yet."""
        with self._context():
            self._weights[slot] = self._upload(weights, torch.float32)

    def move(self, source: int, target: int, covered: int) -> None:
        """Moves the row of a slot, no longer than `covered`, to another, whose row has ended."""
        with self._context():
            for forward in self._forwards:
                forward.move(source, target, covered)
            for state in (self._tokens, self._live, self._weights, self._offsets, *self._rows.values()):
                state[target] = state[source]
            self._live[source] = False

    def _step(self, n: int, covered: int) -> Tensor:
        return self._draw(self._forward(self._tokens[:n, None], covered), slice(n))

    def _forward(self, tokens: Tensor, covered: int) -> list[Tensor]:
        """Feeds `tokens` `[n, T]` to the rows of the first n slots, which stay as long as they are. By forward pass,
        logits `[n, operands, T, V]` after each token.
        """
        n = len(tokens)
        lengths = torch.where(self._live[:n, None], self._offsets[:n] + self._rows["position"][:n, None], 0)
        each = lengths.split([len(of) for of in self._of_forwards], 1)
        return self._run([partial(x.step, tokens, own, covered) for x, own in zip(self._forwards, each, strict=True)])

    def _advance(self, at: Any, accepted: Tensor) -> None:
        """Makes each row longer by the first `accepted` `[n]` (int64 or bool) of the tokens that it was last fed."""
        self._rows["position"][at] += accepted

    def _draw(self, logits: list[Tensor], at: Any) -> Tensor:
        """From logits `[n, operands, 1, V]` of each forward pass. int32 `[n, 4 + N]`: the fields of `Drawn`, the floats
        by their bits.
        """
        if len({x.dtype for x in logits}) > 1:
            logits = [x.float() for x in logits]
        base, *arms = [logits[forward][:, index, 0].to(self._device) for forward, index in self._operands]
        rows = {name: values[at] for name, values in self._rows.items()}
        parameters: dict[str, Any] = {name: self._numbers.get(name, rows[name]) for name in PER_ROW}
        drawn = guided_step(
            base,
            arms,
            self._weights[at],
            **parameters,
            seed=rows["seed"],
            position=rows["position"],
            vocab_size=self._vocab_size,
            backend=self._backend,
        )
        live = self._live[at]
        self._advance(at, live)
        self._tokens[at] = drawn.token.clamp_min(0)  # -1: the host raises for a row that could not be drawn
        ended = (drawn.token[:, None] == self._eos).any(1) | (self._rows["position"][at] >= rows["limit"])
        self._live[at] = live & ~ended
        assert drawn.logprob is not None and drawn.base_logprob is not None and drawn.arm_logprobs is not None
        floats = torch.cat([drawn.logprob[:, None], drawn.base_logprob[:, None], drawn.arm_logprobs], 1)
        return torch.cat([torch.stack([drawn.token.int(), drawn.status], 1), floats.view(torch.int32)], 1)

    def _run(self, calls: list[Any]) -> list[Tensor]:
        return run_concurrently(*calls) if self._streams else [call() for call in calls]

    def _capture(self, n: int, covered: int) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """A step as a graph; None, from here on, where a model waits for the device or cannot be captured."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream, watch = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        try:
            # Forwards alone: they change nothing that counts. A wait inside a capture would leave torch unusable.
            torch.cuda.set_sync_debug_mode("error")
            self._forward(self._tokens[:n, None], covered)
            torch.cuda.set_sync_debug_mode(watch)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capture_stream):
                values = self._step(n, covered)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            _LOGGER.warning("decoding without CUDA graphs, which a model cannot be captured in: %s", reason)
            self.cuda_graph = False
            return None
        finally:
            torch.cuda.set_sync_debug_mode(watch)
            torch.cuda.set_stream(stream)
        return graph, values

    def _send(self, values: Tensor) -> Drawn:
        if self._device.type != "cuda":
            return Drawn(values, None)
        host = values.to("cpu", non_blocking=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record()
        return Drawn(host, event)

    def _upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)

    @contextmanager
    def _context(self) -> Iterator[None]:
        # run_concurrently forks its streams on the current device.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with torch.inference_mode(), on_device:
            yield

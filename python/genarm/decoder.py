"""`GuidedDecoder`: a base language model guided, token by token, by any number of autoregressive reward models.

prompts -> token ids -> [base forward | ARM forwards] -> guided_step -> tokens -> text
                         ^                                          |
                         +------------- one token a row ------------+
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genarm_kernels import GuidedStep, guided_step, run_concurrently

from . import loading
from .errors import GenarmError
from .text import TextStream

Messages: TypeAlias = Sequence[Mapping[str, str]]
PerPrompt: TypeAlias = float | Sequence[float]
Weights: TypeAlias = Mapping[str, PerPrompt] | Sequence[Mapping[str, float]] | None


@dataclass(frozen=True)
class GenerationResult:
    """What `GuidedDecoder.generate` made of B prompts: lists over prompts, in their order.

    The last token of a row is the one that ended it: the EOS token, or the token that completed a stop string; `texts`
    show neither.
    """

    texts: list[str]
    """The continuations, without special tokens, cut before the first stop string."""
    tokens: list[list[int]]
    """The ids drawn."""
    logprobs: list[list[float]]
    """Nats per token: the guided distribution at the temperature used, before the filters."""
    base_logprobs: list[list[float]]
    """Nats per token: the base model's own, at temperature 1."""
    rewards: dict[str, list[list[float]]]
    """By ARM, nats per token: log pi_r(token | prefix), the token-level reward, whatever the ARM's weight."""
    finish_reasons: list[str]
    """"eos", "stop" (a stop string) or "length" (max_new_tokens)."""


@dataclass(frozen=True)
class StreamEvent:
    """One token of a stream. Log-probabilities and rewards are those of `GenerationResult`, for this token."""

    text: str
    """What can be shown now; "" while a character or a possible stop string is incomplete."""
    token: int
    logprob: float
    base_logprob: float
    rewards: dict[str, float]
    finish_reason: str | None
    """None until the last event of the stream."""


class GuidedDecoder:
    """Draws each token from softmax((base logits + sum of weight_i * ARM_i logits) / temperature).

    The decoding of GenARM (Xu et al. 2024, arXiv 2410.08193). Every model keeps its own KV cache and runs one forward
    of one token a step; a prompt's tokens do not depend on what it is batched with, beyond float noise of the forwards.

    >>> from genarm import bundled
    >>> decoder = GuidedDecoder.from_pretrained(bundled.path("base"), arms={"helpful": bundled.path("helpful")})
    >>> question = [{"role": "user", "content": "How do I sleep better?"}]
    >>> result = decoder.generate(messages=question, weights={"helpful": 1.0})
    >>> len(result.tokens[0]) == len(result.rewards["helpful"][0])
    True
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        arms: Mapping[str, Any] | None = None,
        *,
        arm_tokenizers: Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        """From loaded transformers models; an ARM without a tokenizer of its own uses the base's.

        Raises:
            GenarmError: tokenizers that give a shared id different strings (the first is named).
        """
        tokenizers = arm_tokenizers or {}
        self._base = loading.LoadedModel(base.eval(), tokenizer)
        self._arms = {
            name: loading.LoadedModel(arm.eval(), tokenizers.get(name) or tokenizer)
            for name, arm in (arms or {}).items()
        }
        self._backend = backend
        self.vocab_size = loading.shared_vocabulary(self._base, self._arms)
        eos = getattr(base.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        self._eos = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)

    @classmethod
    def from_pretrained(
        cls,
        base: loading.Source,
        arms: Mapping[str, loading.Source] | None = None,
        *,
        tokenizer: Any = None,
        arm_tokenizers: Mapping[str, Any] | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
    ) -> "GuidedDecoder":
        """Loads the base and its ARMs.

        Args:
            base: folder or hub name of a transformers causal language model, or a loaded model (then with `tokenizer`).
            arms: by name: likewise, or the folder or hub name of a PEFT adapter of the base, which shares its weights.
            tokenizer, arm_tokenizers: in place of those that lie beside the models.
            device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ... Loaded models stay where they are.
            dtype: "auto" (as stored), a torch dtype or its name.
            backend: of `genarm_kernels.guided_step`.

        Raises:
            GenarmError: a folder that is missing or holds no causal language model, an adapter that does not fit, a
                tokenizer that differs from the base's.
        """
        device, dtype = loading.resolve_device(device), loading.resolve_dtype(dtype)
        tokenizers = arm_tokenizers or {}
        loaded_base = loading.load_base(base, tokenizer, device, dtype)
        loaded = {
            name: loading.load_arm(name, arm, loaded_base, tokenizers.get(name), device, dtype)
            for name, arm in (arms or {}).items()
        }
        return cls(
            loaded_base.model,
            loaded_base.tokenizer,
            {name: arm.model for name, arm in loaded.items()},
            arm_tokenizers={name: arm.tokenizer for name, arm in loaded.items()},
            backend=backend,
        )

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._base.tokenizer

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The ARMs' names, in the order they were given."""
        return tuple(self._arms)

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str | Messages] | None = None,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        arm_prompts: Mapping[str, Sequence[str | Messages]] | None = None,
        weights: Weights = None,
        max_new_tokens: int | Sequence[int] = 128,
        temperature: PerPrompt = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: PerPrompt = 1.0,
        min_p: PerPrompt = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
    ) -> GenerationResult:
        """Continues every prompt until its EOS token, a stop string or max_new_tokens.

        Args:
            prompts: one prompt or many, of any lengths (a chat may stand among many); or
            messages: one chat or many (lists of {"role", "content"}), rendered by the tokenizer's chat template.
            arm_prompts: by ARM, the prompts (or chats) it sees in place of the base's; the continuation is shared.
            weights: by ARM, a number or one a prompt; or a mapping a prompt. An ARM left out has weight 0; None gives
                every ARM weight 1. See `guided_step` for what weights mean.
            max_new_tokens, temperature, top_k, top_p, min_p: a number or one a prompt, as `guided_step` has them.
            seed: a number s gives prompt b the seed s + b; or one a prompt. Position is the index in the continuation.
            stop: strings that end a continuation, wherever tokens begin and end.

        Raises:
            GenarmError: what cannot be decoded as asked, before anything is decoded: an ARM name that is not loaded, a
                number out of range, a prompt longer than a model allows, messages without a chat template, ...
        """
        run = self._run(
            prompts, messages, arm_prompts, weights, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop
        )
        for _ in run.steps():
            pass
        return GenerationResult(
            texts=[row.finish_text() for row in run.rows],
            tokens=[row.tokens for row in run.rows],
            logprobs=[row.logprobs for row in run.rows],
            base_logprobs=[row.base_logprobs for row in run.rows],
            rewards={name: [row.rewards[name] for row in run.rows] for name in self._arms},
            finish_reasons=[row.finish_reason or "length" for row in run.rows],
        )

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        arm_prompts: Mapping[str, str | Messages] | None = None,
        weights: Mapping[str, float] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> "GuidedStream":
        """An iterator of `StreamEvent`, one a token of one prompt; arguments and errors as in `generate`.

        The tokens are those of `generate` with the same arguments, unless the weights are changed on the way.
        """
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt: stream takes one str, got {type(prompt).__name__}")
        own = {name: [one] for name, one in (arm_prompts or {}).items()}
        run = self._run(
            prompt, messages, own, weights, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, True
        )
        return GuidedStream(run)

    def _run(
        self,
        prompts: str | Sequence[str | Messages] | None,
        messages: Any,
        arm_prompts: Mapping[str, Sequence[str | Messages]] | None,
        weights: Weights,
        max_new_tokens: int | Sequence[int],
        temperature: PerPrompt,
        top_k: int | Sequence[int],
        top_p: PerPrompt,
        min_p: PerPrompt,
        seed: int | Sequence[int],
        stop: str | Sequence[str],
        streaming: bool = False,
    ) -> "_Run":
        """Checks a request and lays it out in rows."""
        inputs = _inputs(prompts, messages)
        ids = {"": _encode("prompt", self._base.tokenizer, inputs)}
        for name in arm_prompts or {}:
            self._known(name, "arm_prompts")
        for name, arm in self._arms.items():
            own = (arm_prompts or {}).get(name)
            if own is None:  # the base's text, also where it came from the base's chat template
                texts = [_render("prompt", self._base.tokenizer, one) for one in inputs]
                ids[name] = [_encode_text(arm.tokenizer, text, special) for text, special in texts]
            elif len(own) != len(inputs):
                raise GenarmError(f"arm_prompts[{name!r}]: expected {len(inputs)} prompts, got {len(own)}")
            else:
                ids[name] = _encode(f"arm_prompts[{name!r}]", arm.tokenizer, own)

        rows = len(inputs)
        limits = _ints("max_new_tokens", max_new_tokens, rows, low=1)
        models = {"": self._base.model, **{name: arm.model for name, arm in self._arms.items()}}
        for name, model in models.items():
            _check_lengths(name, model, ids[name], limits)
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise GenarmError("stop: expected non-empty strings")
        return _Run(
            caches=[_CachedModel(model, ids[name], max(limits, default=0)) for name, model in models.items()],
            rows=[
                _Row(
                    TextStream(self.tokenizer, prompt, stop),
                    limit,
                    bool(stop) or streaming,
                    {n: [] for n in self._arms},
                )
                for prompt, limit in zip(ids[""], limits, strict=True)
            ],
            arm_names=self.arm_names,
            weights=self._weights(weights, rows),
            parameters={
                "temperature": _floats("temperature", temperature, rows, 0.0),
                "top_k": _ints("top_k", top_k, rows),
                "top_p": _floats("top_p", top_p, rows, 0.0, 1.0),
                "min_p": _floats("min_p", min_p, rows, 0.0, 1.0),
            },
            seeds=_seeds(seed, rows),
            eos=self._eos,
            vocab_size=self.vocab_size,
            backend=self._backend,
        )

    def _weights(self, weights: Weights, rows: int) -> list[list[float]]:
        """`[B][N]`, from what `generate` accepts."""
        if weights is None:
            return [[1.0] * len(self._arms) for _ in range(rows)]
        if isinstance(weights, Mapping):
            columns = {name: _floats(f"weights[{name!r}]", value, rows) for name, value in weights.items()}
            by_row: list[Mapping[str, float]] = [
                {name: column[b] for name, column in columns.items()} for b in range(rows)
            ]
        elif len(weights) != rows:
            raise GenarmError(f"weights: expected one mapping or {rows}, one a prompt, got {len(weights)}")
        else:
            by_row = [
                {name: _floats(f"weights[{name!r}]", value, 1)[0] for name, value in row.items()} for row in weights
            ]
        for name in {name for row in by_row for name in row} | set(weights if isinstance(weights, Mapping) else ()):
            self._known(name, "weights")
        return [[row.get(name, 0.0) for name in self._arms] for row in by_row]

    def _known(self, name: str, argument: str) -> None:
        if name not in self._arms:
            loaded = ", ".join(map(repr, self._arms)) or "none"
            raise GenarmError(f"{argument}: no ARM is called {name!r}; loaded: {loaded}")


class GuidedStream:
    """The events of one prompt, token by token; `set_weights` steers the tokens still to come."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._steps = run.steps()

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    @torch.inference_mode()
    def __next__(self) -> StreamEvent:
        next(self._steps)
        row = self._run.rows[0]
        return StreamEvent(
            text=row.shown,
            token=row.tokens[-1],
            logprob=row.logprobs[-1],
            base_logprob=row.base_logprobs[-1],
            rewards={name: values[-1] for name, values in row.rewards.items()},
            finish_reason=row.finish_reason,
        )

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The next token uses these; an ARM left out keeps its weight. GenarmError on an unknown name or bad number."""
        self._run.set_weights(weights)


@dataclass
class _Row:
    """One prompt's continuation as it grows."""

    text: TextStream
    limit: int
    incremental: bool  # the text is needed at every step: to find a stop string, or to be shown
    rewards: dict[str, list[float]]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    base_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    shown: str = ""

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


class _CachedModel:
    """A model over a fixed batch of rows: `forward(next token of each row)` gives the next logits.

    Prompts are padded on the left, so that all rows grow at their right end together.
    """

    def __init__(self, model: Any, prompts: list[list[int]], room: int) -> None:
        width = max(map(len, prompts), default=0)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.ones(len(prompts), width + room, dtype=torch.int64)
        mask[:, :width] = torch.arange(width) >= (width - lengths)[:, None]
        self.device = model.device
        self.ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]).to(self.device)
        self._model = model
        self._mask = mask.to(self.device) if width and int(lengths.min()) < width else None
        self._positions = (mask[:, :width].cumsum(1) - 1).clamp_min(0).to(self.device)
        self._last_position = (_max_positions(model) or math.inf) - 1
        self._length = width
        forward = inspect.signature(_unwrapped(model).forward).parameters
        self._takes_positions = "position_ids" in forward
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        self._cache_name = "cache_params" if "cache_params" in forward else "past_key_values"
        self._cache: Any = None

    def forward(self) -> Tensor:
        """Logits `[B, V]` of the token after `ids`."""
        inputs: dict[str, Any] = {
            "input_ids": self.ids,
            self._cache_name: self._cache,
            "use_cache": True,
            **self._options,
        }
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, : self._length]
        if self._takes_positions:
            inputs["position_ids"] = self._positions
        outputs = self._model(**inputs)
        self._cache = outputs[self._cache_name]
        return outputs.logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Makes the drawn tokens `[B]` the input of the next forward."""
        self.ids = tokens[:, None].to(self.device)
        self._length += 1
        # A row that has finished goes on until all have; it must not run off the end of a position table.
        self._positions = (self._positions[:, -1:] + 1).clamp_max(self._last_position)


class _Run:
    """The decode loop over a batch of rows."""

    def __init__(
        self,
        caches: list[_CachedModel],
        rows: list[_Row],
        arm_names: Sequence[str],
        weights: list[list[float]],
        parameters: dict[str, list[Any]],
        seeds: list[int],
        eos: frozenset[int],
        vocab_size: int,
        backend: str,
    ) -> None:
        self.rows = rows
        self._caches = caches
        self._arm_names = arm_names
        self._device = caches[0].device
        self._weights = torch.tensor(weights, device=self._device).reshape(len(rows), len(arm_names))
        self._parameters = {name: _as_parameter(values, self._device) for name, values in parameters.items()}
        self._seeds = torch.tensor(seeds, device=self._device)
        self._eos = eos
        self._vocab_size = vocab_size
        self._backend = backend

    def set_weights(self, weights: Mapping[str, float]) -> None:
        for name, value in weights.items():
            if name not in self._arm_names:
                raise GenarmError(
                    f"weights: no ARM is called {name!r}; loaded: {', '.join(map(repr, self._arm_names))}"
                )
            self._weights[:, self._arm_names.index(name)] = _floats(f"weights[{name!r}]", value, 1)[0]

    def steps(self) -> Iterator[None]:
        """Draws one token of every row at each step, until all rows have finished."""
        position = 0
        while any(row.finish_reason is None for row in self.rows):
            with torch.inference_mode():
                self._record(self._step(position))
            position += 1
            yield

    def _step(self, position: int) -> GuidedStep:
        logits = run_concurrently(*[cache.forward for cache in self._caches])
        if len({x.dtype for x in logits}) > 1:
            logits = [x.float() for x in logits]
        base, *arms = [x.to(self._device) for x in logits]
        step = guided_step(
            base,
            arms,
            self._weights,
            **self._parameters,
            seed=self._seeds,
            position=position,
            vocab_size=self._vocab_size,
            backend=self._backend,
        )
        for cache in self._caches:
            cache.append(step.token.clamp_min(0))  # -1: a row that could not be drawn, reported by _record
        return step

    def _record(self, step: GuidedStep) -> None:
        fields = [step.token, step.logprob, step.base_logprob, step.arm_logprobs]
        token, logprob, base_logprob, rewards = [x.tolist() for x in fields if x is not None]
        for b, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            if token[b] < 0:
                raise GenarmError(f"prompt {b}, token {len(row.tokens)}: the models' logits hold NaN or infinity")
            row.append(token[b], logprob[b], base_logprob[b], rewards[b], self._eos)


def _inputs(prompts: str | Sequence[str | Messages] | None, messages: Any) -> list[Any]:
    """A list of prompts (str) or of chats (lists of messages)."""
    if (prompts is None) == (messages is None):
        raise GenarmError("give either prompts or messages")
    if isinstance(prompts, str):
        return [prompts]
    if prompts is not None:
        return list(prompts)
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _encode(label: str, tokenizer: Any, inputs: Sequence[Any]) -> list[list[int]]:
    encoded = [_encode_text(tokenizer, *_render(f"{label} {i}", tokenizer, one)) for i, one in enumerate(inputs)]
    for i, ids in enumerate(encoded):
        if not ids:
            raise GenarmError(f"{label} {i} has no tokens")
    return encoded


def _encode_text(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _render(label: str, tokenizer: Any, one: Any) -> tuple[str, bool]:
    """The text of a prompt or a chat, and whether the tokenizer is to add its special tokens (a template has them)."""
    if isinstance(one, str):
        return one, True
    if not all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in one):
        raise GenarmError(f"{label}: expected a str, or messages with 'role' and 'content'")
    if not tokenizer.chat_template:
        raise GenarmError(f"{label}: the tokenizer has no chat template; give the prompt as text")
    return tokenizer.apply_chat_template(list(one), tokenize=False, add_generation_prompt=True), False


def _check_lengths(name: str, model: Any, prompts: list[list[int]], limits: list[int]) -> None:
    allowed = _max_positions(model)
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if allowed is not None and len(prompt) + limit > allowed:
            raise GenarmError(
                f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {limit}: "
                f"more than the {allowed} positions of {f'ARM {name!r}' if name else 'the base'}"
            )


def _max_positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose own forward hides its parameters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _floats(name: str, value: Any, rows: int, low: float = -math.inf, high: float = math.inf) -> list[float]:
    values = _list(name, value, rows)
    for v in values:
        if not isinstance(v, Real) or isinstance(v, bool) or not (math.isfinite(v) and low <= float(v) <= high):
            bounds = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
            raise GenarmError(f"{name}: expected {bounds}, got {v!r}")
    return [float(v) for v in values]


def _ints(name: str, value: Any, rows: int, low: int | None = None) -> list[int]:
    values = _list(name, value, rows)
    for v in values:
        if not isinstance(v, Integral) or isinstance(v, bool) or (low is not None and v < low):
            raise GenarmError(f"{name}: expected an integer{'' if low is None else f' of at least {low}'}, got {v!r}")
    return [int(v) for v in values]


def _seeds(seed: Any, rows: int) -> list[int]:
    """int64 seeds: a number s gives row b the seed s + b, as in `guided_step`."""
    seeds = [seed + b for b in range(rows)] if isinstance(seed, int) and not isinstance(seed, bool) else seed
    return [(s + 2**63) % 2**64 - 2**63 for s in _ints("seed", seeds, rows)]


def _list(name: str, value: Any, rows: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * rows
    if len(value) != rows:
        raise GenarmError(f"{name}: expected a number or {rows}, one a prompt, got {len(value)}")
    return list(value)


def _as_parameter(values: list[Any], device: torch.device) -> Any:
    """The one number of all rows, which lets a backend leave whole passes out, or a tensor `[B]`."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)

"""`GuidedDecoder`: a base language model guided, token by token, by any number of autoregressive reward models.

prompts -> token ids -> [base forward | ARM forwards] -> guided_step -> tokens -> text
                         ^                                          |
                         +------------- one token a row ------------+
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch

from genarm_kernels import backends, row_seed, validation

from ..cli.prompts import check_arm
from ..errors import GenarmError, PromptError
from ..models import adapters, loading, transformers_api
from ..text import TextStream
from ..tokens import encode_prompt
from .provision import ModelPath, Options, Provider
from .scheduler import Row, Run, run_for

_LOGGER = logging.getLogger("genarm")

Messages: TypeAlias = Sequence[Mapping[str, str]]
PerPrompt: TypeAlias = float | Sequence[float]
_MAX_FLOAT32 = torch.finfo(torch.float32).max
Weights: TypeAlias = Mapping[str, PerPrompt] | Sequence[Mapping[str, float]] | None


@dataclass(frozen=True)
class GenerationResult:
    """What `GuidedDecoder.generate` made of B prompts: lists over prompts, in their order.

    The last token of a row is the one that ended it: the EOS token, or the token that completed a stop string; `texts`
    show neither.
    """

    texts: list[str]
    """The continuations, without special tokens, cut before the first stop string. Bytes that are no character are
    shown as U+FFFD.
    """
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

    The decoding of GenARM (Xu et al. 2024, arXiv 2410.08193). Base and ARMs run side by side, an ARM that is a LoRA
    adapter of the base within the base's own forward pass; KV caches are allocated once, and serve one request after
    another. A prompt's tokens do not depend on what it is batched with, beyond float noise of the forwards.

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
        streams: bool = True,
        cuda_graph: bool = True,
        share_weights: bool = True,
        compile: bool = False,
    ) -> None:
        """From loaded transformers models; an ARM without a tokenizer of its own uses the base's.

        Args:
            backend: of `genarm_kernels.guided_step`.
            streams: base and ARM forwards on CUDA streams of their own, side by side.
            cuda_graph: one CUDA graph a step.
            share_weights: ARMs that are LoRA adapters of the base run as further rows of its forward pass, as the
                adapters are when first used.
            compile: `torch.compile` for the forward of a step. Minutes the first time; kept on disk.

        The last four change how fast the tokens come, not which. Models without static caches do without them.

        Raises:
            GenarmError: tokenizers that give a shared id different strings (the first is named; where one of them
                merely reserves the token, a warning), a tokenizer of less than half of its model's tokens, EOS ids of
                which none is shared (a warning where some are), a backend that cannot run.
        """
        tokenizers = dict(arm_tokenizers or {})
        for name in tokenizers:
            check_arm(name, arms or {}, "arm_tokenizers")
        adapters.check_models(base, arms or {})
        self._base = loading.LoadedModel(base.eval(), tokenizer)
        self._arms = {
            name: loading.LoadedModel(arm.eval(), tokenizers.get(name) or tokenizer)
            for name, arm in (arms or {}).items()
        }
        self.vocab_size = loading.shared_vocabulary(self._base, self._arms)
        self._eos = _eos(base, tokenizer, self.vocab_size)
        self._provider = Provider(
            base,
            {name: arm.model for name, arm in self._arms.items()},
            self.vocab_size,
            sorted(self._eos),
            Options(_check_backend(backend, base.device.type), streams, cuda_graph, share_weights, compile),
        )

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
        **options: bool,
    ) -> "GuidedDecoder":
        """Loads the base and its ARMs.

        Args:
            base: folder or hub name of a transformers causal language model, or a loaded model (then with `tokenizer`).
            arms: by name: likewise, or the folder or hub name of a PEFT adapter of the base, which shares its weights
                but for those that the adapter replaces or rewrites (DIR#NAME is the one in the subfolder NAME). The
                base stays as it is; one in which PEFT has put an adapter is decoded as it behaves, and takes none.
            tokenizer, arm_tokenizers: in place of those that lie beside the models; loaded, or a folder or hub name. An
                ARM without a tokenizer has the base's.
            device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ... Loaded models stay where they are.
            dtype: "auto" (as stored), a torch dtype or its name.
            backend, options: as in the constructor.

        Raises:
            GenarmError: a folder that is missing or holds no causal language model, an adapter that does not fit, a
                tokenizer that differs from the base's, a device or backend that cannot be used.
        """
        device, dtype = loading.resolve_device(device), loading.resolve_dtype(dtype)
        _check_backend(backend, torch.device(device).type)
        tokenizer = loading.given_tokenizer("tokenizer", tokenizer)
        tokenizers = {
            name: loading.given_tokenizer(f"arm_tokenizers[{name!r}]", one)
            for name, one in (arm_tokenizers or {}).items()
        }
        loaded_base = loading.load_base(base, tokenizer, device, dtype)
        loaded = {
            name: adapters.load_arm(name, arm, loaded_base, tokenizers.get(name), device, dtype)
            for name, arm in (arms or {}).items()
        }
        return cls(
            loaded_base.model,
            loaded_base.tokenizer,
            {name: arm.model for name, arm in loaded.items()},
            arm_tokenizers={name: arm.tokenizer for name, arm in loaded.items()},
            backend=backend,
            **options,
        )

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._base.tokenizer

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The ARMs' names, in the order they were given."""
        return tuple(self._arms)

    @property
    def forward_models(self) -> list[Any]:
        """The modules whose forwards make up a step, of one token a row: the base, which takes its adapters' rows with
        it, then each ARM that has a forward of its own. To be watched by hooks, not called.
        """
        return [one.modules[-1] for one in self._provider.passes]

    @property
    def paths(self) -> list[ModelPath]:
        """By model, base first: whether it decodes on the fast path, what is shared, compiled and captured."""
        return self._provider.paths

    def require_fast_path(self) -> None:
        """GenarmError unless every model has static caches; for what measures or tests, where a slower path is a fault
        and not a fallback.
        """
        self._provider.require_fast_path()

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
        batch_size: int | None = None,
    ) -> GenerationResult:
        """Continues every prompt until its EOS token, a stop string or max_new_tokens.

        EOS is what it is for transformers' generate: the eos_token_id of the base's generation_config, which a folder
        without generation_config.json takes from config.json. Where that is None, no token ends a row.

        Args:
            prompts: one prompt or many, of any lengths (a chat may stand among many), tokenised with BOS where the
                tokenizer adds it, and without the EOS that some append; an empty one is BOS alone; or
            messages: one chat or many (lists of {"role", "content"}), rendered by the tokenizer's chat template.
            arm_prompts: by ARM, the prompts (or chats) it sees in place of the base's; the continuation is shared.
            weights: by ARM, a number or one a prompt; or a mapping a prompt. An ARM left out has weight 0; None gives
                every ARM weight 1. See `guided_step` for what weights mean.
            max_new_tokens, temperature, top_k, top_p, min_p: a number or one a prompt, as `guided_step` has them.
            seed: a number s gives prompt b the seed `genarm_kernels.row_seed(s, b)`; or one a prompt. Position is the
                index in the continuation.
            stop: strings that end a continuation, wherever tokens begin and end. They may name special tokens, such as
                "<|im_end|>\\n", though `texts` are without these.
            batch_size: prompts decoded at once, at most; a prompt that ends makes room for the next one. Left out, as
                many as fit into memory, up to 256 on a GPU and 32 elsewhere.

        Raises:
            GenarmError: what cannot be decoded as asked, before anything is decoded (`PromptError` where one prompt is
                at fault): an ARM name that is not loaded, a number out of range, a prompt longer than a model allows,
                messages without a chat template, ... While decoding: logits that hold NaN or infinity.
        """
        rows = self._rows(
            self._request(
                prompts, messages, arm_prompts, weights, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop
            )
        )
        for _ in self._decode(rows, _batch_size(batch_size)):
            pass
        return self._result(rows)

    def generate_each(
        self, prompts: str | Sequence[str | Messages] | None = None, **arguments: Any
    ) -> Iterator[tuple[int, GenerationResult]]:
        """`generate`, a prompt at a time: (index of the prompt, its result alone), in the order in which they finish.

        Arguments and errors as in `generate`; what has been given out stays when a later prompt fails.
        """
        request, batch_size = self._checked(prompts, arguments)
        steps = self._decode(self._rows(request), batch_size)
        return ((row.index, self._result([row])) for _, grown in steps for row in grown if row.finish_reason)

    def check(self, prompts: str | Sequence[str | Messages] | None = None, **arguments: Any) -> None:
        """Raises what `generate` with the same arguments would raise before decoding; touches no model."""
        self._checked(prompts, arguments)

    def _checked(self, prompts: Any, arguments: dict[str, Any]) -> tuple["_Request", int | None]:
        """The arguments of `generate`, with its defaults."""
        try:
            bound = signature(GuidedDecoder.generate).bind(self, prompts, **arguments)
        except TypeError as error:
            raise TypeError(f"{error}; the arguments are those of generate") from None
        bound.apply_defaults()
        del bound.arguments["self"]
        batch_size = _batch_size(bound.arguments.pop("batch_size"))
        return self._request(**bound.arguments), batch_size

    def _result(self, rows: Sequence[Row]) -> GenerationResult:
        return GenerationResult(
            texts=[row.finish_text() for row in rows],
            tokens=[row.tokens for row in rows],
            logprobs=[row.logprobs for row in rows],
            base_logprobs=[row.base_logprobs for row in rows],
            rewards={name: [row.rewards[name] for row in rows] for name in self._arms},
            finish_reasons=[row.finish_reason or "length" for row in rows],
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
        request = self._request(
            prompt, messages, own, weights, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop
        )
        (row,) = self._rows(request, streaming=True)
        return GuidedStream(row, self._decode([row]), self.arm_names)

    def _request(
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
    ) -> "_Request":
        """Everything that can be checked before decoding, checked; on the host alone."""
        inputs = _inputs(prompts, messages)
        texts = [_render(i, self.tokenizer, one) for i, one in enumerate(inputs)]
        ids = [_encode(self._base.tokenizer, texts)]
        own_prompts = dict(arm_prompts or {})
        for name in own_prompts:
            check_arm(name, self._arms, "arm_prompts")
        for name, arm in self._arms.items():
            own_texts = texts
            if name in own_prompts:
                own = _inputs(own_prompts[name], None)
                if len(own) != len(inputs):
                    raise GenarmError(f"arm_prompts[{name!r}]: expected {len(inputs)} prompts, got {len(own)}")
                own_texts = [_render(i, arm.tokenizer, one) for i, one in enumerate(own)]
            ids.append(_encode(arm.tokenizer, own_texts))

        rows = len(inputs)
        limits = _ints("max_new_tokens", max_new_tokens, rows, low=1)
        labels = ["the base", *(f"ARM {name!r}" for name in self._arms)]
        for label, loaded, own_ids in zip(labels, (self._base, *self._arms.values()), ids, strict=True):
            _check_prompts(label, loaded.model, own_ids, limits)
        stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else [stop]
        if not all(isinstance(text, str) and text for text in stops):
            raise GenarmError(f"stop: expected non-empty strings, got {stop!r}")
        return _Request(
            ids=ids,
            limits=limits,
            weights=self._weights(weights, rows),
            parameters={
                "temperature": _floats("temperature", temperature, rows, 0.0),
                "top_k": [max(0, min(k, 2**31 - 1)) for k in _ints("top_k", top_k, rows)],
                "top_p": _floats("top_p", top_p, rows, 0.0, 1.0),
                "min_p": _floats("min_p", min_p, rows, 0.0, 1.0),
            },
            seeds=_seeds(seed, rows),
            stop=stops,
        )

    def _rows(self, request: "_Request", streaming: bool = False) -> list[Row]:
        return [
            Row(
                index=b,
                prompts=[ids[b] for ids in request.ids],
                limit=request.limits[b],
                seed=request.seeds[b],
                weights=request.weights[b],
                parameters={name: values[b] for name, values in request.parameters.items()},
                text=TextStream(self.tokenizer, request.ids[0][b], request.stop),
                incremental=streaming or bool(request.stop),
                rewards={name: [] for name in self._arms},
            )
            for b in range(len(request.limits))
        ]

    def _decode(self, rows: list[Row], batch_size: int | None = None) -> Iterator[tuple[Run, list[Row]]]:
        """The rows that have got a token, step after step, and the run they are in."""
        if not rows:
            return
        length = max(max(map(len, row.prompts)) + row.limit for row in rows)
        engine, at_once = self._provider.take(len(rows), length, batch_size)
        run, sound = run_for(engine, at_once, rows, self._eos), True
        del rows  # what has been decoded can go
        try:
            for grown in run:
                if grown:
                    yield run, grown
        except Exception:
            sound = False  # its caches may hold NaN
            raise
        finally:  # also when nobody asks for the rest of a stream
            if sound:
                self._provider.give_back(engine)

    def _weights(self, weights: Weights, rows: int) -> list[list[float]]:
        """`[B][N]`, from what `generate` accepts."""
        if weights is None:
            return [[1.0] * len(self._arms) for _ in range(rows)]
        if isinstance(weights, Mapping):
            columns = _named_floats(weights, self._arms, rows)
            by_row = [{name: column[b] for name, column in columns.items()} for b in range(rows)]
        elif not isinstance(weights, Sequence) or not all(isinstance(row, Mapping) for row in weights):
            raise GenarmError(f"weights: expected a mapping of ARM names to numbers, or one a prompt, got {weights!r}")
        elif len(weights) != rows:
            raise GenarmError(f"weights: expected one mapping or {rows}, one a prompt, got {len(weights)}")
        else:
            by_row = [
                {name: values[0] for name, values in _named_floats(row, self._arms, 1).items()} for row in weights
            ]
        return [[row.get(name, 0.0) for name in self._arms] for row in by_row]


class GuidedStream:
    """The events of one prompt, token by token; `set_weights` steers the tokens still to come."""

    def __init__(self, row: Row, steps: Iterator[tuple[Run, list[Row]]], arm_names: Sequence[str]) -> None:
        self._row = row
        self._steps = steps
        self._arm_names = arm_names
        self._run: Run | None = None

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        self._run, (row,) = next(self._steps)
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
        new = list(self._row.weights)
        for name, values in _named_floats(weights, self._arm_names, 1).items():
            new[self._arm_names.index(name)] = values[0]
        if self._run is None:
            self._row.weights = new
        else:
            self._run.set_weights(self._row, new)


@dataclass(frozen=True)
class _Request:
    """A checked request; lists over prompts."""

    ids: list[list[list[int]]]  # of the base's prompts, then of each ARM's
    limits: list[int]
    weights: list[list[float]]
    parameters: dict[str, list[Any]]  # of guided_step
    seeds: list[int]
    stop: list[str]


def _eos(base: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """The ids that end a row, as transformers' generate has them: those of the base's generation_config.

    GenarmError when the models share none of them; a warning names those they do not share.
    """
    eos = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    every = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
    drawn = frozenset(token for token in every if token < vocab_size)
    if every and not drawn:
        raise GenarmError(f"EOS {sorted(every)} lies outside the models' shared vocabulary, {vocab_size}")
    names = loading.token_names(tokenizer)
    for token in sorted(every - drawn):
        _LOGGER.warning(
            "EOS %d (%r) lies outside the models' shared vocabulary, %d tokens, and is never drawn; rows end at EOS %s",
            token, names.get(token), vocab_size, sorted(drawn),
        )  # fmt: skip
    return drawn


def _check_backend(name: str, device_type: str) -> str:
    try:
        backends.load(validation.backend(name), device_type, 1)
    except (ValueError, RuntimeError) as error:
        raise GenarmError(str(error)) from error
    return name


def _inputs(prompts: Any, messages: Any) -> list[str | Messages]:
    """A list of prompts (str) and chats (lists of messages)."""
    if (prompts is None) == (messages is None):
        raise GenarmError("give either prompts or messages")
    if isinstance(prompts, str):
        return [prompts]
    several = messages if prompts is None else prompts
    if not isinstance(several, Sequence) or isinstance(several, (str, bytes)):
        raise GenarmError(f"prompts: expected a str or a sequence of prompts, got {type(several).__name__}")
    one_chat = prompts is None and len(several) > 0 and isinstance(several[0], Mapping)
    return [several] if one_chat else list(several)


def _render(index: int, tokenizer: Any, one: Any) -> tuple[str, bool]:
    """The text of a prompt or a chat, and whether the tokenizer is to add its special tokens (a template has them)."""
    if isinstance(one, str):
        return one, True
    chat = isinstance(one, Sequence) and not isinstance(one, bytes) and len(one) > 0
    if not chat or not all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in one):
        raise PromptError(index, "expected a str, or messages with 'role' and 'content'")
    if not tokenizer.chat_template:
        raise PromptError(index, "the tokenizer has no chat template; give the prompt as text")
    try:
        return tokenizer.apply_chat_template(list(one), tokenize=False, add_generation_prompt=True), False
    except Exception as error:  # a template is a program of its own and may raise anything
        raise PromptError(index, f"the chat template rejects the messages: {error}") from error


def _encode(tokenizer: Any, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    encoded = [encode_prompt(tokenizer, text, special) for text, special in texts]
    for i, ids in enumerate(encoded):
        if not ids:
            raise PromptError(i, "has no tokens: it is empty, and the tokenizer puts no BOS before it; give some text")
    return encoded


def _check_prompts(label: str, model: Any, prompts: list[list[int]], limits: list[int]) -> None:
    """PromptError unless the model has the prompts' tokens and room for them and their continuations."""
    positions, embeddings = transformers_api.max_positions(model), loading.embeddings(model)
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        # The last token drawn is not fed again.
        if positions is not None and len(prompt) + limit - 1 > positions:
            raise PromptError(
                i,
                f"{len(prompt)} tokens and {limit} new ones are more than the {positions} positions of {label}",
            )
        if max(prompt) >= embeddings:
            raise PromptError(i, f"its token {max(prompt)} lies outside the {embeddings} tokens of {label}")


def _batch_size(value: int | None) -> int | None:
    return None if value is None else _ints("batch_size", value, 1, low=1)[0]


def _named_floats(weights: Mapping[str, Any], arms: Iterable[str], rows: int) -> dict[str, list[float]]:
    """By ARM, a weight a row; GenarmError on an unknown name or a bad number."""
    for name in weights:
        check_arm(name, arms, "weights")
    return {name: _floats(f"weights[{name!r}]", value, rows) for name, value in weights.items()}


def _floats(name: str, value: Any, rows: int, low: float = -_MAX_FLOAT32, high: float = _MAX_FLOAT32) -> list[float]:
    values = _list(name, value, rows)
    for v in values:
        number: Any = v  # compared before float(), which an int may be too large for
        if not isinstance(v, Real) or isinstance(v, bool) or not low <= number <= high:
            bounds = "a finite number" if low < 0 else f"a number from {low:g} to {high:g}"
            raise GenarmError(f"{name}: expected {bounds}, got {v!r}")
    return [float(v) for v in values]


def _ints(name: str, value: Any, rows: int, low: int | None = None) -> list[int]:
    values = _list(name, value, rows)
    for v in values:
        if not isinstance(v, Integral) or isinstance(v, bool) or (low is not None and v < low):
            raise GenarmError(f"{name}: expected an integer{'' if low is None else f' of at least {low}'}, got {v!r}")
    return [int(v) for v in values]


def _seeds(seed: Any, rows: int) -> list[int]:
    """int64 seeds: one number seeds all rows as in `guided_step`."""
    one = isinstance(seed, Integral)
    try:
        return [row_seed(s, b if one else 0) for b, s in enumerate(_ints("seed", seed, rows))]
    except ValueError as error:
        raise GenarmError(str(error)) from None


def _list(name: str, value: Any, rows: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * rows
    if len(value) != rows:
        raise GenarmError(f"{name}: expected a number or {rows}, one a prompt, got {len(value)}")
    return list(value)

"""`GuidedDecoder`: a base language model guided, token by token, by any number of autoregressive reward models.

prompts -> token ids -> [base forward | ARM forwards] -> guided_step -> tokens -> text
                         ^                                          |
                         +------------- one token a row ------------+
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from genarm_kernels import backends, validation

from ..arguments import arm_name, integer, real
from ..errors import GenarmError
from ..models import adapters, loading
from ..text import TextStream
from . import linears
from .provision import ModelPath, Options, Provider
from .request import Messages, PerPrompt, Request, Weights, encode, requests
from .results import Decoded, GenerationResult, StreamEvent
from .scheduler import Row, Run, run_for

_LOGGER = logging.getLogger("genarm")


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
        linear: str = "auto",
        quantize: str | None = None,
    ) -> None:
        """From loaded transformers models; an ARM without a tokenizer of its own uses the base's.

        Args:
            backend: of `genarm_kernels.guided_step`.
            streams: base and ARM forwards on CUDA streams of their own, side by side.
            cuda_graph: one CUDA graph a step.
            share_weights: ARMs that are LoRA adapters of the base run as further rows of its forward pass, as the
                adapters are when first used.
            compile: `torch.compile` for the forward of a step. Minutes the first time; kept on disk.
            linear: on a CPU, "auto" decodes with the core's linear layers, which read the models' weights at the rate
                of memory (whole steps of Llama, Mistral, Qwen 2 and 3 are one call), where the logits are the models'
                own within rounding; "torch" with the models' own layers.
            quantize: "int8" rounds the weights of all linear layers, the base's and the ARMs', to int8 times a scale of
                each output: half the bytes of bfloat16, on a CPU. The given models stay as they are.

        Those from `streams` to `linear` change how fast the tokens come, not which. Models without static caches do
        without them.

        Raises:
            GenarmError: tokenizers that give a shared id different strings (the first is named; where one of them
                merely reserves the token, a warning), a tokenizer of less than half of its model's tokens, EOS ids of
                which none is shared (a warning where some are), a backend that cannot run.
        """
        tokenizers = dict(arm_tokenizers or {})
        for name in tokenizers:
            arm_name(name, arms or {}, "arm_tokenizers")
        adapters.check_models(base, arms or {})
        if quantize is not None:
            base, *others = _quantized(quantize, [base, *(arms or {}).values()])
            arms = dict(zip(arms or {}, others, strict=True))
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
            Options(
                _check_backend(backend, base.device.type), streams, cuda_graph, share_weights, compile, _linear(linear)
            ),
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
        **options: Any,
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
        prompts: str | Request | Sequence[str | Messages | Request] | None = None,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        arm_prompts: Mapping[str, Sequence[str | Messages]] | None = None,
        weights: Weights = None,
        max_new_tokens: int | Sequence[int] = Request.max_new_tokens,
        temperature: PerPrompt = Request.temperature,
        top_k: int | Sequence[int] = Request.top_k,
        top_p: PerPrompt = Request.top_p,
        min_p: PerPrompt = Request.min_p,
        seed: int | Sequence[int] = Request.seed,
        stop: str | Sequence[str] = Request.stop,
        batch_size: int | None = None,
    ) -> GenerationResult:
        """Continues every prompt until its EOS token, a stop string or max_new_tokens.

        EOS is what it is for transformers' generate: the eos_token_id of the base's generation_config, which a folder
        without generation_config.json takes from config.json. Where that is None, no token ends a row.

        Args:
            prompts: one prompt or many, of any lengths (a chat may stand among many), tokenised with BOS where the
                tokenizer adds it, and without the EOS that some append; an empty one is BOS alone. Or a `Request`, or
                many, which hold all the arguments but batch_size. Or
            messages: one chat or many (lists of {"role", "content"}), rendered by the tokenizer's chat template.
            arm_prompts: by ARM, the prompts (or chats) it sees in place of the base's; the continuation is shared.
            weights: by ARM, a number or one per prompt; or one mapping per prompt. An ARM left out has weight 0; None
                gives every ARM weight 1. See `guided_step` for what weights mean.
            max_new_tokens, temperature, top_k, top_p, min_p: a number or one per prompt, as `guided_step` has them.
            seed: a number s gives prompt b the seed `genarm_kernels.row_seed(s, b)`; or one per prompt. Position is the
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
        given = requests(
            self.arm_names,
            prompts,
            messages,
            arm_prompts,
            weights,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )
        rows = self._rows(given)
        for _ in self._decode(rows, _batch_size(batch_size)):
            pass
        return self._result(rows)

    def generate_each(
        self, prompts: str | Request | Sequence[str | Messages | Request] | None = None, **arguments: Any
    ) -> Iterator[tuple[int, GenerationResult]]:
        """`generate`, one prompt at a time: (index of the prompt, its result alone), in the order in which they finish.

        Arguments and errors as in `generate`; what has been given out stays when a later prompt fails.
        """
        given, batch_size = self._bound(prompts, arguments)
        steps = self._decode(self._rows(given), batch_size)
        return ((row.index, self._result([row])) for _, grown in steps for row in grown if row.finish_reason)

    def check(
        self, prompts: str | Request | Sequence[str | Messages | Request] | None = None, **arguments: Any
    ) -> None:
        """Raises what `generate` with the same arguments would raise before decoding; touches no model."""
        encode(self._bound(prompts, arguments)[0], self._base, self._arms)

    def stream(
        self,
        prompt: str | Request | None = None,
        *,
        messages: Messages | None = None,
        arm_prompts: Mapping[str, str | Messages] | None = None,
        weights: Mapping[str, float] | None = None,
        max_new_tokens: int = Request.max_new_tokens,
        temperature: float = Request.temperature,
        top_k: int = Request.top_k,
        top_p: float = Request.top_p,
        min_p: float = Request.min_p,
        seed: int = Request.seed,
        stop: str | Sequence[str] = Request.stop,
    ) -> "GuidedStream":
        """An iterator of `StreamEvent`, one per token of one prompt; arguments and errors as in `generate`.

        The tokens are those of `generate` with the same arguments, unless the weights are changed on the way.
        """
        if prompt is not None and not isinstance(prompt, (str, Request)):
            raise TypeError(f"prompt: stream takes one str or Request, got {type(prompt).__name__}")
        given = requests(
            self.arm_names,
            prompt,
            messages,
            {name: [one] for name, one in (arm_prompts or {}).items()},
            weights,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )
        (row,) = self._rows(given, streaming=True)
        return GuidedStream(row, self._decode([row]), self.arm_names)

    def _bound(self, prompts: Any, arguments: dict[str, Any]) -> tuple[list[Request], int | None]:
        """The requests, and the batch size, of arguments of `generate` that are yet without its defaults."""
        try:
            bound = signature(GuidedDecoder.generate).bind(self, prompts, **arguments)
        except TypeError as error:
            raise TypeError(f"{error}; the arguments are those of generate") from None
        bound.apply_defaults()
        del bound.arguments["self"]
        batch_size = _batch_size(bound.arguments.pop("batch_size"))
        return requests(self.arm_names, **bound.arguments), batch_size

    def _rows(self, given: Sequence[Request], streaming: bool = False) -> list[Row]:
        """One row per checked request, its prompts as token ids: all that the host does before decoding."""
        return [
            Row(
                index=b,
                request=request,
                prompts=prompts,
                weights=list((request.weights or {}).values()),
                text=TextStream(self.tokenizer, prompts[0], request.stop),
                incremental=streaming or bool(request.stop),
                rewards={name: [] for name in self._arms},
            )
            for b, (request, prompts) in enumerate(zip(given, encode(given, self._base, self._arms), strict=True))
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

    def _result(self, rows: Sequence[Row]) -> GenerationResult:
        result = GenerationResult(
            texts=[row.finish_text() for row in rows],
            tokens=[row.tokens for row in rows],
            logprobs=[row.logprobs for row in rows],
            base_logprobs=[row.base_logprobs for row in rows],
            rewards={name: [row.rewards[name] for row in rows] for name in self._arms},
            finish_reasons=[row.finish_reason or "length" for row in rows],
        )
        result._remember(
            [Decoded(self.tokenizer, row.prompts[0], row.request.stop, row.finish_reason == "eos") for row in rows]
        )
        return result


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
        for name, value in weights.items():
            arm_name(name, self._arm_names, "weights")
            new[self._arm_names.index(name)] = real(f"weights[{name!r}]", value)
        if self._run is None:
            self._row.weights = new
        else:
            self._run.set_weights(self._row, new)


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


def _quantized(how: str, models: list[Any]) -> list[Any]:
    if how != "int8":
        raise GenarmError(f"quantize: expected None or 'int8', got {how!r}")
    if other := {model.device.type for model in models} - {"cpu"}:
        raise GenarmError(f"quantize: 'int8' is for CPUs, got a model on {other.pop()!r}")
    done: dict[tuple[int, int], Any] = {}
    return [linears.quantized(model, done) for model in models]


def _linear(value: str) -> str:
    if value not in ("auto", "torch"):
        raise GenarmError(f"linear: expected 'auto' or 'torch', got {value!r}")
    return value


def _batch_size(value: int | None) -> int | None:
    return None if value is None else integer("batch_size", value, low=1)

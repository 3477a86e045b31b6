"""Requests: a prompt and how it is to be continued, as the caller gave it, checked, and turned into token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

from genarm_kernels import row_seed

from ..arguments import arm_name, integer, real
from ..errors import GenarmError, PromptError
from ..models import loading, transformers_api
from ..models.loading import LoadedModel
from ..tokens import encode_prompt

Messages: TypeAlias = Sequence[Mapping[str, str]]
PerPrompt: TypeAlias = float | Sequence[float]
Weights: TypeAlias = Mapping[str, PerPrompt] | Sequence[Mapping[str, float]] | None

_MOST_TOKENS = 2**31 - 1  # of top_k: more than any vocabulary has


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued; `GuidedDecoder.generate` takes a list of them in place of arguments.

    The fields are the arguments of `generate`, each for this prompt alone. `seed` is this prompt's own: the prompt b
    of a call that is given one number s has the seed `genarm_kernels.row_seed(s, b)`.
    """

    prompt: str | Messages
    """Text, or the messages of a chat."""
    arm_prompts: Mapping[str, str | Messages] = field(default_factory=dict)
    """By ARM, what it sees in place of `prompt`."""
    weights: Mapping[str, float] | None = None
    """By ARM; one left out has weight 0. None: every ARM has weight 1."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()


def requests(
    arms: Sequence[str],
    prompts: Any,
    messages: Any,
    arm_prompts: Mapping[str, Any] | None,
    weights: Weights,
    **per_prompt: Any,
) -> list[Request]:
    """One request per prompt, checked, from the arguments of `GuidedDecoder.generate`; GenarmError where one is wrong.

    `per_prompt`: the other fields of `Request`, each a value or one per prompt.
    """
    for name in arm_prompts or {}:
        arm_name(name, arms, "arm_prompts")
    inputs = _inputs(prompts, messages)
    n = len(inputs)
    if prompts is not None and any(isinstance(one, Request) for one in inputs):
        return _given(arms, inputs, {"arm_prompts": arm_prompts or {}, "weights": weights, **per_prompt})
    own = {name: _inputs(one, None) for name, one in (arm_prompts or {}).items()}
    for name, one in own.items():
        if len(one) != n:
            raise GenarmError(f"arm_prompts[{name!r}]: expected {n} prompts, got {len(one)}")
    stop, seed = per_prompt.pop("stop"), per_prompt.pop("seed")
    stop = _stop((stop,) if isinstance(stop, str) else stop)
    seeds = [_row_seed(seed, b) for b in range(n)] if isinstance(seed, Integral) else _column("seed", seed, n)
    columns = {name: _column(name, value, n) for name, value in per_prompt.items()}
    weights_of = _weights(weights, n, arms)
    return [
        _checked(
            Request(
                prompt=inputs[b],
                arm_prompts={name: one[b] for name, one in own.items()},
                weights=weights_of[b],
                seed=seeds[b],
                stop=stop,
                **{name: column[b] for name, column in columns.items()},
            ),
            arms,
        )
        for b in range(n)
    ]


def encode(requests: Sequence[Request], base: LoadedModel, arms: Mapping[str, LoadedModel]) -> list[list[list[int]]]:
    """By request, the token ids of its prompt as the base sees it, then as each ARM does.

    Raises:
        PromptError: a prompt cannot be rendered, has no tokens, or is too long for one of the models with what is to
            come.
    """
    models = {"the base": base, **{f"ARM {name!r}": arm for name, arm in arms.items()}}
    limits = [(transformers_api.max_positions(one.model), loading.embeddings(one.model)) for one in models.values()]
    encoded = []
    for b, request in enumerate(requests):
        text = _render(b, base.tokenizer, request.prompt)
        texts = [text]
        for name, arm in arms.items():
            own = request.arm_prompts.get(name)
            texts.append(text if own is None else _render(b, arm.tokenizer, own))
        ids = [_encode(b, one.tokenizer, *text) for one, text in zip(models.values(), texts, strict=True)]
        for label, prompt, (positions, tokens) in zip(models, ids, limits, strict=True):
            more = request.max_new_tokens
            if positions is not None and len(prompt) + more - 1 > positions:  # the last token drawn is not fed again
                problem = f"{len(prompt)} tokens and {more} new ones are more than the {positions} positions of {label}"
                raise PromptError(b, problem)
            if max(prompt) >= tokens:
                raise PromptError(b, f"its token {max(prompt)} lies outside the {tokens} tokens of {label}")
        encoded.append(ids)
    return encoded


def _inputs(prompts: Any, messages: Any) -> list[Any]:
    """A list of prompts (str) and chats (lists of messages)."""
    if (prompts is None) == (messages is None):
        raise GenarmError("give either prompts or messages")
    if isinstance(prompts, (str, Request)):
        return [prompts]
    several = messages if prompts is None else prompts
    if not isinstance(several, Sequence) or isinstance(several, (str, bytes)):
        raise GenarmError(f"prompts: expected a str or a sequence of prompts, got {type(several).__name__}")
    one_chat = prompts is None and len(several) > 0 and isinstance(several[0], Mapping)
    return [several] if one_chat else list(several)


def _given(arms: Sequence[str], inputs: Sequence[Any], others: Mapping[str, Any]) -> list[Request]:
    """The requests that stand in place of prompts, checked; GenarmError where there is anything else beside them."""
    defaults: dict[str, Any] = {one.name: one.default for one in fields(Request)} | {"arm_prompts": {}}
    for name, value in others.items():
        default = defaults[name]
        empty = default is not None and isinstance(value, (Mapping, Sequence)) and not value
        if not empty and (value is not default and not (isinstance(value, Real) and value == default)):
            raise GenarmError(f"{name}: expected as a field of each Request, got as an argument beside them")
    found = []
    for b, one in enumerate(inputs):
        if not isinstance(one, Request):
            raise PromptError(b, f"expected a Request, as the other prompts are, got {type(one).__name__}")
        try:
            found.append(_checked(one, arms))
        except GenarmError as error:
            raise PromptError(b, str(error)) from error
    return found


def _checked(request: Request, arms: Sequence[str]) -> Request:
    """The request with plain numbers in it, a weight for each ARM among them; GenarmError where a value is wrong."""
    if not isinstance(request.arm_prompts, Mapping):
        raise GenarmError(f"arm_prompts: expected a mapping of ARM names to prompts, got {request.arm_prompts!r}")
    for name in request.arm_prompts:
        arm_name(name, arms, "arm_prompts")
    given = request.weights
    if given is None:
        given = dict.fromkeys(arms, 1.0)
    elif not isinstance(given, Mapping):
        raise GenarmError(f"weights: expected a mapping of ARM names to numbers, got {given!r}")
    for name in given:
        arm_name(name, arms, "weights")
    return Request(
        prompt=request.prompt,
        arm_prompts=request.arm_prompts,
        weights={name: real(f"weights[{name!r}]", given.get(name, 0.0)) for name in arms},
        max_new_tokens=integer("max_new_tokens", request.max_new_tokens, low=1),
        temperature=real("temperature", request.temperature, 0.0),
        top_k=max(0, min(integer("top_k", request.top_k), _MOST_TOKENS)),
        top_p=real("top_p", request.top_p, 0.0, 1.0),
        min_p=real("min_p", request.min_p, 0.0, 1.0),
        seed=_row_seed(request.seed, 0),
        stop=_stop(request.stop),
    )


def _stop(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(x, str) and x for x in stop):
        raise GenarmError(f"stop: expected a sequence of non-empty strings, got {stop!r}")
    return tuple(stop)


def _weights(weights: Any, n: int, arms: Sequence[str]) -> list[Mapping[str, float] | None]:
    """One mapping per prompt, from what `generate` accepts; the numbers are unchecked."""
    if weights is None:
        return [None] * n
    if isinstance(weights, Mapping):
        for name in weights:
            arm_name(name, arms, "weights")
        columns = {name: _column(f"weights[{name!r}]", value, n) for name, value in weights.items()}
        return [{name: column[b] for name, column in columns.items()} for b in range(n)]
    if not isinstance(weights, Sequence) or not all(isinstance(row, Mapping) for row in weights):
        raise GenarmError(f"weights: expected a mapping of ARM names to numbers, or one per prompt, got {weights!r}")
    if len(weights) != n:
        raise GenarmError(f"weights: expected one mapping or {n}, one per prompt, got {len(weights)}")
    return list(weights)


def _column(name: str, value: Any, n: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n
    if len(value) != n:
        raise GenarmError(f"{name}: expected a number or {n}, one per prompt, got {len(value)}")
    return list(value)


def _row_seed(seed: Any, row: int) -> int:
    """As `guided_step` seeds a row; an int64."""
    try:
        return row_seed(integer("seed", seed), row)
    except ValueError as error:
        raise GenarmError(str(error)) from None


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


def _encode(index: int, tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = encode_prompt(tokenizer, text, special)
    if not ids:
        reason = "has no tokens: it is empty, and the tokenizer puts no BOS before it; give some text"
        raise PromptError(index, reason)
    return ids

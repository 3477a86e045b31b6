"""What decoding gives back: the results of prompts, and the events of a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..text import TextStream


class Decoded(NamedTuple):
    """What the tokens of one continuation are made into text by."""

    tokenizer: Any
    prompt: list[int]
    stop: Sequence[str]
    ended: bool
    """Whether the last token is EOS, which the text does not show."""

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, as a stream gives it."""
        stream, last = TextStream(self.tokenizer, self.prompt, self.stop), len(tokens) - 1
        shown = ([] if self.ended and i == last else [token] for i, token in enumerate(tokens))
        return [stream.push(*one, last=i == last) for i, one in enumerate(shown)]


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

    def _remember(self, decoded: Sequence[Decoded]) -> None:
        """Not a field: the fields are plain data."""
        vars(self)["_decoded"] = decoded

    @cached_property
    def pieces(self) -> list[list[str]]:
        """The text of each token, made when first asked for; joined, those of a row are its `texts`.

        A token has "" where what it spells is incomplete, or cut with a stop string: a character that spans tokens
        belongs to the last of them.
        """
        return [one.pieces(tokens) for one, tokens in zip(vars(self)["_decoded"], self.tokens, strict=True)]

    def events(self, b: int) -> Iterator[StreamEvent]:
        """The tokens of prompt b as a stream gives them."""
        for i, (text, token) in enumerate(zip(self.pieces[b], self.tokens[b], strict=True)):
            yield StreamEvent(
                text=text,
                token=token,
                logprob=self.logprobs[b][i],
                base_logprob=self.base_logprobs[b][i],
                rewards={name: values[b][i] for name, values in self.rewards.items()},
                finish_reason=self.finish_reasons[b] if i + 1 == len(self.tokens[b]) else None,
            )

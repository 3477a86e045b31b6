"""Text of a continuation as its tokens arrive: characters that span tokens, and stop strings that span tokens."""

from collections.abc import Sequence
from typing import Any

# A few tokens of the prompt are decoded along, since a tokenizer may treat the first token of a text specially (the
# leading space of a SentencePiece word).
_CONTEXT = 6


class TextStream:
    """Decodes one row's continuation, token by token.

    `text` is what has been decoded so far, cut before the first stop string; `stopped` tells whether one was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._decoded = 0, len(self._ids)  # the window that is decoded again, and where its news begin
        self._released = 0
        self.text = ""
        self.stopped = False

    def push(self, *tokens: int, last: bool = False) -> str:
        """Takes the next tokens and returns the text that can be shown: what no later token can change or stop.

        `last=True` says that no token follows, which releases everything held back.
        """
        self._ids += tokens
        if not self.stopped:
            self._append(self._decode(last))
        held_back = 0 if last or self.stopped else self._possible_stop()
        shown = self.text[self._released : len(self.text) - held_back]
        self._released += len(shown)
        return shown

    def _decode(self, last: bool) -> str:
        before = self._text_of(self._ids[self._begin : self._decoded])
        now = self._text_of(self._ids[self._begin :])
        # The first bytes of a character, or a special token, whose neighbours are decoded together: wait for the rest.
        if not last and (now.endswith("\ufffd") or len(now) <= len(before)):
            return ""
        self._begin, self._decoded = self._decoded, len(self._ids)
        return now[len(before) :]

    def _text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _append(self, news: str) -> None:
        start = len(self.text)
        self.text += news
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        if any(at >= 0 for at in found):
            self.text = self.text[: min(at for at in found if at >= 0)]
            self.stopped = True

    def _possible_stop(self) -> int:
        """The length of the longest end of the text that may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

"""Text of a continuation as its tokens arrive: characters that span tokens, and stop strings that span tokens."""

import codecs
import re
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Any

from .tokens import kinds

# A few tokens of what precedes are decoded along, since a tokenizer may treat the first token of a text specially (the
# leading space of a SentencePiece word). As each holds a byte at least, no character reaches back beyond them.
_CONTEXT = 6
_UNKNOWN = "\ufffd"  # what bytes that are no character decode to


class TextStream:
    """Decodes one row's continuation, token by token, in time that is linear in its tokens.

    `text` is what has been decoded so far, cut before the first stop string; `stopped` tells whether one was found. It
    is what the tokenizer's decoding of prompt and continuation adds to the prompt's, without special tokens. Of bytes
    that are no character each becomes U+FFFD where a vocabulary spells them <0x00> to <0xFF>, and the characters beside
    them stay, as SentencePiece has it (other decoders of such vocabularies lose these).

    A stop string may name special tokens, and is then found where they are, though the text is shown without them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special, self._bytes = kinds(tokenizer)
        shown = (token for token in reversed(prompt) if token not in self._special)
        self._context = list(islice(shown, _CONTEXT))[::-1]
        # An undecodable byte becomes half a surrogate pair first, a letter that no text holds.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._unfinished = 0
        for token in self._context:
            is_byte = token in self._bytes
            self._characters([token] if is_byte else [], final=not is_byte)
        self._unfinished = len(self._utf8.getstate()[0])  # bytes of a character that the prompt begins
        self._held = ""  # U+FFFD at the end of the decoded text, which the next token may turn into a character
        self._stop = stop
        named = [token for token, name in self._special.items() if any(name in one for one in stop)]
        named.sort(key=lambda token: -len(self._special[token]))  # a name may be a part of another
        self._marks = {token: chr(0xD800 + i) for i, token in enumerate(named)}  # letters that no text holds
        marked = list(stop)
        for token, mark in self._marks.items():
            marked = [one.replace(self._special[token], mark) for one in marked]
        self._marked_stop = [one for one in marked if one not in stop]
        self._marked = ""  # the text, with a mark for each special token that a stop string names
        self._released = 0
        self.text = ""
        self.stopped = False

    def push(self, *tokens: int, last: bool = False) -> str:
        """Takes the next tokens and returns the text that can be shown: what no later token can change or stop.

        `last=True` says that no token follows, which releases everything held back.
        """
        for kind, group in groupby(tokens, self._kind):
            if self.stopped:
                break
            if kind == "special":
                for token in group:
                    if token in self._marks:
                        self._append(self._flush(), self._marks[token])
                continue
            ids = list(group)
            self._append(self._held + self._characters(ids) if kind == "byte" else self._plain(ids))
            if kind == "byte":
                self._held = ""
            self._context = (self._context + ids)[-_CONTEXT:]
        if last and not self.stopped:
            self._append(self._flush())
        held_back = 0 if last or self.stopped else self._possible_stop()
        shown = self.text[self._released : len(self.text) - held_back]
        self._released += len(shown)
        return shown

    def _kind(self, token: int) -> str:
        return "special" if token in self._special else "byte" if token in self._bytes else "plain"

    def _plain(self, ids: list[int]) -> str:
        """The text of tokens that are neither special nor bytes."""
        unfinished = self._characters([], final=True)
        before, now = self._text_of(self._context), self._text_of(self._context + ids)
        known = before.removesuffix(self._held)
        if not now.startswith(known):  # a character that the prompt's last bytes begin
            known = known.removesuffix(_UNKNOWN)
        fresh = now[len(known) :]
        self._held = _UNKNOWN if fresh.endswith(_UNKNOWN) else ""
        return unfinished + fresh.removesuffix(self._held)

    def _characters(self, tokens: Iterable[int], final: bool = False) -> str:
        """What bytes complete."""
        text = self._utf8.decode(bytes(self._bytes[token] for token in tokens), final)
        text = re.sub(r"[\udc80-\udcff]", _UNKNOWN, text)
        if text:  # where it is not that character, the prompt's bytes are not a part of the continuation
            text, self._unfinished = text.removeprefix(_UNKNOWN * self._unfinished), 0
        return text

    def _flush(self) -> str:
        """What has been held back because the next token might have changed it."""
        held, self._held = self._held, ""
        return held + self._characters([], final=True)

    def _text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _append(self, news: str, mark: str = "") -> None:
        start, marked_start = len(self.text), len(self._marked)
        self.text += news
        self._marked += news + mark
        cuts = _find(self.text, start, self._stop)
        for at in _find(self._marked, marked_start, self._marked_stop):
            cuts.append(at - self._count_marks(self._marked[:at]))
        if cuts:
            self.text = self.text[: min(cuts)]
            self.stopped = True

    def _possible_stop(self) -> int:
        """The length of the longest end of the text that may be the beginning of a stop string."""
        lengths = [n for one in self._stop for n in range(1, len(one)) if self.text.endswith(one[:n])]
        begun = [one[:n] for one in self._marked_stop for n in range(1, len(one)) if self._marked.endswith(one[:n])]
        return max([*lengths, *(len(one) - self._count_marks(one) for one in begun)], default=0)

    def _count_marks(self, text: str) -> int:
        return sum(text.count(mark) for mark in self._marks.values())


def _find(text: str, start: int, stops: Sequence[str]) -> list[int]:
    """Where stop strings stand that end after `start`, the first place of each."""
    places = [text.find(stop, max(0, start - len(stop) + 1)) for stop in stops]
    return [at for at in places if at >= 0]

"""What `genarm generate` reads and writes: prompts, and a file of results that an interrupted run goes on with."""

import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .errors import GenarmError


@dataclass(frozen=True)
class Prompt:
    """One prompt as the user gave it; `where` is what errors call it: "path:line" or the like."""

    where: str
    content: str | list[dict[str, str]]
    """Text, or the messages of a chat."""
    id: Any = None
    weights: Mapping[str, float] = field(default_factory=dict)
    """By ARM, in place of the run's."""

    def record(self) -> dict[str, Any]:
        """The prompt's part of its line of results."""
        key = "prompt" if isinstance(self.content, str) else "messages"
        return ({} if self.id is None else {"id": self.id}) | {key: self.content}

    def title(self) -> str:
        """One line that tells the prompt from others."""
        text = self.content if isinstance(self.content, str) else self.content[-1]["content"]
        return textwrap.shorten(text, 100, placeholder=" ...")


def number(text: str, what: str) -> float:
    """`text` as a finite number; GenarmError otherwise.

    >>> number("0.5", "weight of 'polite'")
    0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise GenarmError(f"{what} is not a number: {text!r}")
    return value


def from_texts(texts: Iterable[str]) -> list[Prompt]:
    """The prompts of the command line."""
    return [Prompt(where, _text(text, where)) for i, text in enumerate(texts, start=1) if (where := f"--prompt {i}")]


def from_lines(stream: BinaryIO, name: str) -> list[Prompt]:
    """A prompt a line; blank lines are passed over."""
    return _some([Prompt(where, _decode(line, where)) for where, line in _lines(stream, name)], name)


def from_jsonl(path: Path, arms: Iterable[str]) -> list[Prompt]:
    """Rows {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}, other keys but two ignored.

    "id" is kept in the results, and "weights" ({ARM: number}, of `arms`) takes the place of the run's weights.

    Raises:
        GenarmError: the file cannot be read or is empty; "path:line: ..." for the first malformed row.
    """
    try:
        with path.open("rb") as stream:
            return _some([_row(line, where, tuple(arms)) for where, line in _lines(stream, str(path))], str(path))
    except OSError as error:
        raise GenarmError(f"{path}: cannot be read: {error.strerror}") from error


class Results:
    """A JSONL file with a line for each of a run's prompts, in their order, that grows as they are decoded.

    `known` holds, for each prompt, the part of its line that is known before decoding. Opening an existing file checks
    that its lines begin with theirs, cuts off a line that was not finished, and sets `done`, the number of those that
    were.
    """

    def __init__(self, path: Path, known: list[dict[str, Any]]) -> None:
        self.path, self.done = path, 0
        self._heads = [json.dumps(record, ensure_ascii=False)[:-1].encode() for record in known]
        if path.exists() and not path.is_file():
            raise GenarmError(f"{path}: cannot be written to: not a regular file")
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise GenarmError(f"{path}: cannot be written to: {error.strerror}") from error
        self._file.seek(0)
        start = 0
        for line in self._file:
            head = self._heads[self.done] if self.done < len(known) else None
            whole = line.endswith(b"\n")
            # What is cut off must be this run's as well, lest a file given by mistake lose its end.
            if head is None or not (line.startswith(head) or (not whole and head.startswith(line))):
                differing = _difference(line, known[self.done]) if head else "more lines than there are prompts"
                raise GenarmError(f"{path}:{self.done + 1}: belongs to another run ({differing}); choose another --out")
            if not whole:
                self._file.truncate(start)
                break
            start += len(line)
            self.done += 1

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """The rest of the next lines, on the disk when this returns."""
        # Without the brace that closes the head and the one that opens the rest, the two are one object.
        rests = [json.dumps(record, ensure_ascii=False)[1:].encode() for record in records]
        heads = self._heads[self.done : self.done + len(rests)]
        try:
            self._file.write(b"".join(head + b", " + rest + b"\n" for head, rest in zip(heads, rests, strict=True)))
            self._file.flush()
            self.done += len(rests)  # they outlive this process; what follows takes long enough to be interrupted
            os.fsync(self._file.fileno())
        except OSError as error:
            raise GenarmError(f"{self.path}: cannot be written to: {error.strerror}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise GenarmError(f"{where}: is not valid UTF-8: {error.reason}") from error


def _lines(stream: BinaryIO, name: str) -> Iterable[tuple[str, bytes]]:
    return ((f"{name}:{i}", line) for i, line in enumerate(stream, start=1) if line.strip())


def _some(prompts: list[Prompt], name: str) -> list[Prompt]:
    if not prompts:
        raise GenarmError(f"{name}: has no prompts")
    return prompts


def _row(line: bytes, where: str, arms: tuple[str, ...]) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GenarmError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise GenarmError(f"{where}: is not an object with either prompt or messages")
    weights = row.get("weights", {})
    if not isinstance(weights, dict):
        raise GenarmError(f"{where}: weights is not an object")
    for name, weight in weights.items():
        check_arm(name, arms, f"{where}: weights")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise GenarmError(f"{where}: weight of {name!r} is not a number: {json.dumps(weight)}")
    content = row["prompt"] if "prompt" in row else row["messages"]
    if "prompt" in row:
        _text(content, where)
    elif not isinstance(content, list) or not content:
        raise GenarmError(f"{where}: messages is not a list of messages")
    else:
        for message in content:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise GenarmError(f"{where}: messages has one without role and content")
            _text(message.get("content"), where)
    return Prompt(where, content, row.get("id"), weights)


def check_arm(name: str, arms: Iterable[str], where: str) -> None:
    """GenarmError unless `name` is one of the run's ARMs."""
    if name not in arms:
        raise GenarmError(f"{where}: no ARM is called {name!r}; there are: {', '.join(arms) or 'none'}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise GenarmError(f"{where}: the prompt's text is missing or not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise GenarmError(f"{where}: is not valid Unicode: {error.reason}") from error
    return value


def _difference(line: bytes, known: dict[str, Any]) -> str:
    """What in a line of results is not as `known` has it."""
    try:
        old = json.loads(line)
        old, new = old | old["settings"], known | known["settings"]
    except (ValueError, TypeError, KeyError):
        return "not a line of results"
    return "other " + ", ".join(key for key in new if key != "settings" and old.get(key) != new[key])

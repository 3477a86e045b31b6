"""What `genarm generate` reads and writes: prompts, and a file of results that an interrupted run goes on with."""

import json
import os
import reprlib
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .. import jsonl
from ..errors import GenarmError
from ..locking import lock

_LARGEST = 3.4028234663852886e38  # of float32


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


def check_number(value: Any, what: str) -> None:
    """GenarmError unless `value` is a number that is finite in float32, which decoding computes in."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GenarmError(f"{what} is not a number: {reprlib.repr(value)}")
    if not abs(value) <= _LARGEST:  # not by float(value), which overflows on an int of 400 digits
        raise GenarmError(f"{what} is not finite in float32: {reprlib.repr(value)}")


def number(text: str, what: str) -> float:
    """`text` as a number that `check_number` passes; GenarmError otherwise.

    >>> number("0.5", "weight of 'polite'")
    0.5
    """
    try:
        value = float(text)
    except ValueError as error:
        raise GenarmError(f"{what} is not a number: {text!r}") from error
    check_number(value, what)
    return value


def check_arm(name: str, arms: Iterable[str], where: str) -> None:
    """GenarmError unless `name` is one of the run's ARMs."""
    if name not in arms:
        raise GenarmError(f"{where}: no ARM is called {name!r}; there are: {', '.join(arms) or 'none'}")


def from_texts(texts: Iterable[str]) -> list[Prompt]:
    """The prompts of the command line."""
    prompts = [Prompt(f"--prompt {i}", text) for i, text in enumerate(texts, start=1)]
    for prompt in prompts:
        jsonl.check_text(prompt.content, prompt.where)
    return prompts


def from_lines(stream: BinaryIO, name: str) -> list[Prompt]:
    """A prompt a line; blank lines are passed over."""
    return _some([Prompt(where, _decode(line, where)) for where, line in jsonl.lines(stream, name)], name)


def from_jsonl(path: Path, arms: Iterable[str]) -> list[Prompt]:
    """Rows {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}, other keys but two ignored.

    "id" is kept in the results, and "weights" ({ARM: number}, of `arms`) takes the place of the run's weights.

    Raises:
        GenarmError: the file cannot be read or is empty; "path:line: ..." for the first malformed row.
    """
    return _some([_prompt(where, row, arms) for where, row in jsonl.rows(path)], str(path))


class Results:
    """A JSONL file with a line for each of a run's prompts, in their order, that grows as they are decoded.

    `known` holds, for each prompt, the part of its line that is known before decoding. Opening an existing file checks
    that its lines begin with theirs, cuts off a line that was not finished, and sets `done`, the number of those that
    were. The file is locked meanwhile: a second process that opens it is refused.
    """

    def __init__(self, path: Path, known: list[dict[str, Any]]) -> None:
        self.path, self.done = path, 0
        self._heads = [json.dumps(record, ensure_ascii=False)[:-1].encode() for record in known]
        if path.exists() and not path.is_file():
            raise GenarmError(f"{path}: cannot be written to: not a regular file")
        try:
            self._file = path.open("a+b")
            lock(self._file)
        except BlockingIOError as error:
            raise GenarmError(f"{path}: another process is writing to it") from error
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
        return line.decode()
    except UnicodeDecodeError as error:
        raise GenarmError(f"{where}: is not valid UTF-8: {error.reason}") from error


def _some(prompts: list[Prompt], name: str) -> list[Prompt]:
    if not prompts:
        raise GenarmError(f"{name}: has no prompts")
    return prompts


def _prompt(where: str, row: dict[str, Any], arms: Iterable[str]) -> Prompt:
    if ("prompt" in row) == ("messages" in row):
        raise GenarmError(f"{where}: is not an object with either prompt or messages")
    key, check = ("prompt", jsonl.check_text) if "prompt" in row else ("messages", jsonl.check_messages)
    check(row[key], f"{where}: {key}")
    jsonl.check_unicode(row.get("id"), f"{where}: id")
    weights = row.get("weights", {})
    if not isinstance(weights, dict):
        raise GenarmError(f"{where}: weights is not an object")
    for name, weight in weights.items():
        check_arm(name, arms, f"{where}: weights")
        check_number(weight, f"{where}: weight of {name!r}")
    return Prompt(where, row[key], row.get("id"), weights)


def _difference(line: bytes, known: dict[str, Any]) -> str:
    """What in a line of results is not as `known` has it."""
    try:
        old = json.loads(line)
        old, new = old | old["settings"], known | known["settings"]
    except (ValueError, TypeError, KeyError):
        return "not a line of results"
    other = [key for key in new if key not in ("settings", "identity") and old.get(key) != new[key]]
    if other:
        return "other " + ", ".join(other)
    if "identity" not in old:
        return "written by a version that did not record which models it used"
    changed = [label for label, content in new["identity"].items() if old["identity"].get(label) != content]
    return ", ".join(f"{label} has changed" for label in changed)

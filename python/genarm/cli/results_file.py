"""The file of results that `genarm generate --out` writes, and that an interrupted run goes on with."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import GenarmError
from ..locking import lock


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

"""Files of JSON objects, and the checks that their readers share."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import GenarmError


def rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one per line, or of a JSON array, either of which may be compressed by gzip.

    Each comes after its place, "path:line"; in an array this counts its elements. Blank lines are passed over.

    Raises:
        GenarmError: the file cannot be read; "path:line: ..." for the first line that is not an object.
    """
    try:
        with Path(path).open("rb") as file:
            stream: Any = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            array = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            for where, row in _elements(stream, str(path)) if array else _parsed_lines(stream, str(path)):
                if not isinstance(row, dict):
                    raise GenarmError(f"{where}: is not an object")
                yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GenarmError(f"{path}: cannot be unpacked: {error}") from error
    except OSError as error:
        raise GenarmError(f"{path}: cannot be read: {error.strerror}") from error


def _parsed_lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    return ((where, _parsed(line, where)) for where, line in lines(stream, name))


def _elements(stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}:{i}", row) for i, row in enumerate(_parsed(stream.read(), name), start=1))


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)  # passes over a byte order mark
    except json.JSONDecodeError as error:  # whose text counts lines of its own
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise GenarmError(f"{where}: is not JSON: {error.msg}: {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise GenarmError(f"{where}: is not JSON: {error}") from error


def lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a stream that are not blank, without their ends, each after its place, "name:line".

    A byte order mark of UTF-8 at the beginning is passed over; GenarmError for text in UTF-16.
    """
    for i, line in enumerate(stream, start=1):
        if i == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if b"\0" in line or (i == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))):
            raise GenarmError(f"{name}:{i}: is not UTF-8 but seems to be UTF-16; save the text as UTF-8")
        if line.strip():
            yield f"{name}:{i}", line.rstrip(b"\r\n")


def check_text(value: Any, what: str) -> None:
    """GenarmError unless `value` is text that a tokenizer takes."""
    if not isinstance(value, str):
        raise GenarmError(f"{what} is not a string")
    check_unicode(value, what)


def check_messages(value: Any, what: str) -> None:
    """GenarmError unless `value` is a list of at least one {"role": str, "content": str}."""
    if not isinstance(value, list):
        raise GenarmError(f"{what} is not a list of messages")
    if not value:
        raise GenarmError(f"{what} has no messages")
    for message in value:
        if not isinstance(message, dict):
            raise GenarmError(f"{what} has a message that is not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise GenarmError(f"{what} has a message whose {key} is missing or not a string")
    check_unicode(value, what)


def check_unicode(value: Any, what: str) -> None:
    """GenarmError when a string in `value` holds half a surrogate pair, which JSON can spell but nothing can encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise GenarmError(f"{what} is not valid Unicode: {error.reason}") from error

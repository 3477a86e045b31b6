"""The prompts that `genarm generate` reads."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .. import jsonl
from ..arguments import arm_name, real
from ..errors import GenarmError


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


def from_texts(texts: Iterable[str]) -> list[Prompt]:
    """The prompts of the command line."""
    prompts = [Prompt(f"--prompt {i}", text) for i, text in enumerate(texts, start=1)]
    for prompt in prompts:
        jsonl.check_text(prompt.content, prompt.where)
    return prompts


def from_lines(stream: BinaryIO, name: str) -> list[Prompt]:
    """One prompt per line; blank lines are passed over."""
    return _some([Prompt(where, _decode(line, where)) for where, line in jsonl.lines(stream, name)], name)


def from_jsonl(path: Path, arms: Iterable[str]) -> list[Prompt]:
    """Rows {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}, other keys but two ignored.

    "id" is kept in the results, and "weights" ({ARM: number}, of `arms`) takes the place of the run's weights.

    Raises:
        GenarmError: the file cannot be read or is empty; "path:line: ..." for the first malformed row.
    """
    return _some([_prompt(where, row, arms) for where, row in jsonl.rows(path)], str(path))


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
        arm_name(name, arms, f"{where}: weights")
        real(f"{where}: weight of {name!r}", weight)
    return Prompt(where, row[key], row.get("id"), weights)

"""What `genarm generate` shows: text as it is drawn, columns, colours, and a bar."""

import json
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..decoding.results import GenerationResult, StreamEvent

# Of a token's advantage over the base (see `_advantage`). Blue and red stay apart for the colour-blind.
_BOUNDS = (-2.0, -1.0, -0.25, 0.25, 1.0, 2.0)
_STYLES = (
    "white on #b2182b",
    "black on #ef8a62",
    "black on #fddbc7",
    "",
    "black on #d1e5f0",
    "black on #67a9cf",
    "white on #2166ac",
)


class Screen:
    """Standard output: colours and columns on a terminal, elsewhere plain text, with a table of tokens for rewards."""

    def __init__(self, tokenizer: Any, rewards: bool) -> None:
        self.console = Console(highlight=False)
        self._tokenizer, self._rewards = tokenizer, rewards
        if rewards and self.console.is_terminal:
            below, above = [f" < {x:g} " for x in _BOUNDS[:3]], [f" > {x:g} " for x in _BOUNDS[3:]]
            parts = zip([*below, " near 0 ", *above], _STYLES, strict=True)
            self.console.print(Text.assemble("advantage over the base, in nats: ", *parts, "\n"))

    def stream(self, events: Iterable["StreamEvent"], weights: Mapping[str, float]) -> None:
        """One prompt's tokens, as they are drawn."""
        if self._rewards and not self.console.is_terminal:
            self._table(events, weights)
            return
        for event in events:
            self._print(event.text, self._style(event, weights))
        self._print("\n")

    def show(self, title: str, sides: Mapping[str, "GenerationResult"], weights: Mapping[str, float]) -> None:
        """A finished prompt: one result, or several by name, side by side."""
        self._print(title, "bold")
        if len(sides) > 1 and self.console.is_terminal:
            columns = Table(box=box.SIMPLE_HEAD, expand=True)
            for name in sides:
                columns.add_column(name, ratio=1, overflow="fold")  # not "..." in place of text
            cells = [Text.assemble(*self._pieces(side, weights)) for side in sides.values()]
            # A continuation often begins with a space, which would look like an indented first line.
            columns.add_row(*[cell[len(cell) - len(cell.plain.lstrip()) :] for cell in cells])
            self.console.print(columns)
            return
        for name, side in sides.items():
            self._print(f"--- {name}\n" if name else "")
            if self._rewards and not self.console.is_terminal:
                self._table(side.events(0), weights)
            else:
                for text, style in self._pieces(side, weights):
                    self._print(text, style)
                self._print("\n")
        self._print("\n" if title else "")

    def _print(self, text: str, style: str = "") -> None:
        if self.console.is_terminal:
            self.console.print(Text(text, style), end="", soft_wrap=True)
        else:
            typer.echo(text, nl=False)  # rich would turn tabs into spaces

    def _pieces(self, result: "GenerationResult", weights: Mapping[str, float]) -> list[tuple[str, str]]:
        """A result's text with its styles."""
        if not self._rewards:
            return [(result.texts[0], "")]
        return [(event.text, self._style(event, weights)) for event in result.events(0)]

    def _table(self, events: Iterable["StreamEvent"], weights: Mapping[str, float]) -> None:
        typer.echo("\t".join(["token", *weights, "advantage"]))
        for event in events:
            token = json.dumps(self._tokenizer.decode([event.token]), ensure_ascii=False)  # it may be a tab
            numbers = [*(event.rewards[name] for name in weights), _advantage(event, weights)]
            typer.echo("\t".join([token, *[f"{x:.3f}" for x in numbers]]))

    def _style(self, event: "StreamEvent", weights: Mapping[str, float]) -> str:
        return _STYLES[bisect(_BOUNDS, _advantage(event, weights))] if self._rewards else ""


@contextmanager
def progress(screen: Console, quiet: bool, total: int, done: int) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, or below what is printed where that goes to a terminal too; none without a terminal."""
    console = screen if screen.is_terminal and not quiet else Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield partial(bar.advance, task)


def _advantage(event: "StreamEvent", weights: Mapping[str, float]) -> float:
    """How far the ARMs prefer a token more than the base does: sum_i weight_i * (log ARM_i - log base), in nats.

    ARMs that all have weight 0, and so only look on, count alike.
    """
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1.0)
    return sum(weight * (event.rewards[name] - event.base_logprob) for name, weight in weights.items())

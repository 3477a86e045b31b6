"""The table and the chart of `genarm bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from .speed import Measurement


def table(results: Sequence["Measurement"]) -> Table:
    shown = Table(title="Tokens/s, all rows together", title_justify="left")
    columns = ["method", "batch", "tokens/s", "ms a step", "% of floor", "first token, ms", "memory, GiB"]
    columns += ["outside forwards"]
    for column in columns:
        name = column == "method"
        shown.add_column(column, justify="left" if name else "right", no_wrap=name)
    gpu = any(one.synchronisations is not None for one in results)
    if gpu:
        shown.add_column("waits a token", justify="right")
    for one in results:
        cells = [one.method, str(one.batch), f"{one.tokens_per_second:.1f}", f"{one.step_ms:.2f}"]
        cells += [f"{one.percent_of_floor:.0f}", f"{one.first_token_ms:.0f}", f"{one.memory_gib:.1f}"]
        cells.append("" if one.outside_percent is None else f"{one.outside_percent:.1f} %")
        if gpu:
            cells.append("" if one.synchronisations is None else f"{one.synchronisations:g}")
        shown.add_row(*cells)
    return shown


def chart(results: Sequence["Measurement"], about: Mapping[str, Any], path: Path) -> None:
    """Bars: tokens/s by method, a panel a batch size, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")  # no display on a server
    from matplotlib import pyplot as plt

    batches = list(dict.fromkeys(one.batch for one in results))
    figure, axes = plt.subplots(1, max(1, len(batches)), figsize=(1 + 3.2 * max(1, len(batches)), 3.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=False):
        here = [one for one in results if one.batch == batch]
        names = [one.method for one in here]
        colours = ["0.6" if one.paths is None else "tab:blue" for one in here]
        axis.bar(names, [one.tokens_per_second for one in here], color=colours)
        axis.axhline(1e3 * batch / about["floor_ms"], color="black", linestyle=":", linewidth=1)
        axis.set_title(f"batch {batch}", fontsize=9)
        axis.tick_params(axis="x", rotation=60, labelsize=8)
    axes[0][0].set_ylabel("tokens/s")
    who = f"{about['base']} + {', '.join(about['arms'])}, {about['dtype']}"
    where = f"{about['device']}, {about['machine']}, commit {about['commit']}; dotted: weights / bandwidth"
    figure.suptitle(f"{who}, {where}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

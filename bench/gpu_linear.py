"""Time of a linear layer for a base and a LoRA ARM on an NVIDIA GPU: `python -m bench.gpu_linear --out DIR [--tune]`,
a stage of gpu_check.sh.

The layers of a 7B Llama, bfloat16, rank 8, one token a row, in a CUDA graph that goes round more weights than three L2
caches hold. Of a batch of B prompts: "base": its B rows alone, the least that a layer costs; "rows": with the ARM's B
rows, without what the adapter adds; "torch": with it, by PyTorch; "fused": its Triton kernel. `--tune`
times the last one with other tiles.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bench.gpu_kernels import DEVICE, Time, environment, graph_time
from genarm_kernels.parameters import LayerPart, SharedLayer, WholeLayer
from genarm_kernels.shared_linear import shared_linear

# in, out, how many a block of a 7B has; "k, v": of an 8B
LAYERS = {
    "q, k, v, o": (4096, 4096, 4),
    "gate, up": (4096, 11008, 2),
    "down": (11008, 4096, 1),
    "k, v": (4096, 1024, 0),
}
BLOCKS, RANK, BATCHES = 32, 8, (1, 8, 32)
SUBJECTS = ("base", "rows", "torch", "fused")
TILES = {"BLOCK_N": (16, 32, 64), "BLOCK_K": (64, 128, 256), "WARPS": (4, 8), "MOST_STAGES": (3, 5)}


class Layer:
    """As many copies of a layer's weights as the L2 cannot hold, and the rows of B prompts."""

    def __init__(self, width: int, height: int, batch: int) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.copies = max(2, -(-3 * l2 // (2 * width * height)))
        torch.manual_seed(batch)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * shape[-1] ** -0.5

        self.weights = [numbers(height, width) for _ in range(self.copies)]
        self.down, self.up = numbers(RANK, width), torch.randn(RANK, height, device=DEVICE, dtype=torch.bfloat16)
        owners = torch.ones(RANK, dtype=torch.int32, device=DEVICE)
        part = LayerPart(1, self.down, self.up)
        self.layers = [
            SharedLayer(partial(F.linear, weight=weight), [part], 2, WholeLayer(weight, None, *part[1:], owners, 2))
            for weight in self.weights
        ]
        self.rows, self.base_rows = numbers(2 * batch, 1, width), numbers(batch, 1, width)

    def run(self, subject: str, i: int) -> Tensor:
        weight = self.weights[i % self.copies]
        if subject == "base":
            return F.linear(self.base_rows, weight)
        if subject == "rows":
            return F.linear(self.rows, weight)
        backend = {"torch": "reference", "fused": "triton"}[subject]
        return shared_linear(self.rows, self.layers[i % self.copies], backend)

    def check(self) -> None:
        """AssertionError unless the fused layer gives what float64 gives, to bfloat16's rounding."""
        x, weight = self.rows.double(), self.weights[0].double()
        exact = x @ weight.t()
        exact[1::2] += (x[1::2] @ self.down.double().t()) @ self.up.double()
        for subject in ("torch", "fused"):
            error = (self.run(subject, 0).double() - exact).abs().max().item()
            assert error < 0.02 * exact.abs().max().item(), f"{subject}: off by {error}"

    def time(self, subject: str) -> Time:
        return graph_time(lambda i: self.run(subject, i), max(20, self.copies))


def measure(batches: tuple[int, ...], subjects: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for (name, (width, height, _)), batch in itertools.product(LAYERS.items(), batches):
        layer = Layer(width, height, batch)
        layer.check()
        for subject in subjects:
            time = layer.time(subject)
            gb_s = round(2 * width * height / time.median / 1e3)
            yield {"layer": name, "batch": batch, "subject": subject, "us": time, "gb_s": gb_s}


def of_a_model(results: list[dict[str, Any]], subject: str, batch: int) -> float:
    """Milliseconds of all linear layers of a step."""
    times = {row["layer"]: row["us"].median for row in results if (row["subject"], row["batch"]) == (subject, batch)}
    return sum(BLOCKS * count * times[name] for name, (_, _, count) in LAYERS.items()) / 1e3


def tune() -> Iterator[dict[str, Any]]:
    """Milliseconds of a model's layers by tiles, the fastest at B = 1 first."""
    from genarm_kernels.backends.triton import shared_linear

    for values in itertools.product(*TILES.values()):
        for name, value in zip(TILES, values, strict=True):
            setattr(shared_linear, name, value)
        found = dict(zip(TILES, values, strict=True))
        try:
            results = list(measure((1, 32), ("fused",)))
        except Exception as error:  # of tiles that do not fit, and the like: the others are worth having
            yield {**found, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            continue
        yield {**found, **{f"ms, B={batch}": round(of_a_model(results, "fused", batch), 3) for batch in (1, 32)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    parser.add_argument("--tune", action="store_true", help="time other tiles of the fused layer instead")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        return _tune(options.out) if options.tune else _compare(options.out)


def _tune(out: Path) -> int:
    about, rows = environment_of(), []
    for row in tune():
        rows.append(row)
        print(json.dumps(row), flush=True)
        _save(out / "linear_tune.json", about, rows)
    best = min((row for row in rows if "error" not in row), key=lambda row: row["ms, B=1"], default=None)
    print(f"fastest at B = 1: {best}")
    return 0 if best else 1


def _compare(out: Path) -> int:
    about, results = environment_of(), []
    table = Table("layer", "B", "subject", "us", "p20-p80", "GB/s of weights", "% of copy", title=str(about))
    for row in measure(BATCHES, SUBJECTS):
        results.append(row)
        t, share = row["us"], 100 * row["gb_s"] / about["copy_gb_s"]
        cells = (row["layer"], row["batch"], row["subject"], t.median, f"{t.p20}-{t.p80}", row["gb_s"], round(share))
        table.add_row(*map(str, cells))
        _save(out / "linear.json", about, results)
    console = Console(width=150)
    console.print(table)
    for batch in BATCHES:
        times = {subject: of_a_model(results, subject, batch) for subject in SUBJECTS}
        shown = ", ".join(f"{subject} {ms:.2f}" for subject, ms in times.items())
        share = times["base"] / times["fused"]
        console.print(f"B={batch}, ms a step of a 7B's linear layers: {shown}; base / fused: {share:.3f}")
    return 0


def environment_of() -> dict[str, Any]:
    return {name: value for name, value in environment().items() if name != "call_us"}


def _save(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One result a line."""
    lines = ",\n    ".join(map(json.dumps, rows))
    path.write_text(f'{{"environment": {json.dumps(about)},\n  "results": [\n    {lines}\n  ]}}\n')


if __name__ == "__main__":
    sys.exit(main())

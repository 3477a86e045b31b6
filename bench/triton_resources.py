"""Registers, stack and shared memory of the Triton kernels, off the cubins; needs no GPU.

`python -m bench.triton_resources [--arch 80 90 100] [--all]` compiles the specialisations that differ most, or all of
them (ten minutes on 2 cores), prints a line of JSON each, and fails where one spills or takes too much.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_OPERANDS = 10  # N = 9: the most that the random tests draw; more ARMs work, unchecked for spills

# Bytes, and registers a thread: at 128 an SM holds 16 tiles, 64 KB of 16-bit logits with N = 1 on their way to it. A
# program of the row pass has an SM to itself up to B = the number of SMs.
MOST_SHARED = 48 * 1024  # shared_linear takes what an architecture has
MOST_REGISTERS = {"tile_pass": 208, "row_pass": 255, "whole_row_pass": 128, "shared_linear": 200}
SHARED_OF_ARCHITECTURE = {80: 163, 90: 227, 100: 227}  # KB a block; 99 elsewhere


class SharedLinear(NamedTuple):
    """A specialisation of that kernel; widths are multiples of 16."""

    dtype: torch.dtype
    rows: int
    ranks: int
    bias: bool


def specialisations(everything: bool) -> Iterator[tuple[str, Any]]:
    from genarm_kernels.backends.triton.launch import Specialisation

    flags = (False, True)
    every = [
        ("tile_pass", Specialisation(*rest))
        for rest in itertools.product(DTYPES, range(1, MOST_OPERANDS + 1), flags, flags, flags)
    ]
    for dtype, operands in itertools.product(DTYPES, range(1, MOST_OPERANDS + 1)):
        # What a kernel does not know of is the same kernel.
        every += [("row_pass", Specialisation(dtype, operands, True, filtered, True)) for filtered in flags]
        every.append(("whole_row_pass", Specialisation(dtype, operands, False, False, True)))
    for rows, ranks, bias in itertools.product((16, 32, 64), (8, 32, 64), flags):
        if everything or (rows != 32 and ranks != 32 and not bias):
            yield "shared_linear", SharedLinear(torch.bfloat16, rows, ranks, bias)
    for kernel, spec in every:
        telling = spec.operands in (2, MOST_OPERANDS) and spec.logprobs == (kernel != "whole_row_pass")
        if everything or (telling and (spec.dtype == torch.bfloat16 or spec.operands == 2)):
            yield kernel, spec


def compile_shared_linear(spec: SharedLinear, target: Any) -> Any:
    import triton
    from triton.compiler import ASTSource

    from genarm_kernels.backends.triton.launch import DTYPES
    from genarm_kernels.backends.triton.shared_linear import constants, options, shared_linear_kernel

    names, values = shared_linear_kernel.arg_names, constants(spec.rows, spec.ranks, spec.bias)
    signature = {name: DTYPES[spec.dtype] if name.endswith("_ptr") else "i32" for name in names}
    signature |= {"owners_ptr": "*i32"} | dict.fromkeys(values, "constexpr")
    whole = [name for name in names if name.endswith("_ptr") or name in ("width", "height")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    constexprs = {(names.index(name),): value for name, value in values.items()}
    source = ASTSource(shared_linear_kernel, signature, constexprs, aligned)
    return triton.compile(source, target, options(values, 1024 * SHARED_OF_ARCHITECTURE.get(target.arch, 99)))


def measure(job: tuple[str, Any, int]) -> dict[str, Any]:
    """Compiles one specialisation; what the toolkit says of its cubin."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    from genarm_kernels.backends.triton import launch

    name, spec, architecture = job
    target = GPUTarget("cuda", architecture, 32)
    if name == "shared_linear":
        compiled = compile_shared_linear(spec, target)
    else:
        compiled = launch.compile_kernel(getattr(launch, name), spec, target)
    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    # Triton allocates shared memory at launch, where cuobjdump does not see it.
    shared = compiled.metadata.shared
    most_shared = 1024 * SHARED_OF_ARCHITECTURE.get(architecture, 99) if name == "shared_linear" else MOST_SHARED
    fits = usage["REG"] <= MOST_REGISTERS[name] and shared <= most_shared
    return {
        "kernel": name,
        "arch": architecture,
        **spec._asdict(),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": shared,
        "ok": fits and usage["STACK"] == 0 and usage["LOCAL"] == 0,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every specialisation")
    parser.add_argument("--every", type=int, default=1, help="the first of each so many, to save time")
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None) == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    jobs = [
        (*job, architecture)
        for job in [*specialisations(options.all)][:: options.every]
        for architecture in options.arch
    ]
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(measure, jobs):
            print(json.dumps(result), flush=True)
            failed += not result["ok"]
    print(f"{len(jobs)} kernels, {failed} spill or take too much", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

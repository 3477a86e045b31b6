"""From tensors to kernel launches: specialisations, arguments, the workspace. No host synchronisation anywhere."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from ... import rng
from ...outputs import GuidedStep
from ...parameters import Inputs, Sampling
from . import interpreted
from .arguments import WEIGHTS
from .board import workspace_words
from .draw import row_pass
from .tile import tile_pass
from .whole import TILES_A_PROGRAM, whole_row_pass

INTERPRETED = interpreted()
if INTERPRETED:
    from .interpreter import mend

    mend()

_NO_DRAW = Sampling(top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, logprobs=False)
DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Specialisation(NamedTuple):
    """What is compiled apart. Everything else is read by the kernels when they run."""

    dtype: torch.dtype
    operands: int  # 1 + N
    logprobs: bool
    filtered: bool
    aligned: bool  # every row of every operand begins at a multiple of 16 bytes: loads are vectors


# How a program is compiled, for every B, V and N: the order of the sums, and so a draw at a boundary, would depend on
# them otherwise. (It does depend on `aligned` and `filtered`, in the last bits.) One warp for a tile, so that no sum
# crosses a barrier. A bound on registers that is above what is needed keeps ptxas from spilling for more programs on an
# SM. Not measured on a GPU yet (bench/results/README.md).
OPTIONS: dict[Any, dict[str, int]] = {
    tile_pass: {"num_warps": 1, "maxnreg": 200},
    row_pass: {"num_warps": 8, "maxnreg": 255},
    whole_row_pass: {"num_warps": 4, "maxnreg": 128},
}

_COMMON: dict[str, Any] = {
    "numbers": ("fp32", "fp32", "fp32", "i64", "i64", "i64"),
    "row_ptrs": ("*fp32", "*fp32", "*fp32", "*fp32", "*i64", "*i64", "*i64", "*fp32"),
    "row_strides": ("i64",) * 9,
    "given": "i32",
    "mask_ptr": "*i32",
    "mask_strides": ("i64", "i64"),
    "masked": "i32",
    "vocab": "i32",
    "workspace_ptr": "*fp32",
    "workspace_stride": "i64",
}
_OUTPUTS: dict[Any, dict[str, Any]] = {
    tile_pass: {},
    row_pass: {
        "token_ptr": "*i64",
        "logprob_ptr": "*fp32",
        "log_mass_ptr": "*fp32",
        "kept_ptr": "*i32",
        "base_logprob_ptr": "*fp32",
        "arm_logprobs_ptr": "*fp32",
        "status_ptr": "*i32",
        "logprobs": "i32",
    },
    whole_row_pass: {"logp_ptr": "*fp32", "width": "i32"},
}


def _constants(kernel: Any, spec: Specialisation) -> dict[str, Any]:
    values = {
        "OPERANDS": spec.operands,
        "LOGPROBS": spec.logprobs,
        "FILTERED": spec.filtered,
        "ALIGNED": spec.aligned,
    }
    return {name: values[name] for name in kernel.arg_names if name in values}


def compile_kernel(kernel: Any, spec: Specialisation, target: GPUTarget | None = None) -> Any:
    """The compiled kernel, from Triton's cache on disk if it is there; `target` None: the current GPU."""
    types = {
        "x_ptrs": (DTYPES[spec.dtype],) * spec.operands,
        "x_strides": ("i64",) * spec.operands,
        "weights": ("fp32",) * spec.operands,
        **_COMMON,
        **_OUTPUTS[kernel],
    }
    constants = _constants(kernel, spec)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in constants.items()}, {})
    options = OPTIONS[kernel]
    if kernel is tile_pass and spec.operands == 8:  # where ptxas spills two words under 200, as it does at 9 under 208
        options = {**options, "maxnreg": 208}
    return triton.compile(source, target, options)


@functools.cache
def _launcher(kernel: Any, spec: Specialisation, device: int) -> Callable[..., None]:
    """Takes the number of programs, the stream and the arguments but the constants."""
    compiled = compile_kernel(kernel, spec)
    run = compiled.run  # loads the binary
    function, metadata, constants = compiled.function, compiled.packed_metadata, _constants(kernel, spec).values()

    # As Triton's own launch path ends, without what precedes it there (types, cache key, hooks): 4 us in place of 15.
    def launch(programs: int, stream: int, args: tuple[Any, ...]) -> None:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *constants)

    return launch


# Kernels take addresses: Triton's launcher would look up every tensor's with the driver. The interpreter wants tensors.
_address: Callable[[Any], Any] = (lambda tensor: tensor) if INTERPRETED else Tensor.data_ptr


def guided_step(outputs: GuidedStep, inputs: Inputs, sampling: Sampling) -> None:
    """Two launches."""
    base, vocab, filtered = inputs.base_logits, inputs.vocab_size, sampling.filters(inputs.vocab_size)
    rows, tiles = base.shape[0], -(-vocab // rng.TILE)
    with torch.cuda.device(base.get_device()):  # nothing at -1, the CPU
        workspace = _workspace(base, rows * workspace_words(tiles, 1 + len(inputs.arm_logits), filtered))
        spec, args = _arguments(workspace, inputs, sampling, filtered)
        _launch(tile_pass, spec, base, rows * tiles, args)
        _launch(row_pass, spec, base, rows, (*args, *map(_address, outputs), int(sampling.logprobs)))


def guided_log_softmax(logp: Tensor, inputs: Inputs) -> None:
    """Two launches."""
    base, vocab = inputs.base_logits, inputs.vocab_size
    (rows, width), tiles = base.shape, -(-vocab // rng.TILE)
    parts = -(-width // (rng.TILE * TILES_A_PROGRAM.value))
    with torch.cuda.device(base.get_device()):
        workspace = _workspace(base, rows * workspace_words(tiles, 1 + len(inputs.arm_logits), False))
        spec, args = _arguments(workspace, inputs, _NO_DRAW, False)
        _launch(tile_pass, spec, base, rows * tiles, args)
        _launch(whole_row_pass, spec, base, rows * parts, (*args, _address(logp), width))


def _workspace(like: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """`words` float32, also as int64, for one call.

    From PyTorch's allocator, which keeps a cache for each stream. One of our own, held across calls, would save 2 us
    and break under CUDA graphs with private memory pools (torch.compile's among them) and for threads on one stream.
    """
    ints = like.new_empty((words + 1) // 2, dtype=torch.int64)
    return (ints.view(torch.float32) if INTERPRETED else ints), ints


def _launch(kernel: Any, spec: Specialisation, base: Tensor, programs: int, args: tuple[Any, ...]) -> None:
    """On the current stream of the tensor's device, which is the current one."""
    if INTERPRETED:
        kernel[(programs,)](*args, **_constants(kernel, spec))
        return
    device = base.get_device()
    _launcher(kernel, spec, device)(programs, driver.active.get_current_stream(device), args)


def _arguments(
    workspace: tuple[Tensor, Tensor], inputs: Inputs, sampling: Sampling, filtered: bool
) -> tuple[Specialisation, tuple[Any, ...]]:
    """What is compiled, and what every kernel takes."""
    base, vocab, token_mask, weights = inputs.base_logits, inputs.vocab_size, inputs.token_mask, inputs.weights
    operands = (base, *inputs.arm_logits)
    size = base.element_size()
    strides = tuple([x.stride(0) for x in operands])
    misaligned = 0
    for x, stride in zip(operands, strides, strict=True):
        misaligned |= x.data_ptr() | stride * size
    spec = Specialisation(base.dtype, len(operands), sampling.logprobs, filtered, misaligned % 16 == 0)
    words = workspace_words(-(-vocab // rng.TILE), len(operands), filtered)
    floats, unused_ints = map(_address, workspace)

    # A parameter that is not `given` is not read; its address only has the right type.
    given = 0
    pointers, row_strides = [floats] * 4 + [unused_ints] * 3 + [floats], [0] * 9
    numbers: list[float] = [0.0] * 4 + [0] * 3
    parameters = (  # in the order of the bits of `given` (arguments.py)
        inputs.base_weight,
        inputs.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.top_k,
        sampling.seed,
        sampling.position,
    )
    for i, value in enumerate(parameters):
        if isinstance(value, Tensor):
            given |= 1 << i
            pointers[i], row_strides[i] = _address(value), value.stride(0)
        else:
            numbers[i] = value
    if isinstance(weights, Tensor):
        given |= 1 << WEIGHTS.value
        pointers[7], row_strides[7:] = _address(weights), weights.stride()
        weights = [0.0] * len(inputs.arm_logits)
    return spec, (
        tuple(map(_address, operands)),
        strides,
        (numbers[0], *weights),
        tuple(numbers[1:]),
        tuple(pointers),
        tuple(row_strides),
        given,
        unused_ints if token_mask is None else _address(token_mask),
        (0, 0) if token_mask is None else token_mask.stride(),
        0 if token_mask is None else vocab,
        vocab,
        floats,
        words,
    )

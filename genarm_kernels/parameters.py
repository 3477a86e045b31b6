"""The operations' argument list, which stands here once: from the public functions, which check it, to the backends and
the C interface, whose structs (csrc/include/genarm_kernels.h) hold the same.

A parameter is a number for every row or a tensor with one value per row. An operator of torch has a type for neither
the structures nor such a parameter: its schema is flat, and a tensor has an argument `*_rows` of its own.
`schema`, `flatten` and `take` are the only places that know.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_type_hints

from torch import Tensor

T = TypeVar("T")

Floats: TypeAlias = float | Tensor
"""A number, or float32 `[B]`."""
Ints: TypeAlias = int | Tensor
"""A number, or int64 `[B]`."""
Weights: TypeAlias = list[float] | Tensor
"""N numbers, or float32 `[B, N]`."""


class Inputs(NamedTuple):
    """What every operation reads: the operands, and how they make z and p. The arguments of the public functions, with
    `base_logits` and `arm_logits` matrices of B rows, and `vocab_size` at most the width of each."""

    base_logits: Tensor
    arm_logits: list[Tensor]
    vocab_size: int
    weights: Weights
    base_weight: Floats
    temperature: Floats
    token_mask: Tensor | None


class Sampling(NamedTuple):
    """How tokens are drawn from p, and what is returned of them. A `seed` that is a number is that of row 0."""

    top_k: Ints
    top_p: Floats
    min_p: Floats
    seed: Ints
    position: Ints
    logprobs: bool

    def filters(self, vocab_size: int) -> bool:
        """Whether a row may have a filter on: one whose values are in a tensor counts as on."""
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        return (
            isinstance(top_k, Tensor)
            or 0 < top_k < vocab_size
            or isinstance(top_p, Tensor)
            or top_p < 1
            or isinstance(min_p, Tensor)
            or min_p > 0
        )


class WholeLayer(NamedTuple):
    """A linear layer of a base and of ARMs that are LoRA adapters of it, as one kernel takes it: bfloat16 or float16,
    contiguous."""

    weight: Tensor
    """`[out, in]`"""
    bias: Tensor | None
    """`[out]`"""
    down: Tensor
    """`[r, in]`, of all adapters one after the other, r up to 64."""
    up: Tensor
    """`[r, out]`, likewise."""
    owners: Tensor
    """`[r]` int32, an ARM's number, 1 and up."""
    operands: int
    """1 + N"""


class LayerPart(NamedTuple):
    """What one ARM adds to its rows of a layer: up (down x), or y[m] += sum over r of up[r] (down[r] . x[m])."""

    operand: int
    """The ARM's number, 1 and up: its rows are `operand`, `operand + operands`, ..."""
    down: Tensor
    """`[r, in]`; its dtype, which `up` shares, is that of the products."""
    up: Tensor
    """`[r, out]`"""


class SharedLayer(NamedTuple):
    """The same layer as it is made once, for every backend."""

    linear: Callable[[Tensor], Tensor]
    """x -> W x + bias, however the base keeps W."""
    parts: Sequence[LayerPart]
    operands: int
    """1 + N"""
    whole: WholeLayer | None
    """None where no kernel may take it: see `genarm_kernels.shared_linear.can_fuse`."""
    core: Callable[[Tensor], Tensor] | None = None
    """On a CPU, the whole as `genarm_kernels.backends.cpu.linear` makes it, or None."""


# A field's type: how the schema has it, and the number that stands beside a tensor.
_FLAT: dict[Any, tuple[str, Any]] = {
    Tensor: ("Tensor {0}", None),
    list[Tensor]: ("Tensor[] {0}", None),
    Tensor | None: ("Tensor? {0}", None),
    int: ("int {0}", None),
    bool: ("bool {0}", None),
    Floats: ("float {0}, Tensor? {0}_rows", 0.0),
    Ints: ("SymInt {0}, Tensor? {0}_rows", 0),
    Weights: ("float[] {0}, Tensor? {0}_rows", []),
}
# Of each structure: that number for its fields, None for those that are no parameters.
_BESIDE_ROWS: dict[Any, list[Any]] = {
    kind: [_FLAT[field][1] for field in get_type_hints(kind).values()] for kind in (Inputs, Sampling, WholeLayer)
}


def schema(*kinds: Any) -> str:
    """The arguments of an operator that takes the structures.

    >>> schema(Sampling)[:72]
    'SymInt top_k, Tensor? top_k_rows, float top_p, Tensor? top_p_rows, float'
    """
    return ", ".join(_FLAT[field][0].format(name) for kind in kinds for name, field in get_type_hints(kind).items())


def names(*kinds: Any) -> list[str]:
    """The names of those arguments.

    >>> names(Inputs)[:6]
    ['base_logits', 'arm_logits', 'vocab_size', 'weights', 'weights_rows', 'base_weight']
    """
    return [argument.split()[1] for argument in schema(*kinds).split(", ")]


def flatten(*structures: Inputs | Sampling | WholeLayer) -> list[Any]:
    """The structures' values as `schema` has them."""
    flat: list[Any] = []
    for structure in structures:
        for value, beside_rows in zip(structure, _BESIDE_ROWS[type(structure)], strict=True):
            if beside_rows is None:
                flat.append(value)
            else:
                flat += [beside_rows, value] if isinstance(value, Tensor) else [value, None]
    return flat


def take(kind: Callable[..., T], flat: Iterator[Any]) -> T:
    """The structure whose values come next."""
    return kind(*[_either(next(flat), flat, number) for number in _BESIDE_ROWS[kind]])


def _either(value: Any, flat: Iterator[Any], beside_rows: Any) -> Any:
    if beside_rows is None:
        return value
    rows = next(flat)
    return value if rows is None else rows

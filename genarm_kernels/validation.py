"""What a caller hands in, checked and brought to one form. Values inside tensors stay unread: that waits for a GPU."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import rng
from .backends import NAMES
from .calls import counting_denormals
from .parameters import Floats, Inputs, Ints, Sampling, Weights

OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_WEIGHT = "a number for each ARM (pass a tensor [B, N] for weights per row)"
ABOVE_ZERO = 2.0**-149  # the smallest float32: what is below would be rounded to 0


def inputs(
    *,
    base_logits: Tensor,
    arm_logits: Sequence[Tensor] | Tensor,
    weights: float | Sequence[float] | Tensor,
    base_weight: Floats,
    temperature: Floats,
    token_mask: Tensor | None,
    vocab_size: int | None,
    lowest_temperature: float = 0.0,
) -> Inputs:
    """The arguments that every operation has."""
    base, arms, vocab = _operands(base_logits, arm_logits, vocab_size)
    return Inputs(
        base_logits=base,
        arm_logits=arms,
        vocab_size=vocab,
        weights=_weights(weights, base, len(arms)),
        base_weight=_floats("base_weight", base_weight, base),
        temperature=_floats("temperature", temperature, base, lowest_temperature),
        token_mask=_token_mask(token_mask, base, vocab),
    )


def sampling(
    base: Tensor, *, top_k: Ints, top_p: Floats, min_p: Floats, seed: Ints, position: Ints, logprobs: bool
) -> Sampling:
    """The arguments of the operations that draw; `base`: the checked `base_logits`."""
    return Sampling(
        top_k=_ints("top_k", top_k, base),
        top_p=_floats("top_p", top_p, base, 0.0, 1.0),
        min_p=_floats("min_p", min_p, base, 0.0, 1.0),
        seed=_counters("seed", seed, base, per_row=True),
        position=_counters("position", position, base),
        logprobs=_flag("logprobs", logprobs),
    )


def _operands(base_logits: Any, arm_logits: Any, vocab_size: Any) -> tuple[Tensor, list[Tensor], int]:
    """The base, the ARMs and the vocabulary; ValueError or TypeError unless the logits fit each other."""
    rows, width = _logits("base_logits", base_logits)
    if isinstance(arm_logits, (list, tuple)):  # the usual cases first: a look at Sequence takes half a microsecond
        arms = list(arm_logits)
    elif isinstance(arm_logits, Tensor):
        if arm_logits.dim() != 3:
            raise ValueError(f"arm_logits: expected a sequence of [B, V] or one [N, B, V], got {_kind(arm_logits)}")
        arms = list(arm_logits.unbind(0))
    elif isinstance(arm_logits, Sequence) and not isinstance(arm_logits, str):
        arms = list(arm_logits)
    else:
        raise TypeError(f"arm_logits: expected a sequence of tensors or one tensor, got {_kind(arm_logits)}")
    base: Tensor = base_logits
    dtype, device, widths = base.dtype, base.device, [width]
    for i, arm in enumerate(arms):
        arm_rows, width = _logits("arm_logits", arm, i)
        if arm_rows != rows:
            raise ValueError(f"arm_logits[{i}]: expected {rows} rows as in base_logits, got {arm_rows}")
        if arm.dtype != dtype or arm.device != device:
            raise ValueError(f"arm_logits[{i}]: expected {dtype} on {device} as base_logits, got {_kind(arm)}")
        widths.append(width)

    narrowest = min(widths)
    if vocab_size is None:
        if max(widths) != narrowest:
            raise ValueError(f"vocab_size: operands of different width need it, got None for widths {widths}")
        return base, arms, narrowest
    vocab_size = _int("vocab_size", vocab_size)
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(f"vocab_size: expected 1 to {narrowest} (the narrowest operand), got {vocab_size}")
    return base, arms, vocab_size


def _weights(value: Any, base: Tensor, n_arms: int) -> Weights:
    """N numbers, or a float32 tensor `[B, N]`, from a float, N floats, or a tensor `[N]` or `[B, N]`."""
    if type(value) is float:
        return [_float("weights", value)] * n_arms
    rows = base.shape[0]
    if isinstance(value, Tensor):
        _parameter_tensor("weights", value, base, floating=True)
        if tuple(value.shape) not in ((), (n_arms,), (rows, n_arms)):
            raise ValueError(f"weights: expected a tensor [{n_arms}] or [{rows}, {n_arms}], got {_kind(value)}")
        return counting_denormals(value.detach().float).expand(rows, n_arms)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != n_arms:
            raise ValueError(f"weights: expected {_WEIGHT}, got {len(value)} for {n_arms} ARMs")
        return [_float(f"weights[{i}]", w, _WEIGHT) for i, w in enumerate(value)]
    return [_float("weights", value)] * n_arms


def _floats(name: str, value: Any, base: Tensor, low: float = -math.inf, high: float = math.inf) -> Floats:
    """A float parameter; a number must be finite and lie in [low, high]."""
    if isinstance(value, Tensor):
        return _rows(name, value, base, floating=True)
    value = _float(name, value)
    if not low <= value <= high:
        bounds = f"from {low:g} to {high:g}" if high < math.inf else "above 0" if low > 0 else f"at least {low:g}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")
    return value


def _ints(name: str, value: Any, base: Tensor) -> Ints:
    """An int parameter; a number is clamped to int64 (top_k: any int is a meaning)."""
    if isinstance(value, Tensor):
        return _rows(name, value, base, floating=False)
    value = _int(name, value)
    return value if -(2**63) <= value < 2**63 else (2**63 - 1 if value > 0 else -(2**63))


def _counters(name: str, value: Any, base: Tensor, per_row: bool = False) -> Ints:
    """A 64-bit parameter of the random numbers, wrapped to int64. `per_row`: a 0-dim tensor seeds every row anew."""
    if isinstance(value, Tensor):
        rows = _rows(name, value, base, floating=False)
        if per_row and value.dim() == 0:
            rows = rng.row_seeds(rows, base.shape[0], base.device)
        return rows
    return counter(name, value)


def counter(name: str, value: Any) -> int:
    """An int of 64 bits, with a sign or without, as an int64."""
    value = _int(name, value)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: expected an integer from -2^63 to 2^64 - 1, got {value}")
    return value if value < 2**63 else value - 2**64


def _token_mask(value: Any, base: Tensor, vocab_size: int) -> Tensor | None:
    """None, or the int32 bitmask `[B, W]` with W words enough for the vocabulary."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"token_mask: expected an int32 tensor or None, got {_kind(value)}")
    words = (vocab_size + 31) // 32
    rows = base.shape[0]
    if value.dtype != torch.int32 or value.dim() != 2 or value.shape[0] != rows or value.shape[1] < words:
        raise ValueError(
            f"token_mask: expected torch.int32 [{rows}, >= {words}], got {_kind(value)}; "
            "guided_step's docstring packs bools"
        )
    if value.device != base.device:
        raise ValueError(f"token_mask: expected it on {base.device} as base_logits, got {_kind(value)}")
    # An expanded mask has one word stride 0, which a kernel that walks over words does not know.
    return value if value.stride(1) != 0 or words == 1 else value.contiguous()


def backend(value: Any) -> str:
    """ "auto", or the name of a backend whether or not it can run here."""
    if not isinstance(value, str):
        raise TypeError(f"backend: expected a str, got {_kind(value)}")
    if value != "auto" and value not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    """A bool, and nothing that merely looks like one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {_kind(value)}")
    return value


def _logits(name: str, x: Any, index: int | None = None) -> tuple[int, int]:
    """The shape of an operand; `index`: where it stands in the sequence `name`."""
    if isinstance(x, Tensor):
        shape = x.shape
        if (
            len(shape) == 2
            and shape[1]
            and x.dtype in OPERAND_DTYPES
            and x.layout is torch.strided
            and (shape[1] == 1 or x.stride(1) == 1)
        ):
            return shape
    name = name if index is None else f"{name}[{index}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(x)}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [B, V] with V >= 1, got {_kind(x)}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}; call .to_dense()")
    if x.dtype not in OPERAND_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {_kind(x)}")
    raise ValueError(f"{name}: expected a contiguous last dimension, got strides {x.stride()}; call .contiguous()")


def _rows(name: str, value: Tensor, base: Tensor, floating: bool) -> Tensor:
    rows = base.shape[0]
    _parameter_tensor(name, value, base, floating)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
        raise ValueError(f"{name}: expected a number or a tensor of shape [{rows}], got {_kind(value)}")
    # Each operation left out is a microsecond of a call.
    value = value.detach() if value.requires_grad else value
    value = value if value.dim() else value.expand(rows)
    wanted = torch.float32 if floating else torch.int64
    return value if value.dtype is wanted else counting_denormals(value.to, wanted)


def _parameter_tensor(name: str, value: Tensor, base: Tensor, floating: bool) -> None:
    if not (value.is_floating_point() if floating else value.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"{name}: expected {'a floating type' if floating else 'int32 or int64'}, got {_kind(value)}")
    if value.device != base.device:
        raise ValueError(f"{name}: expected it on {base.device} as base_logits, got {_kind(value)}")


def _float(name: str, value: Any, expected: str = "a number or a tensor") -> float:
    if type(value) is float and -_MAX_FLOAT32 <= value <= _MAX_FLOAT32:  # the usual case, without ceremony
        return value
    # bool is an int to Python; as a weight or temperature it is a mistake. Real: NumPy's scalars.
    known: bool = isinstance(value, (float, int, Real)) and not isinstance(value, bool)
    if not known:
        raise TypeError(f"{name}: expected {expected}, got {_kind(value)}")
    if not -_MAX_FLOAT32 <= value <= _MAX_FLOAT32:  # before float(), which an int may be too large for
        raise ValueError(f"{name}: expected a finite float32 number, got {value}")
    return float(value)


def _int(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name}: expected an int or an integer tensor, got {_kind(value)}")
    return value if isinstance(value, int) else value.__index__()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float)) else type(value).__name__

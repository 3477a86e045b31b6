"""The CPU core (csrc/) as a backend: hands tensors' addresses to `_cpu` and makes the outputs."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812

from ..layers import Decoder, DecoderLayer, Linear
from ..outputs import GuidedStep
from ..parameters import Inputs, Sampling, SharedLayer
from . import compiled, reference

# Rows up to which a linear layer reads its weights at a rate that torch's products do not reach.
_FEW_ROWS = 16
# Tokens up to which a prompt goes through the core. Attention takes the square of them there, one at a time.
_PROMPT, _SHORT_PROMPT = 256, 32
# Weights that are widened at a time, 2 MiB of float32: they are still in the cache when they are multiplied.
_BLOCK = 1 << 19
_WEIGHT_TYPES = {**compiled.DTYPES, torch.int8: 3}
_ACTIVATIONS = ("silu", "gelu_tanh")
_NO_WINDOW = 2**62

_import_error: ImportError | None = None
try:
    from .. import _cpu
except ImportError as error:
    _import_error = error


def why_unavailable() -> str | None:
    """None when the core is there and runs on this machine, otherwise the reason in words."""
    if _import_error is not None:
        reason = Path(__file__).parents[1] / "_cpu.error"
        return reason.read_text().strip() if reason.exists() else f"the compiled core cannot be loaded: {_import_error}"
    if _cpu.isa() is None:
        return f"GENARM_CPU_ISA names none of what this machine runs: {', '.join(_cpu.supported_isas())}"
    return None


def instruction_set() -> str | None:
    """The fastest of "avx512", "avx2" and "portable" that this machine runs, or what GENARM_CPU_ISA names."""
    return _cpu.isa()


def guided_step(inputs: Inputs, sampling: Sampling) -> GuidedStep:
    return compiled.guided_step(_cpu.guided_step, torch.get_num_threads(), inputs, sampling)


def guided_log_softmax(inputs: Inputs) -> Tensor:
    return compiled.guided_log_softmax(_cpu.guided_log_softmax, torch.get_num_threads(), inputs)


def suits_shared_linear(x: Tensor) -> bool:
    """A CPU's, where no compiler would rather see PyTorch's own operators."""
    return x.is_cpu and not torch.compiler.is_compiling() and why_unavailable() is None


def shared_linear(x: Tensor, layer: SharedLayer) -> Tensor:
    if layer.core is not None and suits_few_rows(x):
        return layer.core(x)
    return reference.shared_linear(x, layer)


def suits_few_rows(x: Tensor) -> bool:
    """The rows of a step of decoding, which nothing but the core is to see."""
    return (
        x.numel() <= _FEW_ROWS * x.shape[-1]
        and x.dtype in compiled.DTYPES
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def linear(layer: Linear, operands: int = 1) -> Callable[[Tensor], Tensor] | None:
    """Calls of the layer by the core, on x `[R, T, in]` that suits; None where the layer is none for the core.

    Row m of x belongs to operand m % operands.
    """
    if why_unavailable() is not None or unsuited_linear(layer) is not None:
        return None
    # The core has the tensors' addresses: what calls it holds the tensors.
    core, held = _cpu.Linear(layer=_described(layer), operands=operands), layer
    height, width = layer.weight.shape

    def call(x: Tensor) -> Tensor:
        if x.shape[-1] != held.weight.shape[1]:
            raise ValueError(f"x: expected [..., {width}], got {list(x.shape)}")
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], height))
        tokens = x.shape[1] if x.dim() == 3 else 1
        core(
            dtype=compiled.DTYPES[x.dtype],
            x=x,
            rows=x.numel() // width,
            tokens=tokens,
            y=y,
            threads=torch.get_num_threads(),
        )
        return y

    return call


def many_rows_of(weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> scales * (W x) + bias for any number of rows, as fast as this machine makes matrix products."""
    if scales is None and (weight.dtype is torch.float32 or _multiplies(weight.dtype)):
        return partial(F.linear, weight=weight, bias=bias)
    return partial(many_rows, weight=weight, bias=bias, scales=scales)


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    """By float32's product, of a block of weights after the other: they are widened in the cache."""
    rows, height = x.flatten(0, -2).float(), len(weight)
    y = x.new_empty(len(rows), height)
    block = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, height, block):
        some = slice(begin, begin + block)
        part = rows @ weight[some].float().T
        if scales is not None:
            part *= scales[some]
        if bias is not None:
            part += bias[some]
        y[:, some] = part
    return y.view(*x.shape[:-1], height)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the machine has instructions for products in bfloat16 or float16, without which torch's take six times as
    long as float32's (oneDNN's own word; AVX2, torch 2.13).
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    ask = getattr(torch.ops.mkldnn, name, None) if name else None
    return dtype is not torch.int8 and (ask is None or bool(ask()))


def unsuited_linear(layer: Linear) -> str | None:
    """Why the core cannot take the layer, or None."""
    tensors = [layer.weight, layer.bias, layer.scales, *(x for part in layer.parts for x in (part.down, part.up))]
    if any(x is not None and not (type(x) in (Tensor, Parameter) and x.is_cpu and x.is_contiguous()) for x in tensors):
        return "its weights or adapters are not plain, contiguous and in a CPU's memory"
    if layer.weight.dtype not in _WEIGHT_TYPES:
        return f"its weights are {layer.weight.dtype}"
    if (layer.weight.dtype is torch.int8) != (layer.scales is not None):
        return "scales and int8 weights go together"
    if other := {x.dtype for x in tensors[1:] if x is not None} - {torch.float32}:
        return f"its bias, scales or adapters are {other.pop()}"
    height, width = layer.weight.shape
    fits = all(x is None or x.shape == (height,) for x in (layer.bias, layer.scales)) and all(
        part.down.shape == (len(part.up), width) and part.up.shape[1:] == (height,) for part in layer.parts
    )
    return None if fits else "its bias, scales or adapters do not fit its weights"


def unsuited_decoder(decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor]) -> str | None:
    """Why the core cannot run the model, or None."""
    if (reason := why_unavailable()) is not None:
        return reason
    linears = [decoder.head]
    for layer in decoder.layers:
        linears += [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
    if (reason := next((why for one in linears if (why := unsuited_linear(one))), None)) is not None:
        return f"a linear layer: {reason}"
    head_size = decoder.cos.shape[1]
    if head_size % 16 or decoder.heads % decoder.kv_heads:
        return f"its {decoder.heads} heads of {head_size}, {decoder.kv_heads} of keys, do not fit the core's vectors"
    if decoder.activation not in _ACTIVATIONS:
        return f"its activation is {decoder.activation!r}"
    norms = [x for one in decoder.layers for x in (one.attention_norm, one.q_norm, one.k_norm, one.mlp_norm) if x]
    floats = [decoder.cos, decoder.sin, decoder.norm.weight, *(norm.weight for norm in norms)]
    if not all(
        x.is_cpu and x.is_contiguous() and x.dtype in compiled.DTYPES for x in [*keys, *values, decoder.embedding]
    ):
        return "its embedding or caches are not contiguous floats in a CPU's memory"
    if not all(x.is_cpu and x.is_contiguous() and x.dtype is torch.float32 for x in floats):
        return "its norms or its rotary embedding are not contiguous float32 in a CPU's memory"
    return None if _fits(decoder, keys, values) else "its parts do not fit together"


def _fits(decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    (length, size), hidden = decoder.cos.shape, decoder.embedding.shape[1]
    wide, narrow = decoder.heads * size, decoder.kv_heads * size

    def layer_fits(layer: DecoderLayer) -> bool:
        inner = len(layer.gate.weight)
        return (
            # x is laid out once for each of these groups, in the order that the weights' type asks for.
            layer.q.weight.dtype == layer.k.weight.dtype == layer.v.weight.dtype
            and layer.gate.weight.dtype == layer.up.weight.dtype
            and layer.q.weight.shape == (wide, hidden)
            and layer.k.weight.shape == layer.v.weight.shape == (narrow, hidden)
            and layer.o.weight.shape == (hidden, wide)
            and layer.gate.weight.shape == layer.up.weight.shape == (inner, hidden)
            and layer.down.weight.shape == (hidden, inner)
            and all(norm.weight.shape == (hidden,) for norm in (layer.attention_norm, layer.mlp_norm))
            and all(norm is None or norm.weight.shape == (size,) for norm in (layer.q_norm, layer.k_norm))
        )

    caches = [*keys, *values]
    return (
        all(map(layer_fits, decoder.layers))
        and decoder.head.weight.shape[1:] == decoder.norm.weight.shape == (hidden,)
        and decoder.sin.shape == decoder.cos.shape
        and len({(x.shape, x.dtype) for x in caches}) <= 1
        and all(x.shape[1:] == (length, decoder.kv_heads, size) for x in caches)
        and (not caches or len(keys) == len(values) == len(decoder.layers))
    )


class DecoderStep:
    """See `genarm_kernels.decoder_step`; the model must suit."""

    def __init__(self, decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._tensors = (decoder, keys, values)  # the core has their addresses
        self._vocab_size = len(decoder.head.weight)
        self._dtype = decoder.head.weight.dtype
        self._step = _cpu.DecoderStep(
            decoder={
                "operands": decoder.operands,
                "hidden_size": decoder.embedding.shape[1],
                "heads": decoder.heads,
                "kv_heads": decoder.kv_heads,
                "head_size": decoder.cos.shape[1],
                "vocab_size": self._vocab_size,
                "embeddings": len(decoder.embedding),
                "length": keys[0].shape[1],
                "cache_type": compiled.DTYPES[keys[0].dtype],
                "embedding_type": _WEIGHT_TYPES[decoder.embedding.dtype],
                "embedding": decoder.embedding,
                "attention_scale": decoder.attention_scale,
                "activation": _ACTIVATIONS.index(decoder.activation),
                "cos": decoder.cos,
                "sin": decoder.sin,
                "norm": decoder.norm,
                "head": _described(decoder.head),
                "layers": [
                    {
                        **{name: _described(x) if isinstance(x, Linear) else x for name, x in layer._asdict().items()},
                        "keys": own_keys,
                        "values": own_values,
                        "window": layer.sliding_window or _NO_WINDOW,
                    }
                    for layer, own_keys, own_values in zip(decoder.layers, keys, values, strict=True)
                ],
            }
        )

    def prefills(self, length: int) -> bool:
        """Whether a prompt of so many tokens is best given to the core: torch's own product of float32, and of what the
        machine has instructions for, is as fast, but takes many more calls.
        """
        return length <= (_SHORT_PROMPT if _multiplies(self._dtype) else _PROMPT)

    def __call__(self, tokens: Tensor, lengths: Tensor, first: int = 0, last: bool = False) -> Tensor:
        """Feeds tokens `[rows, T]` to rows `first`, `first` + 1, ... of the caches, behind the `lengths` `[rows]` that
        they have: logits `[rows, T, V]`, or with `last` `[rows, 1, V]` after the last tokens alone.
        """
        rows, count = tokens.shape
        logits = torch.empty(rows, 1 if last else count, self._vocab_size, dtype=torch.float32, device="cpu")
        self._step(
            tokens=tokens.contiguous(),
            lengths=lengths.contiguous(),
            first=first,
            rows=rows,
            count=count,
            last=last,
            logits=logits,
            threads=torch.get_num_threads(),
        )
        return logits


def _described(layer: Linear) -> dict[str, Any]:
    height, width = layer.weight.shape
    return {
        "type": _WEIGHT_TYPES[layer.weight.dtype],
        "weight": layer.weight,
        "bias": layer.bias,
        "scales": layer.scales,
        "width": width,
        "height": height,
        "parts": [(part.operand, part.down, part.up, len(part.down)) for part in layer.parts],
    }

"""The layers of a model as a CPU's kernels take them: its own tensors, and what is said of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .parameters import LayerPart


class Linear(NamedTuple):
    """y = scales * (W x) + bias, and for an ARM its own up (down x) on top."""

    weight: Tensor
    """`[out, in]` float32, bfloat16, float16 or int8"""
    bias: Tensor | None = None
    """`[out]` float32"""
    scales: Tensor | None = None
    """`[out]` float32, where W is int8"""
    parts: Sequence[LayerPart] = ()
    """float32"""


class Norm(NamedTuple):
    """y = weight * x / sqrt(mean(x^2) + epsilon)"""

    weight: Tensor
    """float32"""
    epsilon: float


class DecoderLayer(NamedTuple):
    """x += o(attention(q(n), k(n), v(n))) with n = attention_norm(x); x += down(activation(gate(n)) * up(n)) with
    n = mlp_norm(x).
    """

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None
    """Of each head, before its rotary embedding."""
    k_norm: Norm | None
    mlp_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    sliding_window: int | None
    """Tokens that a query sees, itself included; None: all."""


class Decoder(NamedTuple):
    """A model by its parts: logits = head(norm(x)) of an x that begins as an embedding and goes through the layers."""

    embedding: Tensor
    """`[V, hidden]`"""
    layers: Sequence[DecoderLayer]
    norm: Norm
    head: Linear
    heads: int
    kv_heads: int
    cos: Tensor
    """Of the rotary embedding, by position: `[length, head_size]` float32."""
    sin: Tensor
    attention_scale: float
    activation: str = "silu"
    """"silu" or "gelu_tanh"."""
    operands: int = 1
    """1 + N: row m belongs to operand m % operands; 0 is the base, the others are ARMs (`Linear.parts`)."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 weights `[out, in]` and float32 scales `[out]` with weight ~ scales[:, None] * int8: the largest of a row is
    127.

    >>> quantize_int8(torch.tensor([[127.0, -1.0], [0.0, 0.0]]))
    (tensor([[127,  -1],
            [  0,   0]], dtype=torch.int8), tensor([1., 1.]))
    """
    weight = weight.detach().float()
    scales = weight.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight / scales[:, None]).round().to(torch.int8), scales

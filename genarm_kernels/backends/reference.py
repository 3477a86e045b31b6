"""The reference as a backend, and of layers what defines them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..layers import Decoder, DecoderLayer, Linear, Norm
from ..parameters import LayerPart, SharedLayer
from ..reference import guided_log_softmax as guided_log_softmax
from ..reference import guided_step as guided_step


def why_unavailable() -> None:
    """Plain PyTorch runs wherever PyTorch does."""


def shared_linear(x: Tensor, layer: SharedLayer) -> Tensor:
    y = layer.linear(x)
    for part in layer.parts:
        add_part(y, x, part, layer.operands)
    return y


def add_part(y: Tensor, x: Tensor, part: LayerPart, operands: int) -> None:
    """What an ARM adds to its rows of y, in place."""
    down, up, own = part.down, part.up, y[part.operand :: operands]
    # As matrices: of a strided batch, torch makes batched products, which cost four times as much on a CPU.
    inner = F.linear(x[part.operand :: operands].flatten(0, 1).to(down.dtype), down)
    if x.shape[1] == 1 and y.dtype == up.dtype:
        own.squeeze(1).addmm_(inner, up)
    else:
        own += torch.mm(inner, up).view(own.shape)


def decoder_step(
    decoder: Decoder,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tokens: Tensor,
    lengths: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`DecoderStep`'s call, in `dtype`."""
    places = lengths[:, None] + torch.arange(tokens.shape[1])
    rows = torch.arange(len(places))[:, None]
    cos, sin = (table[places].to(dtype)[:, :, None] for table in (decoder.cos, decoder.sin))

    def linear(layer: Linear, x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight.to(dtype))
        if layer.scales is not None:
            y = y * layer.scales.to(dtype)
        if layer.bias is not None:
            y = y + layer.bias.to(dtype)
        for part in layer.parts:
            own = slice(part.operand, None, decoder.operands)
            y[own] += x[own] @ part.down.to(dtype).T @ part.up.to(dtype)
        return y

    def normed(norm: Norm | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt() * norm.weight.to(dtype)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attention(layer: DecoderLayer, x: Tensor, cached: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            linear(one, x).unflatten(2, (heads, -1))
            for one, heads in ((layer.q, decoder.heads), (layer.k, decoder.kv_heads), (layer.v, decoder.kv_heads))
        )
        q, k = rotated(normed(layer.q_norm, q)), rotated(normed(layer.k_norm, k))
        for stored, new in zip(cached, (k, v), strict=True):
            stored[rows, places] = new.to(stored.dtype)
        k, v = (x[: len(places)].to(dtype).repeat_interleave(decoder.heads // decoder.kv_heads, 2) for x in cached)
        columns, own = torch.arange(k.shape[1]), places[:, None, :, None]
        seen = (columns <= own) & (columns > own - (layer.sliding_window or k.shape[1]))
        scores = torch.einsum("rthd,rchd->rhtc", q, k) * decoder.attention_scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        # What no token looks at may be anything, NaN too.
        return torch.einsum("rhtc,rchd->rthd", weights, v.nan_to_num()).flatten(2)

    x = decoder.embedding[tokens.repeat_interleave(decoder.operands, 0)].to(dtype)
    for layer, *cached in zip(decoder.layers, keys, values, strict=True):
        x = x + linear(layer.o, attention(layer, normed(layer.attention_norm, x), (cached[0], cached[1])))
        n = normed(layer.mlp_norm, x)
        gate = linear(layer.gate, n)
        active = F.silu(gate) if decoder.activation == "silu" else F.gelu(gate, approximate="tanh")
        x = x + linear(layer.down, active * linear(layer.up, n))
    return linear(decoder.head, normed(decoder.norm, x))

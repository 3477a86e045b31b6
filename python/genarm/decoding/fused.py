"""A model's step as one call of the CPU core, where it is made of what the core knows: Llama, Mistral, Qwen 2 and 3."""

from collections.abc import Sequence
from typing import Any

import torch

from genarm_kernels.backends import cpu
from genarm_kernels.layers import Decoder, DecoderLayer, Linear, Norm

from ..models import transformers_api
from .linears import SharedLinear, is_altered

_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def describe(model: Any, sliding_windows: Sequence[int | None]) -> Decoder | None:
    """A model whose linear layers are the core's (`replace_linears`), by its parts, with tables of no positions; None
    where it is none that is known, or was changed.
    """
    known = type(model).__name__ in _MODELS and type(model).__module__.startswith("transformers.models.")
    if not known or not transformers_api.rope(model).constant or any(map(is_altered, model.modules())):
        return None
    config, stack = model.config, model.model
    if config.hidden_act not in _ACTIVATIONS:
        return None

    def linear(layer: Any) -> Linear:
        if not isinstance(layer, SharedLinear) or layer.layer is None:
            raise _UnknownError
        return layer.layer

    def norm(layer: Any) -> Norm:
        return Norm(layer.weight.detach().float(), layer.variance_epsilon)

    def head_norm(attention: Any, name: str) -> Norm | None:
        return norm(getattr(attention, name)) if hasattr(attention, name) else None

    try:
        layers = [
            DecoderLayer(
                attention_norm=norm(layer.input_layernorm),
                **{name: linear(getattr(layer.self_attn, f"{name}_proj")) for name in ("q", "k", "v", "o")},
                q_norm=head_norm(layer.self_attn, "q_norm"),
                k_norm=head_norm(layer.self_attn, "k_norm"),
                mlp_norm=norm(layer.post_attention_layernorm),
                **{name: linear(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
                sliding_window=window,
            )
            for layer, window in zip(stack.layers, sliding_windows, strict=True)
        ]
        head = linear(model.lm_head)
    except _UnknownError:
        return None
    attention = stack.layers[0].self_attn
    nothing = torch.empty(0, attention.head_dim, dtype=torch.float32, device="cpu")
    decoder = Decoder(
        embedding=stack.embed_tokens.weight.detach(),
        layers=layers,
        norm=norm(stack.norm),
        head=head,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        cos=nothing,
        sin=nothing,
        attention_scale=attention.scaling,
        activation=_ACTIVATIONS[config.hidden_act],
    )
    return decoder if cpu.unsuited_decoder(decoder, [], []) is None else None


def with_positions(decoder: Decoder, model: Any, length: int, operands: int) -> Decoder:
    """For rows of so many operands, with the rotary embedding of the first `length` positions in float32, as the model
    computes it.
    """
    x = torch.zeros(1, dtype=torch.float32, device="cpu")
    cos, sin = model.model.rotary_emb(x, torch.arange(length, device="cpu")[None])
    return decoder._replace(cos=cos[0].float().contiguous(), sin=sin[0].float().contiguous(), operands=operands)


class _UnknownError(Exception):
    pass

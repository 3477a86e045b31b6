"""ARMs that are LoRA adapters of the base, as further rows of the base's own forward pass.

A row of the base and a row of each such ARM go through every layer together, so that each weight is read once for all
of them; an adapter's low-rank part is added to the rows of its ARM alone (`linears.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from genarm_kernels.validation import OPERAND_DTYPES

from ..models import loading
from .linears import LowRank, SharedLinear


def low_rank_parts(base: Any, arm: Any) -> dict[str, LowRank] | None:
    """By the name of a layer of `base`, what the ARM adds to it; None unless the ARM is a plain LoRA adapter, and all
    its other weights are the very weights of `base`, in the same places.
    """
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer, ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
    except ImportError:
        return None
    if not isinstance(arm, PeftModel):
        return None
    model = arm.get_base_model()
    parts: dict[str, LowRank] = {}
    own: set[int] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            return None
        if isinstance(layer, BaseTunerLayer):
            # A ParamWrapper adds to a parameter, which its module may use in any way, such as for each expert apart.
            if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper) or (part := _plain(layer)) is None:
                return None
            parts[name] = part
            own |= {id(x) for group in (layer.lora_A, layer.lora_B) for x in group.parameters()}
    others = {
        name.replace(".base_layer.", "."): id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in own
    }
    weights = {name: id(parameter) for name, parameter in base.named_parameters(remove_duplicate=False)}
    return parts if others == weights else None


def share(base: Any, arms: Sequence[dict[str, LowRank]], core: bool = True) -> Any:
    """A model whose batch is base, ARM 1, ..., ARM N, base, ARM 1, ..., over the weights of `base`."""
    model = loading.twin(base)
    for name in {name for parts in arms for name in parts}:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, SharedLinear(layer, [parts.get(name) for parts in arms], core))
    return model


def _plain(layer: Any) -> LowRank | None:
    """The one active adapter of a PEFT layer, if x -> scale * B A x is all that it adds."""
    if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or getattr(layer, "lora_variant", {}).get(name) is not None:
        return None
    a, b = layer.lora_A[name], layer.lora_B[name]
    if not all(type(x) is nn.Linear and x.bias is None for x in (a, b)):
        return None
    # On a CPU a small product in bfloat16 takes three times as long as in float32, where PEFT keeps adapters; on a GPU
    # the conversions would.
    dtype = torch.float32 if a.weight.device.type == "cpu" else layer.get_base_layer().weight.dtype
    if dtype not in OPERAND_DTYPES:  # quantised
        dtype = a.weight.dtype
    up = b.weight.detach().float() * layer.scaling[name]
    return LowRank(a.weight.detach().to(dtype).contiguous(), up.to(dtype).contiguous())

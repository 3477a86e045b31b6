"""Linear layers as the kernels take them, in place of a model's own: few rows at the rate of memory, and rows of LoRA
ARMs beside the base's.

    y[i] = W x[i] + scale_i B_i A_i x[i],   without the second part for the base
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genarm_kernels.backends import cpu
from genarm_kernels.layers import Linear, quantize_int8
from genarm_kernels.parameters import LayerPart, SharedLayer, WholeLayer
from genarm_kernels.shared_linear import can_fuse, shared_linear

from ..models import loading


class LowRank(NamedTuple):
    """What an adapter adds to one linear layer: x -> up (down x)."""

    down: Tensor
    """`[r, in]`."""
    up: Tensor
    """`[out, r]`, the adapter's scale in it."""


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 times a scale of each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self._dtype = linear.in_features, linear.out_features, linear.weight.dtype
        int8, scales = quantize_int8(linear.weight)
        self.int8 = nn.Parameter(int8, requires_grad=False)
        self.bias = linear.bias
        self.scales: Tensor
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """What they stand for, in the dtype of before: some models ask for that."""
        return (self.int8 * self.scales[:, None]).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cpu.many_rows(x, self.int8, self.bias, self.scales)


class SharedLinear(nn.Module):
    """A layer of a base, with what each ARM's adapter adds to it: None where that is nothing."""

    def __init__(self, linear: Any, parts: Sequence[LowRank | None] = (), core: bool = True) -> None:
        """`core`: by the CPU core, where it takes the layer."""
        super().__init__()
        self.linear = linear
        plain = type(linear) is nn.Linear and not is_altered(linear)
        given = {operand: part for operand, part in enumerate(parts, start=1) if part is not None}
        own: list[LayerPart] = []
        whole = None
        self.operands = 1 + len(parts)
        if given:
            ranks = [len(part.down) for part in given.values()]
            down = self._buffer("down", torch.cat([part.down for part in given.values()]))
            up = self._buffer("up", torch.cat([part.up.t() for part in given.values()]))
            own = [
                LayerPart(operand, self._buffer(f"down{operand}", own_down), self._buffer(f"up{operand}", own_up))
                for operand, own_down, own_up in zip(given, down.split(ranks), up.split(ranks), strict=True)
            ]
            if plain and can_fuse(linear.weight):
                owners = torch.tensor(list(given), dtype=torch.int32).repeat_interleave(torch.tensor(ranks))
                owners = self._buffer("owners", owners.to(down.device))
                whole = WholeLayer(linear.weight, linear.bias, down, up, owners, self.operands)
        self.layer: Linear | None = None
        """As the CPU core takes it."""
        # Out of the modules, whose calls and lookups a CPU feels at every layer of every step.
        call = linear.forward if plain else linear
        by_core = None
        int8 = type(linear) is Int8Linear
        if core and (int8 or (plain and linear.weight.is_cpu)):
            # An alias: should the model be moved, the core has an address that is still its own.
            weight = self._buffer("core_weight", (linear.int8 if int8 else linear.weight).detach())
            bias = None if linear.bias is None else self._buffer("core_bias", linear.bias.detach().float())
            self.layer = Linear(weight, bias, getattr(linear, "scales", None), own)
            by_core = cpu.linear(self.layer, self.operands)
            call = cpu.many_rows_of(linear.int8 if int8 else linear.weight, linear.bias, self.layer.scales)
        self._shared = SharedLayer(call, own, self.operands, whole, by_core)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """Which a twin shares."""
        self.register_buffer(name, tensor, persistent=False)
        return tensor

    @property
    def weight(self) -> Tensor:
        """What some models ask a layer for."""
        weight: Tensor = self.linear.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return shared_linear(x, self._shared)


def is_altered(module: Any) -> bool:
    """Whether somebody watches or changes what the module does."""
    return any((module._forward_hooks, module._forward_pre_hooks)) or "forward" in vars(module)


def replace_linears(model: Any) -> None:
    """Puts `SharedLinear` in the place of plain linear layers, in a tree of modules that the caller owns."""
    for parent in list(model.modules()):
        if not isinstance(parent, SharedLinear):
            for name, child in parent.named_children():
                if type(child) in (nn.Linear, Int8Linear) and not is_altered(child):
                    setattr(parent, name, SharedLinear(child))


def quantized(model: Any, done: dict[tuple[int, int], tuple[nn.Linear, Int8Linear]]) -> Any:
    """A twin of the model whose linear layers are int8. `done`: those made so far, by the identity of their weights and
    biases, so that an ARM which shares its base's layers shares these too.
    """
    twin = loading.twin(model)
    for parent in list(twin.modules()):
        if isinstance(parent, nn.ModuleDict):  # where PEFT keeps the layers of adapters
            continue
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                key = id(child.weight), id(child.bias)
                if key not in done:
                    done[key] = child, Int8Linear(child)
                setattr(parent, name, done[key][1])
    return twin

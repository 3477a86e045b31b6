"""The reference as a backend."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

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

"""The operators' library under `torch.ops.genarm_kernels`, and the way round torch's dispatcher."""

import torch
from torch import Tensor

from .parameters import Inputs, Sampling

LIBRARY = torch.library.Library("genarm_kernels", "DEF")
_NO_TENSORS = frozenset((float, int, bool, list, type(None)))


def is_unseen(inputs: Inputs, sampling: Sampling) -> bool:
    """Whether nothing is there to see an operator: no compiler, tracer, transform or dispatch mode, and no tensors but
    plain ones. The call then goes straight to the operator's implementation: by way of torch's dispatcher, with flat
    arguments, it takes 1.8 times as long (one row of 32 tokens, one ARM, the CPU core, torch 2.13; interleaved runs).
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not inputs.base_logits.is_meta
        and not [
            x
            for x in (*inputs, *inputs.arm_logits, *sampling)
            if type(x) not in _NO_TENSORS and (type(x) is not Tensor or x.is_neg())
        ]
    )

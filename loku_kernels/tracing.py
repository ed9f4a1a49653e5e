"""The two ways from a public function to a kernel, and the decision between them.

A function that computes on plain tensors calls its kernel from a ``torch.autograd.Function``. Under
``torch.compile``, ``torch.export``, a dispatch mode, a transform of ``torch.func`` or a tensor subclass it
calls a registered operator of ``torch.ops.loku_kernels`` instead. Those need an operator with a fake
implementation, and the operator costs some 100 us of processor time a call.
"""

import torch
from torch import Tensor


def traced(*tensors: Tensor | None) -> bool:
    """Say whether a computation must go through the registered operators.

    Args:
        tensors: The operands of the computation. None stands for an absent one.

    Returns:
        True while something traces or transforms the computation, or if an operand is of a subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(x) is not Tensor and x is not None and type(x) is not torch.nn.Parameter for x in tensors)
    )

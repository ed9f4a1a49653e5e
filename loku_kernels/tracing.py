"""The two ways from a public function to a kernel, and the decision between them.

A function that computes on plain tensors calls its kernel from a ``torch.autograd.Function``. Under
``torch.compile``, ``torch.export``, a dispatch mode, a transform of ``torch.func`` or a tensor subclass it
calls a registered operator of ``torch.ops.loku_kernels`` instead. Those need an operator with a fake
implementation, and the operator costs some 100 us of processor time a call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


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
        or torch._C._is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of a ``torch.autograd.Function`` refuse to be differentiated itself.

    It is torch's decorator of the same name, which is asked only where a graph of the backward is made.

    Args:
        backward: The backward. It builds no graph.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run

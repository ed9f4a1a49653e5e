"""The two ways from a public function to a kernel, and the decision between them.

A function that computes on plain tensors calls its kernel from a ``torch.autograd.Function``. Under
``torch.compile``, ``torch.export``, a dispatch mode, a transform of ``torch.func`` or a tensor subclass it
calls a registered operator of ``torch.ops.loku_kernels`` instead. Those need an operator with a fake
implementation. The operator takes more processor time a call than a small loss by the function.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # its modes are on no stack of dispatch modes

_number_of_modes = torch._C._len_torch_dispatch_stack
_is_transformed = torch._C._are_functorch_transforms_active
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def traced(*tensors: Tensor | None) -> bool:
    """Say whether a computation must go through the registered operators.

    Args:
        tensors: The operands of the computation. None stands for an absent one.

    Returns:
        True while something traces or transforms the computation, or if the memory of an operand does not
        hold its numbers: a subclass, or a lazy negation.
    """
    if (
        torch.compiler.is_compiling()
        or _number_of_modes() > 0
        or _is_transformed()
        or torch._C._is_tracing()
        or _is_included(_PRE_DISPATCH)
    ):
        return True
    for x in tensors:
        if type(x) not in _PLAIN or (x is not None and x.is_neg()):
            return True
    return False


def traced_gradient(grad: Tensor) -> bool:
    """Say whether a backward must go through the registered operators, though its forward did not.

    Args:
        grad: The gradient that the backward gets.

    Returns:
        True while something traces or transforms the backward, or if the gradient is of a subclass or is a
        batch of ``is_grads_batched``.
    """
    return (
        torch.compiler.is_compiling()
        or _number_of_modes() > 0
        or _is_transformed()
        or type(grad) is not Tensor
        or _is_batched(grad)
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of a ``torch.autograd.Function`` refuse to be differentiated itself.

    torch's decorator of the same name returns constants if the incoming gradients are constants. A penalty of
    the gradient would then silently not train. This one refuses there too.

    Args:
        backward: The backward. It builds no graph. Its result is a tuple.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _refuse(*(None if x is None else x.detach().requires_grad_() for x in results))

    return run


def _refuse(*results: Tensor | None) -> Any:
    """Return tensors whose backward raises ``RuntimeError``."""
    message = b"trying to differentiate twice a function that was marked with @once_differentiable"
    refuse: Any = torch._C._functions.DelayedError(message, len(results))
    return refuse(*results)

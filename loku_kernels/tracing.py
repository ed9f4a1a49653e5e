"""The two ways from a public function to a kernel, and the decision between them.

A function that computes on plain tensors calls its kernel from a ``torch.autograd.Function``. Under
``torch.compile``, ``torch.export``, a dispatch mode or a tensor subclass it calls a registered operator of
``torch.ops.loku_kernels`` instead. Those need an operator with a fake implementation. The operator takes more
processor time a call than a small loss by the function.

No kernel has a derivative in forward mode, a rule for ``torch.func`` or a second derivative. Where they are
asked for, plain torch computes (``plain.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # its modes are on no stack of dispatch modes

_number_of_modes = torch._C._len_torch_dispatch_stack
_is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_included = torch._C._dispatch_tls_is_dispatch_key_included


def is_batched(grad: Tensor) -> bool:
    """Say whether a gradient is a batch of ``is_grads_batched``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(grad))


def transformed() -> bool:
    """Say whether plain torch must compute: in a transform of ``torch.func``, or in forward mode.

    A registered operator would lose the tangents of forward mode without a word.
    """
    return _is_transformed() or forward_ad._current_level >= 0


def wants_graph() -> bool:
    """Say whether the running backward is differentiated, by ``create_graph=True`` or in forward mode."""
    again = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return again and not torch.compiler.is_compiling()


def check_not_transformed(name: str) -> None:
    """Check that nothing asks for derivatives of a function that has none.

    Args:
        name: The name of the function, for the message.

    Raises:
        RuntimeError: A transform of ``torch.func`` or forward mode is active.
    """
    if transformed():
        raise RuntimeError(
            f"{name} has no derivatives and does not run in a transform of torch.func or in forward mode: "
            "call it outside"
        )


def traced(*tensors: Tensor | None) -> bool:
    """Say whether a computation must leave the thin way.

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
        or forward_ad._current_level >= 0
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
        or is_batched(grad)
    )


def refused_results(message: str, results: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Any:
    """Make the results of a backward refuse to be differentiated.

    torch's ``once_differentiable`` returns constants if the incoming gradients are constants. A penalty of
    the gradient would then silently not train. These results lead to the inputs.

    Args:
        message: The message of the ``RuntimeError``.
        results: The gradients, or None. They have no graph.
        inputs: The tensors of the forward that require a gradient, and the gradient that the backward got.

    Returns:
        The results, with a graph whose backward raises.
    """
    refuse: Any = torch._C._functions.DelayedError(message.encode(), len(results) + len(inputs))
    return refuse(*results, *inputs)[: len(results)]

"""Squared per-sample gradients of a linear layer's weight, streamed: the empirical Fisher's diagonal."""

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.backends import choose
from loku_kernels.tracing import check_not_transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@custom_op("loku_kernels::accumulate_squared_grad_", mutates_args=("fisher",))
def _accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    backend = choose("accumulate_squared_grad_", inputs, fisher)
    backend.accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor)


@_accumulate_squared_grad_.register_fake
def _(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None) -> None:
    return None


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None = None
) -> Tensor:
    """Add the squared per-sample gradients of a linear layer's weight to ``fisher``, in place (LoKU, Eq. 2).

    G_n = grad_outputs[n].T @ inputs[n] is the gradient of sample n, summed over its tokens. The result
    equals::

        grads = torch.einsum("ntd,ntk->ndk", grad_outputs.float(), inputs.float())
        if divisor is None:
            fisher += grads.square().sum(0)
        else:
            fisher += (grads.square() / divisor).sum((0, 2))

    The tensor (n, d, k) never exists: the function needs a few MiB of extra memory. Tokens with zero
    ``grad_outputs`` (padding) add nothing. The grouping of samples into calls changes the result by rounding
    only.

    bfloat16 operands are multiplied in bfloat16 if the hardware has instructions for it. This halves the
    work. The sum over tokens is then in float32. G_n may then be rounded once to bfloat16, without bias and
    by at most 2^-8 of an entry.

    Args:
        fisher: The sums (d, k), or (d,) with a ``divisor``. float32, or float64 for exact sums. The caller
            divides by the number of samples to get a mean.
        inputs: The layer's inputs (n, T, k), float32, bfloat16, float16 or float64. Products and sums are in
            the dtype of ``fisher``, apart from bfloat16 as above.
        grad_outputs: The gradients (n, T, d) of each sample's own loss in the layer's output, in the dtype of
            ``inputs``.
        divisor: The divisor (d, k) of the squares, in the dtype of ``fisher``, or None (default).

    Returns:
        ``fisher``.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together, or ``fisher`` is an expanded tensor.
        RuntimeError: A transform of ``torch.func`` or forward mode is active.
    """
    check_not_transformed("accumulate_squared_grad_")
    if inputs.dim() != 3 or grad_outputs.dim() != 3 or inputs.shape[:2] != grad_outputs.shape[:2]:
        raise ValueError(
            "inputs and grad_outputs must have shapes (n, T, k) and (n, T, d), "
            f"got {tuple(inputs.shape)} and {tuple(grad_outputs.shape)}"
        )
    if inputs.dtype not in DTYPES or inputs.dtype != grad_outputs.dtype:
        raise ValueError(
            "inputs and grad_outputs must have one dtype, float32, bfloat16, float16 or float64, "
            f"got {inputs.dtype} and {grad_outputs.dtype}"
        )
    weight_shape = (grad_outputs.shape[2], inputs.shape[2])
    expected = weight_shape if divisor is None else weight_shape[:1]
    if tuple(fisher.shape) != expected or fisher.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"fisher must be float32 or float64 of shape {expected}, got {fisher.dtype} {tuple(fisher.shape)}"
        )
    if divisor is not None and (tuple(divisor.shape) != weight_shape or divisor.dtype != fisher.dtype):
        raise ValueError(
            f"divisor must be {fisher.dtype} of shape {weight_shape}, "
            f"got {divisor.dtype} {tuple(divisor.shape)}"
        )
    repeated = any(
        size > 1 and stride == 0 for size, stride in zip(fisher.shape, fisher.stride(), strict=True)
    )
    if repeated and fisher.numel() > 0:
        raise ValueError("fisher is added to in place and must have its own memory, got an expanded tensor")
    for name, tensor in (("grad_outputs", grad_outputs), ("fisher", fisher), ("divisor", divisor)):
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(f"{name} must be on the device of inputs, {inputs.device}, got {tensor.device}")
    _accumulate_squared_grad_(fisher, inputs.detach(), grad_outputs.detach(), divisor)
    return fisher

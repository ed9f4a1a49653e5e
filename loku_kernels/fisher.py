"""Squared per-sample gradients of a linear layer's weight, streamed: the empirical Fisher's diagonal."""

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.backends import choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@custom_op("loku_kernels::accumulate_squared_grad_", mutates_args=("fisher",))
def _accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    backend = choose("accumulate_squared_grad_", inputs, fisher)
    backend.accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor)


@_accumulate_squared_grad_.register_fake
def _(fisher, inputs, grad_outputs, divisor):
    return None


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None = None
) -> Tensor:
    """Add the squared per-sample gradients of a linear layer's weight to ``fisher``, in place (LoKU, Eq. 2).

    With G_n = grad_outputs[n].T @ inputs[n], the gradient of sample n summed over its tokens, the same as::

        grads = torch.einsum("ntd,ntk->ndk", grad_outputs.float(), inputs.float())
        if divisor is None:
            fisher += grads.square().sum(0)
        else:
            fisher += (grads.square() / divisor).sum((0, 2))

    without the (n, d, k) tensor: extra memory is a few MiB. Tokens whose grad_outputs are zero (padding) add
    nothing, and how samples are grouped into calls changes nothing beyond rounding.

    Args:
        fisher: (d, k), or (d,) with ``divisor``; float32 (float64 to be exact). For a mean, divide by the
            number of samples at the end.
        inputs: (n, T, k), what the layer got. float32, bfloat16, float16 or float64. Products and sums are in
            the dtype of ``fisher``; but bfloat16 is multiplied as it is where the hardware can, which is half
            the work: the sum over tokens is in float32, and G_n is then rounded once (without bias, by 2^-8
            of an entry at most).
        grad_outputs: (n, T, d), gradient of each sample's own loss in the layer's output, same dtype.
        divisor: (d, k), dtype of ``fisher``.

    Returns:
        ``fisher``.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
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

"""Squared per-sample gradients of a linear layer's weight, streamed: the empirical Fisher's diagonal."""

import torch
from torch import Tensor
from torch.library import custom_op

TILE_BYTES = 1 << 20  # of one sample's gradient, and of the Fisher it goes to: both stay in the cache
TOKEN_BYTES = 2 << 20  # of inputs that are in float32 at a time, where they come in less
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@custom_op("loku_kernels::accumulate_squared_grad_", mutates_args=("fisher",))
def _accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    n, tokens, k = inputs.shape
    d = grad_outputs.shape[2]
    if 0 in (n, tokens, k, d):
        return
    rows = min(d, max(1, TILE_BYTES // (4 * k)))
    span = max(1, TOKEN_BYTES // (4 * k))
    scratch = torch.empty(rows, k, dtype=fisher.dtype, device=fisher.device)
    # Rows outside, samples inside: a tile of the Fisher is read and written once a call.
    for begin in range(0, d, rows):
        tile = fisher[begin : begin + rows]
        grad = scratch[: tile.shape[0]]
        for x, delta in zip(inputs, grad_outputs[:, :, begin : begin + rows], strict=True):
            for first in range(0, tokens, span):
                x_part, delta_part = (y[first : first + span].to(grad.dtype) for y in (x, delta))
                torch.addmm(grad, delta_part.t(), x_part, beta=1.0 if first else 0.0, out=grad)
            if divisor is None:
                tile.addcmul_(grad, grad)
            else:
                tile += grad.square_().div_(divisor[begin : begin + rows]).sum(1)


@_accumulate_squared_grad_.register_fake
def _(fisher, inputs, grad_outputs, divisor):
    return None


def accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor=None):
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
        inputs: (n, T, k), what the layer got. float32, bfloat16, float16 or float64; products and sums are
            in the dtype of ``fisher``.
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
    for name, tensor in (("grad_outputs", grad_outputs), ("fisher", fisher), ("divisor", divisor)):
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(f"{name} must be on the device of inputs, {inputs.device}, got {tensor.device}")
    _accumulate_squared_grad_(fisher, inputs.detach(), grad_outputs.detach(), divisor)
    return fisher

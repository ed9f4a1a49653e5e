"""Plain torch for the squared per-sample gradients of a linear layer, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 6 << 20  # bytes of a tile of one sample's gradient and of the scratch memory for its square
TILE_COLUMNS = 1024  # columns of a tile, at most
TOKEN_BYTES = 1 << 20  # bytes of inputs converted to the dtype of the product, at a time


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device has instructions for bfloat16 products. They are slow without.

    Args:
        device: The device.

    Returns:
        True for CUDA, and for a CPU with AVX512-BF16 or AMX-BF16.
    """
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda"


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """Add the squared per-sample gradients of a linear layer's weight to ``fisher``, in place.

    Args:
        fisher: The sums (d, k), or (d,) with a divisor. float32 or float64.
        inputs: The layer's inputs (n, T, k). bfloat16 stays bfloat16 in the products if
            ``multiplies_bfloat16`` holds for the device.
        grad_outputs: The gradients (n, T, d) of the layer's output, in the dtype of the inputs.
        divisor: The divisor (d, k) of the squares, in the dtype of ``fisher``, or None.
    """
    narrow = inputs.dtype == torch.bfloat16 and multiplies_bfloat16(inputs.device)
    dtype = torch.bfloat16 if narrow else fisher.dtype
    accumulate_by_products_(fisher, inputs, grad_outputs, divisor, dtype, _add_squares)


def _add_squares(total: Tensor, product: Tensor, scratch: Tensor) -> None:
    """Add the squares of a product in a narrower dtype to ``total``, in place."""
    total.addcmul_(scratch.copy_(product), scratch)


def _even_part(size: int, limit: int) -> int:
    """Divide ``size`` into the fewest nearly equal parts of at most ``limit``. Return the largest part."""
    parts = -(-size // max(1, limit))
    return -(-size // parts)


def accumulate_by_products_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    divisor: Tensor | None,
    product_dtype: torch.dtype,
    add_squares: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Add squared per-sample gradients by the library's matrix products, one tile of the Fisher at a time.

    Args:
        fisher: The sums (d, k), or (d,) with a divisor. float32 or float64.
        inputs: The layer's inputs (n, T, k).
        grad_outputs: The gradients (n, T, d) of the layer's output, in the dtype of the inputs.
        divisor: The divisor (d, k) of the squares, in the dtype of ``fisher``, or None.
        product_dtype: The dtype of the products, which is that of ``fisher`` or bfloat16. A bfloat16 product
            is a float32 sum over the tokens that is rounded once.
        add_squares: A function (total, product, scratch) for products in bfloat16. It adds their squares to
            ``total``. It may overwrite ``scratch``, which has the shape and dtype of ``total``.
    """
    n, tokens, k = inputs.shape
    d, dtype = grad_outputs.shape[2], fisher.dtype
    if 0 in (n, tokens, k, d):
        return
    rounded = product_dtype != dtype
    entry_bytes = dtype.itemsize * (1 if divisor is None else 2) + (product_dtype.itemsize if rounded else 0)
    columns = _even_part(k, min(TILE_COLUMNS, TILE_BYTES // entry_bytes))
    rows = _even_part(d, TILE_BYTES // (entry_bytes * columns))
    span = tokens
    if inputs.dtype != product_dtype:
        span = max(1, TOKEN_BYTES // (product_dtype.itemsize * (rows + columns)))

    def scratch_of(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows * columns, dtype=dtype, device=fisher.device)

    square_scratch = scratch_of(dtype)
    product_scratch = scratch_of(product_dtype) if rounded else square_scratch
    sum_scratch = None if divisor is None else scratch_of(dtype)
    # The loop over samples is inside the loop over tiles, so that a call reads each tile of the Fisher, and
    # of the divisor, once.
    for top in range(0, d, rows):
        height = slice(top, top + rows)
        for left in range(0, k, columns):
            width = slice(left, left + columns)
            shape = (min(rows, d - top), min(columns, k - left))
            scratch, product = (
                x[: shape[0] * shape[1]].view(shape) for x in (square_scratch, product_scratch)
            )
            if sum_scratch is None:
                total = fisher[height, width]
            else:
                total = sum_scratch[: shape[0] * shape[1]].view(shape).zero_()
            for x, delta in zip(inputs[:, :, width], grad_outputs[:, :, height], strict=True):
                for begin in range(0, tokens, span):
                    part = slice(begin, begin + span)
                    x_part, delta_part = x[part].to(product_dtype), delta[part].to(product_dtype)
                    if begin:
                        product.addmm_(delta_part.t(), x_part)
                    else:
                        torch.mm(delta_part.t(), x_part, out=product)
                if rounded:
                    add_squares(total, product, scratch)
                else:
                    total.addcmul_(product, product)
            if divisor is not None:
                fisher[height] += total.div_(divisor[height, width]).sum(1)

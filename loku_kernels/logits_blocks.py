"""Blocks of the logits of an output embedding: their sizes, their products, and the loop over them.

A linear operator never holds the logits (N, V) whole. ``LogitsBlocks`` computes one block of rows and columns
at a time. All blocks use the same memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # bytes of logits that a linear operator holds at a time
# The limit is larger on CUDA, so that a row has one block of columns, or few. Each block rescales the sums of
# the rows, N x D entries, and adds to them. This moves 20 bytes an entry, a large part of the time beside a
# GPU's fast products.
CUDA_BLOCK_BYTES = 256 << 20
BLOCK_ROWS = 1024  # with fewer rows, reading the weight takes longer than the products

Slices = tuple[list[slice], list[slice]]


def _even_slices(size: int, limit: int) -> list[slice]:
    """Cut range(size) into the fewest slices of at most ``limit``, all nearly equal."""
    parts = -(-size // max(1, limit))
    bounds = [size * i // max(1, parts) for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _block_bytes(device_type: str) -> int:
    return CUDA_BLOCK_BYTES if device_type == "cuda" else BLOCK_BYTES


def block_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """Cut logits into blocks of at most ``BLOCK_ROWS`` rows and ``BLOCK_BYTES`` bytes.

    Args:
        count: The number of rows.
        vocab: The number of columns.
        itemsize: The size of an entry, in bytes.
        device_type: The type of the device. ``"cuda"`` has the limit ``CUDA_BLOCK_BYTES``.

    Returns:
        The slices of the rows and the slices of the columns.
    """
    rows = _even_slices(count, BLOCK_ROWS)
    most = max((part.stop - part.start for part in rows), default=1)
    return rows, _even_slices(vocab, _block_bytes(device_type) // (most * itemsize))


def whole_row_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """Cut logits into blocks of whole rows. Arguments and result are those of ``block_slices``."""
    return _even_slices(count, _block_bytes(device_type) // (vocab * itemsize)), [slice(0, vocab)]


@functools.cache
def _multiplies_into_float32(device: torch.device) -> bool:
    """Say whether the library multiplies 16-bit operands into an unrounded float32 sum. cuBLAS does."""
    if device.type != "cuda":
        return False
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def product_dtype(operand: Tensor) -> torch.dtype:
    """Choose the dtype of a linear operator's products.

    Args:
        operand: An operand of the products.

    Returns:
        float32 for 16-bit operands if the library can multiply into it, else the dtype of ``operand``.
    """
    if operand.dtype.itemsize == 2 and _multiplies_into_float32(operand.device):
        return torch.float32
    return operand.dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


class LogitsBlocks:
    """Computes blocks of the logits of hidden states (N, D). All blocks use the same memory.

    Args:
        hidden: The hidden states (N, D), float32, bfloat16, float16 or float64.
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        bias: The bias (V,) of the output embedding, in the dtype of ``hidden``, or None.
        softcap: The softcap of the logits. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.
        slices: The slices of the rows and the slices of the columns. Default: those of ``block_slices``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        logit_scale: float,
        slices: Slices | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.logit_scale = softcap, logit_scale
        self.dtype = product_dtype(hidden)
        self.rows, self.columns = slices or block_slices(
            len(hidden), len(weight), self.dtype.itemsize, hidden.device.type
        )
        size = max((math.prod(self._shape(r, c)) for r in self.rows for c in self.columns), default=0)
        self.memory = hidden.new_empty(size, dtype=self.dtype)

    @functools.cached_property
    def _terms_memory(self) -> Tensor:
        return self.hidden.new_empty(len(self.memory))

    def _shape(self, rows: slice, columns: slice) -> tuple[int, int]:
        return rows.stop - rows.start, columns.stop - columns.start

    def compute(self, rows: slice, columns: slice) -> Tensor:
        """Compute the logits of a block. With a softcap, compute their tanh, which is logits / softcap.

        Args:
            rows: A slice of the rows.
            columns: A slice of the columns.

        Returns:
            The block (rows, columns), in ``product_dtype``. The next call overwrites it.
        """
        shape = self._shape(rows, columns)
        block = self.memory[: math.prod(shape)].view(shape)
        weight = self.weight[columns].t()
        if self.bias is not None and self.dtype == weight.dtype:
            torch.addmm(self.bias[columns], self.hidden[rows], weight, out=block)
        else:
            _product(self.hidden[rows], weight, self.dtype, out=block)
            if self.bias is not None:
                block += self.bias[columns]
        if self.softcap:
            block.mul_(self.logit_scale / self.softcap).tanh_()
        elif self.logit_scale != 1.0:
            block.mul_(self.logit_scale)
        return block

    def terms_of(self, block: Tensor) -> Tensor:
        """Return memory for the terms of a block, the operand of the next product.

        Args:
            block: A block that ``compute`` has returned.

        Returns:
            A tensor of the shape of the block, in the dtype of the operands. It is the block itself if the
            dtypes are the same.
        """
        if block.dtype == self.hidden.dtype:
            return block
        return self._terms_memory[: block.numel()].view(block.shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``total``, in place.

    A product for a total of a wider dtype is rounded once to the dtype of the operands, unless the library
    multiplies into float32.

    Args:
        total: The sums (M, N), in the dtype of the operands or a wider one.
        a: The left operand (M, K).
        b: The right operand (K, N), in the dtype of ``a``.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, product_dtype(a))


def weight_gradient(
    logits: LogitsBlocks, gradient: Callable[[slice, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the weight and of the bias from those of the logits.

    Args:
        logits: The blocks of the logits.
        gradient: A function of a slice of the rows and a slice of the columns. It returns the gradient of
            h W^T + b in that block.

    Returns:
        The gradient (V, D) of the weight and the gradient (V,) of the bias, in the dtype of the weight.
    """
    weight = logits.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device)
    # The products of several blocks of rows are summed in the wide dtype and rounded once.
    one_product = len(logits.rows) == 1
    for columns in logits.columns if logits.rows else ():
        target = grad_weight[columns]
        total = target if one_product else target.to(dtype)
        for rows in logits.rows:
            block = gradient(rows, columns)
            if one_product:
                torch.mm(block.t(), logits.hidden[rows], out=target)
            else:
                add_product(total, block.t(), logits.hidden[rows])
            if logits.bias is not None:
                grad_bias[columns] += block.sum(0, dtype=dtype)
        if not one_product:
            target.copy_(total)
    return grad_weight, grad_bias.to(weight.dtype)

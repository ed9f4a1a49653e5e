"""Blocks of the logits of an output embedding: their sizes, their products, and the loop over them.

A linear operator never holds the logits (N, V) whole. ``LogitsBlocks`` computes one block of rows and columns
at a time, each in the memory of the one before.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # bytes of logits that a linear operator holds at a time
# On CUDA there is one block of all columns, or there are few. Between two blocks the sums of each row are
# rescaled and added to: 20 bytes for each of the N D entries, which is much beside a product of that speed.
CUDA_BLOCK_BYTES = 256 << 20
BLOCK_ROWS = 1024  # with fewer rows, reading the weight would take longer than the products

Slices = tuple[list[slice], list[slice]]


def _even_slices(size: int, limit: int) -> list[slice]:
    """Slices of range(size), nearly equal, of at most ``limit`` each."""
    parts = -(-size // max(1, limit))
    bounds = [size * i // max(1, parts) for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _block_bytes(device_type: str) -> int:
    return CUDA_BLOCK_BYTES if device_type == "cuda" else BLOCK_BYTES


def block_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """Slices of the rows and of the columns of (count, vocab) logits of ``itemsize`` bytes each."""
    rows = _even_slices(count, BLOCK_ROWS)
    most = max((part.stop - part.start for part in rows), default=1)
    return rows, _even_slices(vocab, _block_bytes(device_type) // (most * itemsize))


def whole_row_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """The slices of blocks that have all columns."""
    return _even_slices(count, _block_bytes(device_type) // (vocab * itemsize)), [slice(0, vocab)]


@functools.cache
def _multiplies_into_float32(device: torch.device) -> bool:
    """Whether the library multiplies 16-bit operands into float32 without rounding the sum: cuBLAS does."""
    if device.type != "cuda":
        return False
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype of a linear operator's products: float32 of 16-bit operands where the library can."""
    if operand.dtype.itemsize == 2 and _multiplies_into_float32(operand.device):
        return torch.float32
    return operand.dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


class LogitsBlocks:
    """Computes blocks of the logits of some hidden states (N, D), each in the memory of the one before.

    Args:
        hidden: The hidden states (N, D).
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        bias: Its bias (V,), in the same dtype, or None.
        softcap: The softcap of the logits, 0 for none.
        logit_scale: The factor of the logits before the softcap.
        slices: Slices of the rows and of the columns, by default those of ``block_slices``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        logit_scale: float,
        slices: Slices | None = None,
    ):
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
        """The logits of a block, or their tanh where there is a softcap."""
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
        """Memory for the terms of a block, in the dtype of the operands; the block itself if it has that."""
        if block.dtype == self.hidden.dtype:
            return block
        return self._terms_memory[: block.numel()].view(block.shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may have a wider dtype than the operands.

    Each product is then rounded once to the dtype of the operands, unless the library multiplies into the
    total's.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, product_dtype(a))


def weight_gradient(
    logits: LogitsBlocks, gradient: Callable[[slice, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (V, D) and of the bias (V,), in the dtype of the weight.

    Args:
        logits: The blocks.
        gradient: A function (rows, columns) that returns the gradient of h W^T + b in that block.
    """
    weight = logits.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device)
    one_product = len(logits.rows) == 1  # a block of columns has one; the sum of several is rounded once
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

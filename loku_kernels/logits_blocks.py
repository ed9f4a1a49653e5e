"""Blocks of the logits of an output embedding: their sizes, their products, and the loop over them.

A linear operator never holds the logits (N, V) whole. ``LogitsBlocks`` computes one block of rows and columns
at a time. All blocks use the same memory.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # bytes of logits that a linear operator holds at a time on a CPU, in its caches
CUDA_BLOCK_BYTES = 256 << 20  # the same on other devices, where a block has whole rows
# A product of fewer rows waits for the weight. One of more rows is no faster.
BLOCK_ROWS = 1024
CUDA_BLOCK_ROWS = 2048

Slices = tuple[list[slice], list[slice]]


def _even_slices(size: int, limit: int) -> list[slice]:
    """Cut range(size) into the fewest slices of at most ``limit``, all nearly equal."""
    if 0 < size <= limit:
        return [slice(0, size)]
    parts = -(-size // max(1, limit))
    bounds = [size * i // max(1, parts) for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _block_bytes(device_type: str) -> int:
    """Return the limit of a block: ``LOKU_BLOCK_MIB``, or the device's default."""
    asked = os.environ.get("LOKU_BLOCK_MIB", "")
    if not asked:
        return BLOCK_BYTES if device_type == "cpu" else CUDA_BLOCK_BYTES
    if not asked.isdecimal() or int(asked) == 0:
        raise ValueError(f"LOKU_BLOCK_MIB must be a positive whole number of MiB, got {asked!r}")
    return int(asked) << 20


def block_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """Cut logits into blocks of at most ``BLOCK_ROWS`` rows and ``BLOCK_BYTES`` bytes.

    Args:
        count: The number of rows.
        vocab: The number of columns.
        itemsize: The size of an entry, in bytes.
        device_type: The type of the device. ``"cpu"`` (default) has smaller blocks than all others.

    Returns:
        The slices of the rows and the slices of the columns.
    """
    rows = _even_slices(count, BLOCK_ROWS if device_type == "cpu" else CUDA_BLOCK_ROWS)
    most = max((part.stop - part.start for part in rows), default=1)
    return rows, _even_slices(vocab, _block_bytes(device_type) // (most * itemsize))


def whole_row_slices(count: int, vocab: int, itemsize: int, device_type: str = "cpu") -> Slices:
    """Cut logits into blocks of whole rows. Arguments and result are those of ``block_slices``."""
    limit = _block_bytes(device_type) // (vocab * itemsize)
    return _even_slices(count, min(limit, CUDA_BLOCK_ROWS)), [slice(0, vocab)]


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
    """Choose the dtype of a product whose sum should not be rounded to 16 bits.

    Args:
        operand: An operand of the product.

    Returns:
        float32 for 16-bit operands if the library can multiply into it, else the dtype of ``operand``.
    """
    if operand.dtype.itemsize == 2 and _multiplies_into_float32(operand.device):
        return torch.float32
    return operand.dtype


class LogitsBlocks:
    """Computes blocks of the logits of hidden states (N, D). Several blocks use the same memory.

    Args:
        hidden: The hidden states (N, D), float32, bfloat16, float16 or float64.
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        bias: The bias (V,) of the output embedding, in the dtype of ``hidden``, or None.
        softcap: The softcap of the logits. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.
        slices: The slices of the rows and the slices of the columns. Default: those of ``block_slices`` on a
            CPU and of ``whole_row_slices`` on other devices.
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
        count, vocab = hidden.shape[0], weight.shape[0]
        device = "cpu" if hidden.is_cpu else hidden.device.type
        cut = block_slices if device == "cpu" else whole_row_slices
        self.rows, self.columns = slices or cut(count, vocab, hidden.dtype.itemsize, device)
        self.memory = None  # a single block has none of its own
        if len(self.rows) * len(self.columns) > 1:
            self.memory = hidden.new_empty(max(map(_length, self.rows)) * max(map(_length, self.columns)))

    def compute(self, rows: slice, columns: slice) -> Tensor:
        """Compute the logits of a block. With a softcap, compute their tanh, which is logits / softcap.

        Args:
            rows: A slice of the rows.
            columns: A slice of the columns.

        Returns:
            The block (rows, columns), in the dtype of the operands. The next call overwrites it.
        """
        block = None
        if self.memory is not None:
            height, width = _length(rows), _length(columns)
            block = self.memory[: height * width].view(height, width)
        hidden, weight = part_of(self.hidden, rows), part_of(self.weight, columns)
        bias = None if self.bias is None else part_of(self.bias, columns)
        return logits_of(hidden, weight, bias, self.softcap, self.logit_scale, out=block)


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Compute logits. With a softcap, compute their tanh, which is logits / softcap.

    Args:
        hidden: The hidden states (n, D).
        weight: The words' rows (C, D) of the output embedding.
        bias: The words' biases (C,), or None.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.
        out: The tensor (n, C) for the result. Default: a new one.

    Returns:
        The logits (n, C), in the dtype of the operands.
    """
    scale = logit_scale / softcap if softcap else logit_scale
    if bias is not None:
        logits = torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    elif scale != 1.0:  # beta = 0 ignores the first argument's numbers
        first = hidden.new_empty(1, 1) if out is None else out
        logits = torch.addmm(first, hidden, weight.t(), beta=0, alpha=scale, out=out)
    else:
        logits = torch.mm(hidden, weight.t(), out=out)
    return logits.tanh_() if softcap else logits


def fits_one_block(hidden: Tensor, weight: Tensor) -> bool:
    """Say whether the logits of hidden states (N, D) and an output embedding (V, D) are one block.

    Args:
        hidden: The hidden states.
        weight: The output embedding.
    """
    count, entries, cpu = hidden.shape[0], hidden.shape[0] * weight.shape[0], hidden.is_cpu
    limit = _block_bytes("cpu" if cpu else hidden.device.type)
    return 0 < count <= (BLOCK_ROWS if cpu else CUDA_BLOCK_ROWS) and entries * hidden.itemsize <= limit


def part_of(tensor: Tensor, part: slice) -> Tensor:
    """Return a slice of a tensor's first dimension, which is the tensor itself if the slice is whole.

    Args:
        tensor: The tensor (N, ...).
        part: A slice of range(N).
    """
    return tensor if _length(part) == tensor.shape[0] else tensor[part]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


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
        dtype = product_dtype(a)
        total += torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


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
    device_type = logits.weight.device.type
    if torch.is_autocast_enabled(device_type):  # a backward under autocast multiplies what the forward has
        with torch.autocast(device_type, enabled=False):
            return weight_gradient(logits, gradient)
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

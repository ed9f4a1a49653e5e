"""Squared per-sample gradients of a linear layer's weight, Triton kernel: one fused GEMM a call.

A program owns a tile of the Fisher and walks all tokens of all samples. One set of accumulators holds the
product of the current sample. At a sample's last tokens its squares are added to a second set. So no sample's
gradient leaves the chip, and the tile is read and written once. The loop over samples and the loop over
tokens are one loop. So the loads for the next sample can start during the last product of a sample.

float16 and bfloat16 products are exact and summed in float32. float32 is multiplied in float32, or in TF32 if
torch may use it (``torch.backends.cuda.matmul.fp32_precision``, or ``allow_tf32``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton.triplet import on_device

GROUP = 8  # rows of tiles that run together, so that the L2 cache serves their operands


def tile_of(dtype: torch.dtype, tf32: bool) -> dict[str, int]:
    """Choose the tile of the Fisher, the tokens at a time, the warps and the pipeline stages.

    Two sets of accumulators are in registers, so the tile is half as large as that of a plain GEMM. float32
    products without tensor cores also hold their operands in registers.

    Args:
        dtype: The dtype of the operands.
        tf32: Whether float32 operands are multiplied in TF32.

    Returns:
        The constants and options of the launch.
    """
    if dtype != torch.float32:
        return {"BLOCK_D": 128, "BLOCK_K": 128, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3}
    if tf32:
        return {"BLOCK_D": 128, "BLOCK_K": 128, "BLOCK_T": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_D": 64, "BLOCK_K": 64, "BLOCK_T": 16, "num_warps": 4, "num_stages": 3}


# Floors for d = k = 4096 and 16 samples of 128 tokens in bfloat16: 6.9e10 operations, 0.13 GB of Fisher and
# 0.03 GB of operands. Tiles of 128 x 128 read each operand 32 times, in all 1.1 GB, mostly from the L2 cache.
# Measured on one H200: 0.40 ms, where the weight-gradient GEMM alone takes 0.096 ms
# (benchmarks/results/gpu_h200.json).


# The numbers of samples and tokens vary from batch to batch, so the kernel does not specialise on them.
@triton.jit(do_not_specialize=["samples", "tokens"])
def squared_grad_kernel(
    inputs,
    inputs_sample_stride,
    inputs_token_stride,
    grad_outputs,
    grad_sample_stride,
    grad_token_stride,
    fisher,
    fisher_stride,
    divisor,
    divisor_stride,
    partial,
    samples,
    tokens,
    d,
    k,
    DIVIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add the sum over n of G_n^2 to fisher (d, k), with G_n = grad_outputs[n]^T inputs[n].

    The operands are inputs (n, T, k) and grad_outputs (n, T, d). With DIVIDE the sum is divided by divisor
    (d, k) and summed over each tile's columns. It then goes to partial (tiles of k, d) instead.
    """
    row_tiles, column_tiles = tl.cdiv(d, BLOCK_D), tl.cdiv(k, BLOCK_K)
    group_of = tl.program_id(0) // (GROUP * column_tiles)
    within = tl.program_id(0) % (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group_of * GROUP, GROUP)
    row_tile = group_of * GROUP + within % group_rows
    column_tile = within // group_rows

    t = tl.arange(0, BLOCK_T)
    token = t.to(tl.int64)[:, None]  # tokens may lie far apart
    row = row_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    column = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    x_tile = inputs + token * inputs_token_stride + column[None, :]
    delta_tile = grad_outputs + token * grad_token_stride + row[None, :]

    steps = tl.cdiv(tokens, BLOCK_T)
    product = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    sample = tl.full((), 0, tl.int32)
    first_token = tl.full((), 0, tl.int32)
    for _ in range(samples * steps):
        x_offset = sample.to(tl.int64) * inputs_sample_stride + first_token.to(tl.int64) * inputs_token_stride
        delta_offset = sample.to(tl.int64) * grad_sample_stride + first_token.to(tl.int64) * grad_token_stride
        real = (first_token + t < tokens)[:, None]
        x = tl.load(x_tile + x_offset, mask=real & (column < k)[None, :], other=0.0)
        delta = tl.load(delta_tile + delta_offset, mask=real & (row < d)[None, :], other=0.0)
        product = tl.dot(tl.trans(delta), x, product, input_precision=PRECISION)
        first_token += BLOCK_T
        if first_token >= tokens:
            total += product * product
            product = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
            first_token = tl.full((), 0, tl.int32)
            sample += 1

    inside = (row < d)[:, None] & (column < k)[None, :]
    rows = row.to(tl.int64)[:, None]
    if DIVIDE:
        weights = tl.load(divisor + rows * divisor_stride + column[None, :], mask=inside, other=1.0)
        sums = tl.sum(tl.where(inside, total / weights, 0.0), 1)
        tl.store(partial + column_tile * d + row, sums, mask=row < d)
    else:
        tile = fisher + rows * fisher_stride + column[None, :]
        tl.store(tile, tl.load(tile, mask=inside) + total, mask=inside)


def _precision(dtype: torch.dtype) -> str:
    """Return "tf32" for float32 operands if torch may use TF32, else "ieee"."""
    # Reading the older attribute, allow_tf32, raises if somebody has set the newer one.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    tf32 = dtype == torch.float32 and allowed
    return "tf32" if tf32 else "ieee"


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """See ``reference.accumulate_squared_grad_``. The sums are float32.

    With a divisor, tiles leave their row sums in a scratch tensor, and torch adds those up. Unlike atomic
    additions this has the same order every time.
    """
    if 0 in (*inputs.shape, *grad_outputs.shape):
        return
    inputs, grad_outputs = (x if x.stride(2) == 1 else x.contiguous() for x in (inputs, grad_outputs))
    samples, tokens, k = inputs.shape
    d = grad_outputs.shape[2]
    precision = _precision(inputs.dtype)
    tile = tile_of(inputs.dtype, precision == "tf32")
    row_tiles, column_tiles = -(-d // tile["BLOCK_D"]), -(-k // tile["BLOCK_K"])
    partial = None
    if divisor is None:
        target = fisher if fisher.stride(1) == 1 else fisher.contiguous()
    else:
        target = fisher
        divisor = divisor if divisor.stride(1) == 1 else divisor.contiguous()
        partial = torch.empty(column_tiles, d, dtype=torch.float32, device=fisher.device)
    with on_device(inputs.device):
        squared_grad_kernel[(row_tiles * column_tiles,)](
            inputs,
            inputs.stride(0),
            inputs.stride(1),
            grad_outputs,
            grad_outputs.stride(0),
            grad_outputs.stride(1),
            target,
            target.stride(0),
            divisor,
            0 if divisor is None else divisor.stride(0),
            partial,
            samples,
            tokens,
            d,
            k,
            DIVIDE=divisor is not None,
            PRECISION=precision,
            GROUP=GROUP,
            **tile,
        )
    if partial is not None:
        fisher += partial.sum(0)
    elif target is not fisher:
        fisher.copy_(target)

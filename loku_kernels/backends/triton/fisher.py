"""Squared per-sample gradients of a linear layer's weight, Triton kernel: one fused GEMM a call.

A program owns a tile of the Fisher and walks all tokens of all samples. One set of accumulators holds the
product of the current sample. At a sample's last tokens its squares are added to a second set. So no sample's
gradient leaves the chip, and the tile is read and written once.

Tensor descriptors (TMA) read 16-bit operands on GPUs of compute capability 9 and 10, if base and strides are
multiples of 16 bytes. Plain loads read all other operands. Both ways load the next tokens during a product.

float16 and bfloat16 products are exact and summed in float32. float32 is multiplied in float32, or in TF32 if
torch may use it (``torch.backends.cuda.matmul.fp32_precision``, or ``allow_tf32``).
"""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP = 8  # rows of tiles that run together, so that the L2 cache serves their operands

# A described sample of few tokens is multiplied without a loop over its tokens, so that its accumulators need
# no clearing. A line has the most tokens, STEPS, BLOCK_T, TAIL and the pipeline stages: the sample takes
# STEPS steps of BLOCK_T tokens and a step of TAIL tokens. A half-empty step costs as much as a full one, so
# 200 tokens take 208 and not 256. Each line is compiled for itself, so there are few. A stage takes 512 bytes
# of shared memory a token, of 227 KiB.
WHOLE_SAMPLES = (
    (32, 1, 32, 0, 4),
    (64, 1, 64, 0, 4),
    (96, 1, 64, 32, 4),
    (128, 1, 128, 0, 3),
    (160, 2, 64, 32, 2),
    (192, 3, 64, 0, 2),
    (208, 3, 64, 16, 2),
)


@functools.cache
def launch_options(dtype: torch.dtype, precision: str, tokens: int, whole: int) -> dict[str, int]:
    """Choose the tile of the Fisher, the tokens at a time, the warps and the pipeline stages.

    Two sets of accumulators are in registers, so the tile is half as large as that of a plain GEMM. float32
    products without tensor cores also hold their operands in registers.

    Args:
        dtype: The dtype of the operands.
        precision: "tf32" if float32 operands are multiplied in TF32, else "ieee".
        tokens: The number of tokens of a sample.
        whole: The most tokens of a sample without a loop over them, or 0 if no descriptors read the operands.

    Returns:
        The constants and options of the launch. ``STEPS`` is 0 for a loop over the tokens of a sample.
    """
    tile = {"BLOCK_D": 128, "BLOCK_K": 128, "STEPS": 0, "TAIL": 0, "num_warps": 8, "num_stages": 3}
    if dtype == torch.float32 and precision != "tf32":
        return tile | {"BLOCK_D": 64, "BLOCK_K": 64, "BLOCK_T": 16, "num_warps": 4}
    if dtype == torch.float32:
        return tile | {"BLOCK_T": 32}
    if not whole:
        # Half the step, if that leaves out an eighth of the products.
        return tile | {"BLOCK_T": 32 if 8 * (-(-tokens // 32)) <= 14 * (-(-tokens // 64)) else 64}
    for most, steps, block_t, tail, stages in WHOLE_SAMPLES:
        if tokens <= most <= whole:
            return tile | {"BLOCK_T": block_t, "STEPS": steps, "TAIL": tail, "num_stages": stages}
    return tile | {"BLOCK_T": 64, "num_stages": 4}


# Floors for d = k = 4096 and 16 samples of 128 tokens in bfloat16: 6.9e10 operations, 0.13 GB of Fisher and
# 0.03 GB of operands. Tiles of 128 x 128 read each operand 32 times, in all 1.1 GB, mostly from the L2 cache.
# An H200 takes 0.096 ms for the weight-gradient GEMM alone. There the previous kernel, whose loads waited for
# each product, took 0.40 ms (benchmarks/results/gpu_h200.json). This kernel has not been measured.


# The numbers of samples and tokens vary from batch to batch, so the kernel does not specialise on them.
@triton.jit(do_not_specialize=["samples", "tokens"])
def squared_grad_kernel(
    inputs,
    inputs_tail,
    inputs_sample_stride,
    inputs_token_stride,
    grad_outputs,
    grad_outputs_tail,
    grad_sample_stride,
    grad_token_stride,
    matrix,
    matrix_stride,
    partial,
    samples,
    tokens,
    d,
    k,
    DESCRIBED: tl.constexpr,
    DIVIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Add the sum over n of G_n^2 to matrix (d, k), with G_n = grad_outputs[n]^T inputs[n].

    The operands are inputs (n, T, k) and grad_outputs (n, T, d). They are pointers and strides, or
    descriptors with DESCRIBED. The descriptors have blocks (1, BLOCK_T, BLOCK_K) and (1, BLOCK_T, BLOCK_D).
    Those of the tail have TAIL tokens in place of BLOCK_T. With DIVIDE the sum is divided by matrix and
    summed over each tile's columns. It then goes to partial (tiles of k, d) instead.
    """
    row_tiles, column_tiles = tl.cdiv(d, BLOCK_D), tl.cdiv(k, BLOCK_K)
    group_of = tl.program_id(0) // (GROUP * column_tiles)
    within = tl.program_id(0) % (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group_of * GROUP, GROUP)
    row_tile = group_of * GROUP + within % group_rows
    column_tile = within // group_rows
    first_row, first_column = row_tile * BLOCK_D, column_tile * BLOCK_K
    row = first_row + tl.arange(0, BLOCK_D)
    column = first_column + tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    if STEPS:
        # Descriptors read zeros past the last token.
        for sample in range(samples):
            product = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
            for step in tl.static_range(STEPS):
                x = inputs.load([sample, step * BLOCK_T, first_column]).reshape(BLOCK_T, BLOCK_K)
                delta = grad_outputs.load([sample, step * BLOCK_T, first_row]).reshape(BLOCK_T, BLOCK_D)
                product = tl.dot(tl.trans(delta), x, product)
            if TAIL:
                x = inputs_tail.load([sample, STEPS * BLOCK_T, first_column]).reshape(TAIL, BLOCK_K)
                delta = grad_outputs_tail.load([sample, STEPS * BLOCK_T, first_row]).reshape(TAIL, BLOCK_D)
                product = tl.dot(tl.trans(delta), x, product)
            total += product * product
    else:
        # The steps of all samples are one loop, so that a sample's first loads start during the last product
        # of the sample before. The branch below holds nothing that an address depends on. Else the next loads
        # would wait for the product.
        t = tl.arange(0, BLOCK_T)
        token = t.to(tl.int64)  # tokens may lie far apart
        if not DESCRIBED:
            x_tile = inputs + token[:, None] * inputs_token_stride + column[None, :]
            # Loaded transposed, as the product takes it, for loads that go to shared memory on every GPU.
            delta_tile = grad_outputs + token[None, :] * grad_token_stride + row[:, None]
        product = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
        sample = tl.full((), 0, tl.int32)
        first_token = tl.full((), 0, tl.int32)
        for _ in range(samples * tl.cdiv(tokens, BLOCK_T)):
            if DESCRIBED:
                x = inputs.load([sample, first_token, first_column]).reshape(BLOCK_T, BLOCK_K)
                delta = grad_outputs.load([sample, first_token, first_row]).reshape(BLOCK_T, BLOCK_D)
                delta = tl.trans(delta)
            else:
                sample_wide, first_wide = sample.to(tl.int64), first_token.to(tl.int64)
                x_offset = sample_wide * inputs_sample_stride + first_wide * inputs_token_stride
                delta_offset = sample_wide * grad_sample_stride + first_wide * grad_token_stride
                real = first_token + t < tokens
                x = tl.load(x_tile + x_offset, mask=real[:, None] & (column < k)[None, :], other=0.0)
                delta = tl.load(delta_tile + delta_offset, mask=real[None, :] & (row < d)[:, None], other=0.0)
            product = tl.dot(delta, x, product, input_precision=PRECISION)
            last = first_token + BLOCK_T >= tokens
            first_token = tl.where(last, 0, first_token + BLOCK_T)
            sample += last.to(tl.int32)
            if last:
                total += product * product
                product = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)

    inside = (row < d)[:, None] & (column < k)[None, :]
    tile = matrix + row.to(tl.int64)[:, None] * matrix_stride + column[None, :]
    if DIVIDE:
        weights = tl.load(tile, mask=inside, other=1.0)
        sums = tl.sum(tl.where(inside, total / weights, 0.0), 1)
        tl.store(partial + column_tile.to(tl.int64) * d + row, sums, mask=row < d)
    elif DESCRIBED:
        # No program waits for its additions. Each entry is added to once, so the result is always the same.
        tl.atomic_add(tile, total, mask=inside, sem="relaxed")
    else:
        tl.store(tile, tl.load(tile, mask=inside) + total, mask=inside)


def _precision(dtype: torch.dtype) -> str:
    """Return "tf32" for float32 operands if torch may use TF32, else "ieee"."""
    # Reading the older attribute, allow_tf32, raises if somebody has set the newer one.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    tf32 = dtype == torch.float32 and allowed
    return "tf32" if tf32 else "ieee"


@functools.cache
def _longest_whole_sample(device: torch.device) -> int:
    """Count the most tokens of a sample without a loop over them. 0 for a GPU that plain loads serve.

    The stages need 227 KiB of shared memory, which GPUs of capability 9 and 10 have. On capability 10 some
    versions of Triton leave a sample of several products without a second stage.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return {9: 208, 10: 128}.get(torch.cuda.get_device_capability(device)[0], 0)


def _describable(x: Tensor) -> bool:
    """Say whether a descriptor can read x (n, T, features), whose features are contiguous."""
    if x.element_size() != 2 or x.data_ptr() % 16:
        return False
    samples, tokens, _ = x.shape
    sample_stride, token_stride, _ = x.stride()
    # Strides are whole vectors of 16 bytes, below 2^40 bytes. A dimension of length 1 may have any stride.
    return (samples == 1 or (sample_stride % 8 == 0 and 0 < sample_stride < 2**39)) and (
        tokens == 1 or (token_stride % 8 == 0 and 0 < token_stride < 2**39)
    )


def _describe(x: Tensor, tokens: int, features: int) -> TensorDescriptor | None:
    """Describe blocks (1, tokens, features) of x (n, T, features of x), or return None for no tokens."""
    if not tokens:
        return None
    samples, length, width = x.shape
    unused = -(-width // 8) * 8
    strides = [x.stride(0) if samples > 1 else unused, x.stride(1) if length > 1 else unused, 1]
    return TensorDescriptor(x, [samples, length, width], strides, [1, tokens, features])


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """See ``reference.accumulate_squared_grad_``. The sums are float32.

    With a divisor, tiles leave their row sums in a scratch tensor, and torch adds those up. Unlike atomic
    additions of several programs this has the same order every time. Where descriptors read the operands, an
    entry of the Fisher below 1.2e-38 may become 0: additions in memory do not keep subnormal numbers.
    """
    if 0 in (*inputs.shape, *grad_outputs.shape):
        return
    inputs, grad_outputs = (x if x.stride(2) == 1 else x.contiguous() for x in (inputs, grad_outputs))
    samples, tokens, k = inputs.shape
    d = grad_outputs.shape[2]
    device = inputs.device
    whole = _longest_whole_sample(device)
    if whole and not (_describable(inputs) and _describable(grad_outputs)):
        whole = 0
    precision = _precision(inputs.dtype)
    options = launch_options(inputs.dtype, precision, tokens, whole)
    block_d, block_k = options["BLOCK_D"], options["BLOCK_K"]
    row_tiles, column_tiles = -(-d // block_d), -(-k // block_k)

    matrix = fisher if divisor is None else divisor
    whole_rows = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    partial = None
    if divisor is not None:
        partial = torch.empty(column_tiles, d, dtype=torch.float32, device=device)
    operands: list[Any] = []
    for x, block in ((inputs, block_k), (grad_outputs, block_d)):
        if whole:
            step, tail = (_describe(x, length, block) for length in (options["BLOCK_T"], options["TAIL"]))
            operands += [step, tail, None, None]
        else:
            operands += [x, None, x.stride(0), x.stride(1)]
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        squared_grad_kernel[(row_tiles * column_tiles,)](
            *operands,
            whole_rows,
            whole_rows.stride(0),
            partial,
            samples,
            tokens,
            d,
            k,
            DESCRIBED=whole > 0,
            DIVIDE=divisor is not None,
            PRECISION=precision,
            GROUP=GROUP,
            **options,
        )
    if partial is not None:
        fisher += partial.sum(0)
    elif whole_rows is not fisher:
        fisher.copy_(whole_rows)

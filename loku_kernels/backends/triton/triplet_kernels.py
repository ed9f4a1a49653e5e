"""Softmax triplet, Triton kernels: forward, backward, the fused in-place kernel, columns and scaling.

A program takes a row, or one of several parts of it. The reduction of a row and the gradient of its entries
are in ``rows.py``, the launches in ``triplet.py``. Before each kernel are its floors: the bytes that it must
move and the instructions that it takes. The measured times are from one H200, in
benchmarks/results/gpu_h200.json. There a copy of 8192 x 128256 bfloat16 logits takes 0.98 ms.
"""

import triton
import triton.language as tl

from loku_kernels.backends.triton.rows import (
    MINUS_INFINITY,
    NO_COLUMN,
    assert_label,
    edge_columns,
    exact_logit,
    inverted_hinge_gradient,
    log_of_rest,
    part_of,
    reduce_row,
    row_start,
    split_row,
    write_gradient,
    write_ignored,
    write_triplet,
)

# --- forward --------------------------------------------------------------------------------------
#
# Floors: one read of the logits, and about 6 instructions an entry (convert, max, subtract, multiply, exp2,
# fused multiply-add), of which a multiprocessor issues 128 a clock. Measured: 0.88 ms for 8192 x 128256
# bfloat16.


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab"])
def triplet_forward_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    labels,
    ignore_index,
    triplet,
    runner_up_ids,
    partial,
    partial_ids,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute triplet (N, 3) and runner_up_ids (N,) of logits (N, V) and labels (N,).

    With several PARTS a row it computes partial (N, PARTS, 3) and partial_ids (N, PARTS) instead. Then
    ``triplet_combine_kernel`` combines them.
    """
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    if label == ignore_index:
        if PARTS == 1:
            write_ignored(triplet, runner_up_ids, n)
        return
    assert_label(label, vocab)
    target = label.to(tl.int32)
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    runner_up, runner_up_id, largest, total = reduce_row(
        logits, start, vocab, target, part, 1.0, PARTS, False, BLOCK
    )
    if PARTS == 1:
        target_logit = tl.load(logits + start + target).to(tl.float64)
        rest = log_of_rest(largest, total)
        write_triplet(triplet, runner_up_ids, n, target_logit, runner_up, rest, runner_up_id)
    else:
        place = n.to(tl.int64) * PARTS + part
        tl.store(partial + place * 3, runner_up)
        tl.store(partial + place * 3 + 1, largest)
        tl.store(partial + place * 3 + 2, total)
        tl.store(partial_ids + place, runner_up_id)


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride"])
def triplet_combine_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    labels,
    ignore_index,
    partial,
    partial_ids,
    triplet,
    runner_up_ids,
    scale,
    grad_triplet,
    PARTS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Compute triplet and runner_up_ids from the results of the parts of each row.

    With GRADIENT it also computes ``scale`` times the gradient of IHL in the triplet.
    """
    n = tl.program_id(0)
    label = tl.load(labels + n)
    if label == ignore_index:
        write_ignored(triplet, runner_up_ids, n)
        return
    place = n.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    tops = tl.load(partial + place * 3)
    largests = tl.load(partial + place * 3 + 1)
    totals = tl.load(partial + place * 3 + 2)
    ids = tl.load(partial_ids + place)
    top = tl.max(tops)
    runner_up_id = tl.min(tl.where(tops == top, ids, NO_COLUMN))
    demoted = tl.where((tops == top) & (ids == runner_up_id), MINUS_INFINITY, tops)

    demoted, largests = demoted.to(tl.float64), largests.to(tl.float64)
    largest = tl.maximum(tl.max(demoted), tl.max(largests))
    reference = tl.where(largest == MINUS_INFINITY, 0.0, largest)
    total = tl.sum(totals.to(tl.float64) * tl.exp(largests - reference) + tl.exp(demoted - reference))
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    target = tl.load(logits + start + label).to(tl.float64)
    runner_up = top.to(tl.float64)
    rest = log_of_rest(largest, total)
    write_triplet(triplet, runner_up_ids, n, target, runner_up, rest, runner_up_id)
    if GRADIENT:
        g0, g1, g2 = inverted_hinge_gradient(target, runner_up, rest, tl.load(scale))
        tl.store(grad_triplet + n * 3, g0)
        tl.store(grad_triplet + n * 3 + 1, g1)
        tl.store(grad_triplet + n * 3 + 2, g2)


# --- backward -------------------------------------------------------------------------------------
#
# Floors: one read and one write of the logits, and about 12 instructions an entry.


@triton.jit(
    do_not_specialize=[
        "inner_rows",
        "outer_stride",
        "inner_stride",
        "vocab",
        "first_column",
        "grad_inner_rows",
        "grad_outer_stride",
        "grad_inner_stride",
    ]
)
def triplet_backward_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    first_column,
    labels,
    ignore_index,
    softcap,
    triplet,
    runner_up_ids,
    grad_triplet,
    grad_logits,
    grad_inner_rows,
    grad_outer_stride,
    grad_inner_stride,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute grad_logits (N, V), which may be the logits, from grad_triplet (N, 3).

    The logits may be a block of columns that begins at ``first_column``.
    """
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    counted = label != ignore_index
    write_gradient(
        logits,
        row_start(n, inner_rows, outer_stride, inner_stride),
        vocab,
        grad_logits,
        row_start(n, grad_inner_rows, grad_outer_stride, grad_inner_stride),
        part,
        counted,
        (label - first_column).to(tl.int32),
        (tl.load(runner_up_ids + n) - first_column).to(tl.int32),
        tl.where(counted, tl.load(grad_triplet + n * 3), 0.0),
        tl.load(grad_triplet + n * 3 + 1),  # an ignored row has no runner-up
        tl.where(counted, tl.load(grad_triplet + n * 3 + 2), 0.0),
        tl.load(triplet + n * 3 + 2),
        softcap,
        PARTS,
        SOFTCAP,
        SAME_ALIGNMENT,
        BLOCK,
    )


# --- forward and backward at once, in place -------------------------------------------------------
#
# Floors: one read and one write of the logits from main memory, and about 18 instructions an entry. The
# second read is free only if the L2 cache still has the row. Two programs a multiprocessor have 17 MB of rows
# under way at V = 32000 bfloat16 on an H100. At V = 128256 one program has 34 MB. Measured: 2.23 ms for the
# loss in place on 8192 x 128256 bfloat16.


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab"])
def inverted_hinge_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    labels,
    ignore_index,
    triplet,
    runner_up_ids,
    scale,
    BLOCK: tl.constexpr,
):
    """Compute triplet and runner_up_ids, and overwrite logits (N, V) with ``scale`` x the gradient of IHL."""
    n = tl.program_id(0)
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    label = tl.load(labels + n)
    counted = label != ignore_index
    target = tl.full((), -1, tl.int32)
    runner_up_id = tl.full((), -1, tl.int32)
    g0 = tl.full((), 0.0, tl.float64)
    g1, g2, rest = g0, g0, g0
    if counted:
        assert_label(label, vocab)
        target = label.to(tl.int32)
        runner_up, runner_up_id, largest, total = reduce_row(
            logits, start, vocab, target, 0, 1.0, 1, False, BLOCK
        )
        target_logit = tl.load(logits + start + target).to(tl.float64)
        runner_up_logit = runner_up.to(tl.float64)
        rest = log_of_rest(largest, total)
        write_triplet(triplet, runner_up_ids, n, target_logit, runner_up_logit, rest, runner_up_id)
        g0, g1, g2 = inverted_hinge_gradient(target_logit, runner_up_logit, rest, tl.load(scale))
        # Every thread has read the row, and each is about to overwrite a part of it.
        tl.debug_barrier()
    else:
        write_ignored(triplet, runner_up_ids, n)
    write_gradient(
        logits, start, vocab, logits, start, 0, counted, target, runner_up_id, g0, g1, g2, rest, 1.0,
        1, False, True, BLOCK,
    )  # fmt: skip


# --- the next columns of rows that come in blocks of columns --------------------------------------
#
# The linear operator launches this between its two products. Floors: one read of a block of logits, and one
# write with ``out``. The first product has just written the block, so the L2 cache serves the read if the
# block fits.


@triton.jit(do_not_specialize=["row_stride", "columns", "first_column", "out_stride"])
def triplet_columns_kernel(
    logits,
    row_stride,
    columns,
    first_column,
    labels,
    softcap,
    out,
    out_stride,
    numbers,
    runner_up_ids,
    rescales,
    demoted_ids,
    demoted_shares,
    STORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the logits (N, C) of the columns from ``first_column`` on into the state (see ``OnlineState``).

    With STORE the terms go to out (N, C), which may be the logits: exp(y - rest_max) times the softcap's
    slope, and 0 at target and runner-up.
    """
    n = tl.program_id(0)
    start = n.to(tl.int64) * row_stride
    target = (tl.load(labels + n) - first_column).to(tl.int32)
    top, top_id, largest, total = reduce_row(logits, start, columns, target, 0, softcap, 1, SOFTCAP, BLOCK)
    if (target >= 0) & (target < columns):
        tl.store(numbers + n * 4, exact_logit(tl.load(logits + start + target), softcap, SOFTCAP))
    top, largest = exact_logit(top, softcap, SOFTCAP), exact_logit(largest, softcap, SOFTCAP)
    total = total.to(tl.float64)

    runner_up = tl.load(numbers + n * 4 + 1)
    rest_max = tl.load(numbers + n * 4 + 2)
    rest_sum = tl.load(numbers + n * 4 + 3)
    runner_up_id = tl.load(runner_up_ids + n)
    better = top > runner_up
    demoted = tl.where(better, runner_up, MINUS_INFINITY)
    joining = tl.where(better, MINUS_INFINITY, top)  # the block's largest entry joins the rest
    demoted_id = tl.where(demoted > MINUS_INFINITY, runner_up_id, -1)
    runner_up_id = tl.where(better, top_id.to(tl.int64) + first_column, runner_up_id)
    new_max = tl.maximum(tl.maximum(rest_max, largest), tl.maximum(demoted, joining))
    reference = tl.where(new_max == MINUS_INFINITY, 0.0, new_max)
    rescale, share = tl.exp(rest_max - reference), tl.exp(demoted - reference)
    rest_sum = rest_sum * rescale + share + total * tl.exp(largest - reference) + tl.exp(joining - reference)
    if SOFTCAP:
        # A float64 division would be a call, which spills registers.
        u = tl.where(demoted > MINUS_INFINITY, demoted, 0.0).to(tl.float32) / softcap
        share *= (1.0 - u) * (1.0 + u)
    # Every thread has read the state and the logits. Some are about to overwrite them.
    tl.debug_barrier()
    tl.store(numbers + n * 4 + 1, tl.where(better, top, runner_up))
    tl.store(numbers + n * 4 + 2, new_max)
    tl.store(numbers + n * 4 + 3, rest_sum)
    tl.store(runner_up_ids + n, runner_up_id)
    tl.store(rescales + n, rescale.to(tl.float32))
    tl.store(demoted_ids + n, demoted_id)
    tl.store(demoted_shares + n, share.to(tl.float32))
    if STORE:
        skip = (runner_up_id - first_column).to(tl.int32)
        zero = tl.full((), 0.0, tl.float64)
        write_gradient(
            logits, start, columns, out, n.to(tl.int64) * out_stride, 0, True, target, skip, zero, zero,
            zero + 1.0, reference, softcap, 1, SOFTCAP, SAME_ALIGNMENT, BLOCK,
        )  # fmt: skip


# --- scaling by a factor that only the device knows -----------------------------------------------
#
# Floors: one read and one write of the logits, or none for a factor of 1.


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab"])
def scale_rows_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    factors,
    factor_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply the rows of logits (N, V) by factors (N,). A row whose factor is 1 is not read."""
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    factor = tl.load(factors + n * factor_stride).to(tl.float32)
    if factor == 1.0:
        return
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    aligned, head, body = split_row(start, vocab, VECTOR)
    begin, end = part_of(body, part, PARTS, BLOCK)
    lane = tl.arange(0, BLOCK)
    block = logits + aligned + begin
    for position in range(begin, end, BLOCK):
        inside = lane < body - position
        x = tl.load(block + lane, mask=inside).to(tl.float32) * factor
        tl.store(block + lane, x.to(logits.dtype.element_ty), mask=inside)
        block += BLOCK
    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid).to(tl.float32) * factor
    tl.store(logits + start + column, x.to(logits.dtype.element_ty), mask=valid)

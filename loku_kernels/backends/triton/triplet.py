"""Softmax triplet, Triton kernels: forward, backward, and the fused in-place forward and backward.

A program walks a row of logits, or one of several parts of it, in blocks that it holds in registers. It
keeps the runner-up out of the sum of the rest, and that sum relative to the largest of the *rest*, so
neither a dominant target nor a dominant runner-up costs the rest its digits. A block without a new
runner-up, the common case, needs one reduction across threads, for its maximum; the terms of the sum stay
in their lanes until the end of the row.

An entry is a logit; with a softcap it is u = tanh(z / softcap), standing for softcap * u (see
``loku_kernels/logits_blocks.py``). Arithmetic is float32, but what becomes the triplet and its gradient, a
few numbers a row, is float64.

Times below are predictions for an H100 (3.0 TB/s is what copies reach there). None has been measured.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import check_label_values

VECTORS = 2  # of 16 bytes, that a thread holds of a row at a time
WARPS = 8
FUSED_WARPS = 16
# Between its two passes a row of the fused kernel should stay in the L2 cache. Twice the threads a program
# is half the programs, so half the rows, that are under way.
FUSED_LONG_ROW = 128 << 10  # bytes
MAX_PARTS = 64  # of a row
PROGRAMS_PER_SM = 4

_MINUS_INFINITY = tl.constexpr(float("-inf"))
_NO_COLUMN = tl.constexpr(2**31 - 1)


# --- a row ----------------------------------------------------------------------------------------
#
# A vector load of 16 bytes must be aligned, and a row of odd length begins anywhere. So a row is a body of
# whole aligned vectors, and edges of less than a vector before and after it, which go together in a little
# block of their own. `first` counts from the begin of the body, columns from that of the row.
#
# How long a row is, where rows begin and how many there are varies from batch to batch. Nothing is gained by
# compiling anew where such a number is 1 or a multiple of 16, since `_split_row` finds what is aligned.


@triton.jit
def _row_start(n, inner_rows, outer_stride, inner_stride):
    """Offset of row n of a tensor whose rows come in groups of ``inner_rows``. 64 bits."""
    return (n // inner_rows).to(tl.int64) * outer_stride + (n % inner_rows).to(tl.int64) * inner_stride


@triton.jit
def _split_row(start, vocab, VECTOR: tl.constexpr):
    """Offset of the first aligned vector, how many columns precede it, and the length of the body."""
    aligned = (start + (VECTOR - 1)) // VECTOR * VECTOR
    head = tl.minimum((aligned - start).to(tl.int32), vocab)
    body = (vocab - head) // VECTOR * VECTOR
    return aligned, head, body


@triton.jit
def _part_of(body, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a part of the body begins, a multiple of BLOCK, and ends; the last parts may be empty."""
    length = tl.cdiv(tl.cdiv(body, BLOCK), PARTS) * BLOCK
    begin = part * length
    return begin, tl.minimum(begin + length, body)


@triton.jit
def _edge_columns(head, body, vocab, asked, VECTOR: tl.constexpr):
    i = tl.arange(0, 2 * VECTOR)
    column = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return column, ((i < head) | (i >= VECTOR)) & (column < tl.where(asked, vocab, 0))


@triton.jit
def _exp_of_difference(x, reference, softcap, SOFTCAP: tl.constexpr):
    difference = x - reference
    if SOFTCAP:
        difference *= softcap
    return tl.exp(difference)


@triton.jit
def _take_runner_up(x, column, target, runner_up, runner_up_id):
    """Take the target and the new runner-up, if one is among them, out of entries x at ``column``.

    Returns what is left of x, what it brings to the rest (x and a former runner-up): the largest, and that
    runner-up or -inf; and the runner-up and its column.
    """
    x = tl.where(column == target, _MINUS_INFINITY, x)
    top = tl.max(x)
    best = tl.min(tl.where(x == top, column, _NO_COLUMN))
    # On ties the lower column wins: the edge at the begin of a row comes last.
    take = (top > runner_up) | ((top == runner_up) & (best < runner_up_id) & (top > _MINUS_INFINITY))
    x = tl.where(column == tl.where(take, best, -1), _MINUS_INFINITY, x)
    leaving = tl.where(take, runner_up, _MINUS_INFINITY)
    joining = tl.maximum(tl.max(x), leaving)
    return x, joining, leaving, tl.where(take, top, runner_up), tl.where(take, best, runner_up_id)


@triton.jit
def _raise_largest(largest, joining, softcap, SOFTCAP: tl.constexpr):
    """The new largest entry of the rest, what to subtract from entries, and the factor of earlier terms."""
    new_largest = tl.maximum(largest, joining)
    # Where all is masked there is no reference to subtract. A NaN shows in the sum, whatever this is.
    reference = tl.where(new_largest == _MINUS_INFINITY, 0.0, new_largest)
    return new_largest, reference, _exp_of_difference(largest, reference, softcap, SOFTCAP)


@triton.jit
def _reduce_row(
    logits,
    start,
    vocab,
    target,
    part,
    softcap,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of the row at offset ``start``, the last part with the edges: runner-up, its column, the
    largest entry of the rest, and the sum over the rest of exp(y - largest)."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = _split_row(start, vocab, VECTOR)
    begin, end = _part_of(body, part, PARTS, BLOCK)

    runner_up = _MINUS_INFINITY
    runner_up_id = (target == 0).to(tl.int32)  # if all others are masked, the lowest of them
    largest = _MINUS_INFINITY
    demoted = 0.0  # terms of the sum that former runner-ups are
    terms = tl.zeros([BLOCK // VECTOR], tl.float32)  # the sum, a lane for the vectors of a thread
    lane = tl.arange(0, BLOCK)
    block = logits + aligned + begin
    for first in range(begin, end, BLOCK):
        x = tl.load(block + lane, mask=lane < body - first, other=_MINUS_INFINITY).to(tl.float32)
        block += BLOCK
        joining = tl.max(x)  # the largest of what this block brings to the rest
        leaving = _MINUS_INFINITY
        offset = first + head  # of the block's first column
        if (joining > runner_up) | ((target >= offset) & (target < offset + BLOCK)):
            # By lane, not by column: that takes no registers.
            x, joining, leaving, runner_up, runner_up_id = _take_runner_up(
                x, lane, target - offset, runner_up, runner_up_id - offset
            )
            runner_up_id += offset
        largest, reference, factor = _raise_largest(largest, joining, softcap, SOFTCAP)
        share = _exp_of_difference(x, reference, softcap, SOFTCAP)
        terms = terms * factor + tl.sum(tl.reshape(share, [BLOCK // VECTOR, VECTOR]), 1)
        demoted = demoted * factor + _exp_of_difference(leaving, reference, softcap, SOFTCAP)

    column, valid = _edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid, other=_MINUS_INFINITY).to(tl.float32)
    x, joining, leaving, runner_up, runner_up_id = _take_runner_up(x, column, target, runner_up, runner_up_id)
    largest, reference, factor = _raise_largest(largest, joining, softcap, SOFTCAP)
    total = (tl.sum(terms) + demoted) * factor
    total += tl.sum(_exp_of_difference(x, reference, softcap, SOFTCAP))
    total += _exp_of_difference(leaving, reference, softcap, SOFTCAP)
    return runner_up, runner_up_id, largest, total


# --- a row's numbers ------------------------------------------------------------------------------


@triton.jit
def _assert_label(label, vocab):
    tl.device_assert((label >= 0) & (label < vocab), "loku_kernels: a label is outside the vocabulary")


@triton.jit
def _logit(x, softcap, SOFTCAP: tl.constexpr):
    y = x.to(tl.float64)
    return y * softcap if SOFTCAP else y


@triton.jit
def _rest(largest, total):
    """log of the sum of the exponentials of the rest; -inf where there is no rest."""
    return largest + tl.log(total.to(tl.float64))


@triton.jit
def _write_triplet(triplet, runner_up_ids, n, target, runner_up, rest, runner_up_id):
    tl.store(triplet + n * 3, target)
    tl.store(triplet + n * 3 + 1, runner_up)
    tl.store(triplet + n * 3 + 2, rest)
    tl.store(runner_up_ids + n, runner_up_id.to(tl.int64))


@triton.jit
def _write_ignored(triplet, runner_up_ids, n):
    zero = tl.full((), 0.0, tl.float64)
    _write_triplet(triplet, runner_up_ids, n, zero, zero, zero, tl.full((), -1, tl.int32))


@triton.jit
def _inverted_hinge_gradient(target, runner_up, rest, scale):
    """``scale`` x the gradient of IHL = 1 + p_0 - p_1 in the triplet, p its softmax. With sums of
    probabilities only, so nothing cancels where p_0 is near 1.

    Every thread of a program computes this. In float64 it would be some 200 instructions more, for which
    an SM of an H100 has half as many units as for float32, other GPUs a 64th: by estimate a tenth of the time
    of a long row there, and more than all the rest here. So float64 is left to differences.
    """
    top = tl.maximum(target, tl.maximum(runner_up, rest))
    e0 = tl.exp((target - top).to(tl.float32))
    e1 = tl.exp((runner_up - top).to(tl.float32))
    e2 = tl.exp((rest - top).to(tl.float32))
    total = e0 + e1 + e2
    p0, p1, p2 = e0 / total, e1 / total, e2 / total
    return scale * (p0 * (2 * p1 + p2)), -scale * (p1 * (2 * p0 + p2)), scale * (p2 * (p1 - p0))


@triton.jit
def _gradient_of_entries(x, column, target, runner_up_id, g0, g1, g2, rest, softcap, SOFTCAP: tl.constexpr):
    """g0 at the target, g1 at the runner-up, g2 exp(y - rest) elsewhere, times the softcap's slope."""
    # `rest` as two floats: rounding it to one would cost exp() the digits of a large offset.
    rest_high = rest.to(tl.float32)
    rest_low = (rest - rest_high.to(tl.float64)).to(tl.float32)
    missing = rest == _MINUS_INFINITY  # no rest, so no gradient
    rest_high, rest_low = tl.where(missing, 0.0, rest_high), tl.where(missing, 0.0, rest_low)
    share = tl.exp(((x * softcap if SOFTCAP else x) - rest_high) - rest_low)
    grad = share * tl.where(missing, 0.0, g2.to(tl.float32))
    grad = tl.where(column == target, g0.to(tl.float32), grad)
    grad = tl.where(column == runner_up_id, g1.to(tl.float32), grad)
    return grad * ((1.0 - x) * (1.0 + x)) if SOFTCAP else grad


# --- forward --------------------------------------------------------------------------------------
#
# Floors: one read of the logits; about 6 instructions an entry (convert, max, subtract, multiply, exp2, fused
# multiply-add), of which an SM issues 128 a clock. For 4096 x 128256 bfloat16 on an H100: 1.05 GB, 0.35 ms at
# 3.0 TB/s; 3.2e9 instructions, 0.11 ms. Predicted: 0.37 ms. (A prediction, not measured.)


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
    """logits (N, V), labels (N,) -> triplet (N, 3), runner_up_ids (N,); or, with several PARTS a row, partial
    (N, PARTS, 3) and partial_ids (N, PARTS), which ``triplet_combine_kernel`` puts together."""
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    if label == ignore_index:
        if PARTS == 1:
            _write_ignored(triplet, runner_up_ids, n)
        return
    _assert_label(label, vocab)
    target = label.to(tl.int32)
    start = _row_start(n, inner_rows, outer_stride, inner_stride)
    runner_up, runner_up_id, largest, total = _reduce_row(
        logits, start, vocab, target, part, 1.0, PARTS, False, BLOCK
    )
    if PARTS == 1:
        target_logit = tl.load(logits + start + target).to(tl.float64)
        rest = _rest(largest, total)
        _write_triplet(triplet, runner_up_ids, n, target_logit, runner_up, rest, runner_up_id)
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
    """What the parts of each row found -> triplet, runner_up_ids and, if GRADIENT, ``scale`` x the gradient
    of IHL in the triplet."""
    n = tl.program_id(0)
    label = tl.load(labels + n)
    if label == ignore_index:
        _write_ignored(triplet, runner_up_ids, n)
        return
    place = n.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    tops = tl.load(partial + place * 3)
    largests = tl.load(partial + place * 3 + 1)
    totals = tl.load(partial + place * 3 + 2)
    ids = tl.load(partial_ids + place)
    top = tl.max(tops)
    runner_up_id = tl.min(tl.where(tops == top, ids, _NO_COLUMN))
    demoted = tl.where((tops == top) & (ids == runner_up_id), _MINUS_INFINITY, tops)

    demoted, largests = demoted.to(tl.float64), largests.to(tl.float64)
    largest = tl.maximum(tl.max(demoted), tl.max(largests))
    reference = tl.where(largest == _MINUS_INFINITY, 0.0, largest)
    total = tl.sum(totals.to(tl.float64) * tl.exp(largests - reference) + tl.exp(demoted - reference))
    start = _row_start(n, inner_rows, outer_stride, inner_stride)
    target = tl.load(logits + start + label).to(tl.float64)
    runner_up = top.to(tl.float64)
    rest = _rest(largest, total)
    _write_triplet(triplet, runner_up_ids, n, target, runner_up, rest, runner_up_id)
    if GRADIENT:
        g0, g1, g2 = _inverted_hinge_gradient(target, runner_up, rest, tl.load(scale))
        tl.store(grad_triplet + n * 3, g0)
        tl.store(grad_triplet + n * 3 + 1, g1)
        tl.store(grad_triplet + n * 3 + 2, g2)


# --- backward -------------------------------------------------------------------------------------
#
# Floors: one read and one write of the logits; about 12 instructions an entry. For 4096 x 128256 bfloat16 on
# an H100: 2.1 GB, 0.70 ms; 6.3e9 instructions, 0.21 ms. Predicted: 0.75 ms. (A prediction, not measured.)


@triton.jit
def _write_gradient(
    logits,
    start,
    vocab,
    out,
    out_start,
    part,
    counted,
    target,
    runner_up_id,
    g0,
    g1,
    g2,
    rest,
    softcap,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of the row at offset ``start``, the last part with the edges: the gradient of its entries, to
    offset ``out_start`` of ``out``, which may be the logits; where not ``counted``, zeros without a read.

    SAME_ALIGNMENT: each row of out begins as far from an aligned vector as its row of logits does.
    """
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = _split_row(start, vocab, VECTOR)
    if SAME_ALIGNMENT:
        out_aligned, _, _ = _split_row(out_start, vocab, VECTOR)
    else:
        out_aligned = out_start + head
    begin, end = _part_of(body, part, PARTS, BLOCK)
    readable, readable_body = tl.where(counted, vocab, 0), tl.where(counted, body, 0)
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(blocks):  # backwards: what was read last, in a pass before this, is still in the cache
        first = begin + (blocks - 1 - i) * BLOCK
        x = tl.load(logits + aligned + first + lane, mask=lane < readable_body - first, other=0.0)
        offset = first + head  # of the block's first column
        grad = _gradient_of_entries(
            x.to(tl.float32), lane, target - offset, runner_up_id - offset, g0, g1, g2, rest, softcap, SOFTCAP
        )
        tl.store(out + out_aligned + first + lane, grad.to(out.dtype.element_ty), mask=lane < body - first)
    # The edges are so few that several threads hold each; only one of them stores it, after its own load.
    column, valid = _edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid & (column < readable), other=0.0).to(tl.float32)
    grad = _gradient_of_entries(x, column, target, runner_up_id, g0, g1, g2, rest, softcap, SOFTCAP)
    tl.store(out + out_start + column, grad.to(out.dtype.element_ty), mask=valid)


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
    """grad_triplet (N, 3) -> grad_logits (N, V), which may be the logits. A program does a part of a row. The
    logits may be those of some columns alone, from ``first_column`` on."""
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    counted = label != ignore_index
    _write_gradient(
        logits,
        _row_start(n, inner_rows, outer_stride, inner_stride),
        vocab,
        grad_logits,
        _row_start(n, grad_inner_rows, grad_outer_stride, grad_inner_stride),
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
# Floors: one read and one write of the logits from main memory, if the second read meets the first's lines in
# the L2 cache: the rows under way, two programs an SM, are 17 MB at V = 32000 bfloat16, and 34 MB at 128256,
# where it is one. About 18 instructions an entry. For 4096 x 128256 bfloat16 on an H100: 2.1 GB, 0.70 ms;
# 9.5e9 instructions, 0.32 ms. Predicted: 0.85 ms. (A prediction, not measured.)


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
    """logits (N, V), labels (N,) -> triplet, runner_up_ids, and where the logits were ``scale`` x the
    gradient of IHL."""
    n = tl.program_id(0)
    start = _row_start(n, inner_rows, outer_stride, inner_stride)
    label = tl.load(labels + n)
    counted = label != ignore_index
    target = tl.full((), -1, tl.int32)
    runner_up_id = tl.full((), -1, tl.int32)
    g0 = tl.full((), 0.0, tl.float64)
    g1, g2, rest = g0, g0, g0
    if counted:
        _assert_label(label, vocab)
        target = label.to(tl.int32)
        runner_up, runner_up_id, largest, total = _reduce_row(
            logits, start, vocab, target, 0, 1.0, 1, False, BLOCK
        )
        target_logit = tl.load(logits + start + target).to(tl.float64)
        runner_up_logit = runner_up.to(tl.float64)
        rest = _rest(largest, total)
        _write_triplet(triplet, runner_up_ids, n, target_logit, runner_up_logit, rest, runner_up_id)
        g0, g1, g2 = _inverted_hinge_gradient(target_logit, runner_up_logit, rest, tl.load(scale))
        # The row was read by every thread, and each is about to overwrite some of it.
        tl.debug_barrier()
    else:
        _write_ignored(triplet, runner_up_ids, n)
    _write_gradient(
        logits, start, vocab, logits, start, 0, counted, target, runner_up_id, g0, g1, g2, rest, 1.0,
        1, False, True, BLOCK,
    )  # fmt: skip


# --- the next columns of rows that come in blocks of columns --------------------------------------
#
# For the linear op, between its two products. Floors: a read, and with ``out`` a write, of a block that the
# first product has just left, in the L2 cache if it fits. For 1024 x 8192 bfloat16 on an H100: 34 MB, 6 us at
# 5.5 TB/s. Predicted: 12 us. (A prediction, not measured.)


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
    """Take logits (N, C) of the columns from ``first_column`` on into the state, see ``OnlineState``;
    with STORE exp(y - rest_max), 0 at target and runner-up, times the softcap's slope goes to out (N, C),
    which may be the logits."""
    n = tl.program_id(0)
    start = n.to(tl.int64) * row_stride
    target = (tl.load(labels + n) - first_column).to(tl.int32)
    top, top_id, largest, total = _reduce_row(logits, start, columns, target, 0, softcap, 1, SOFTCAP, BLOCK)
    if (target >= 0) & (target < columns):
        tl.store(numbers + n * 4, _logit(tl.load(logits + start + target), softcap, SOFTCAP))
    top, largest = _logit(top, softcap, SOFTCAP), _logit(largest, softcap, SOFTCAP)
    total = total.to(tl.float64)

    runner_up = tl.load(numbers + n * 4 + 1)
    rest_max = tl.load(numbers + n * 4 + 2)
    rest_sum = tl.load(numbers + n * 4 + 3)
    runner_up_id = tl.load(runner_up_ids + n)
    better = top > runner_up
    demoted = tl.where(better, runner_up, _MINUS_INFINITY)
    joining = tl.where(better, _MINUS_INFINITY, top)  # this block's largest joins the rest
    demoted_id = tl.where(demoted > _MINUS_INFINITY, runner_up_id, -1)
    runner_up_id = tl.where(better, top_id.to(tl.int64) + first_column, runner_up_id)
    new_max = tl.maximum(tl.maximum(rest_max, largest), tl.maximum(demoted, joining))
    reference = tl.where(new_max == _MINUS_INFINITY, 0.0, new_max)
    rescale, share = tl.exp(rest_max - reference), tl.exp(demoted - reference)
    rest_sum = rest_sum * rescale + share + total * tl.exp(largest - reference) + tl.exp(joining - reference)
    if SOFTCAP:
        # In float64 the division would be a call, which spills registers.
        u = tl.where(demoted > _MINUS_INFINITY, demoted, 0.0).to(tl.float32) / softcap
        share *= (1.0 - u) * (1.0 + u)
    # The state, and below the logits, were read by every thread, and are about to be overwritten by some.
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
        _write_gradient(
            logits, start, columns, out, n.to(tl.int64) * out_stride, 0, True, target, skip, zero, zero,
            zero + 1.0, reference, softcap, 1, SOFTCAP, SAME_ALIGNMENT, BLOCK,
        )  # fmt: skip


# --- scaling, where the factor is known to the device alone ---------------------------------------
#
# Floors: none if the factor is 1, else one read and one write. For 4096 x 128256 bfloat16 on an H100: 2.1 GB,
# 0.70 ms. Predicted: 0.75 ms, or 10 us with a factor of 1. (A prediction, not measured.)


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
    """logits (N, V) *= factors (N,). A row whose factor is 1 is left alone."""
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    factor = tl.load(factors + n * factor_stride).to(tl.float32)
    if factor == 1.0:
        return
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    start = _row_start(n, inner_rows, outer_stride, inner_stride)
    aligned, head, body = _split_row(start, vocab, VECTOR)
    begin, end = _part_of(body, part, PARTS, BLOCK)
    lane = tl.arange(0, BLOCK)
    block = logits + aligned + begin
    for first in range(begin, end, BLOCK):
        inside = lane < body - first
        x = tl.load(block + lane, mask=inside).to(tl.float32) * factor
        tl.store(block + lane, x.to(logits.dtype.element_ty), mask=inside)
        block += BLOCK
    column, valid = _edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid).to(tl.float32) * factor
    tl.store(logits + start + column, x.to(logits.dtype.element_ty), mask=valid)


# --- launches -------------------------------------------------------------------------------------

# device_assert needs `debug`, which would also check every integer operation for overflow.
_CHECKED = {"debug": True, "sanitize_overflow": False}
# Two programs of the fused kernel on a multiprocessor: 64 of its 65536 registers for each of 1024 threads.
_TWO_PROGRAMS = {} if torch.version.hip else {"maxnreg": 64}


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(logits, warps):
    """Entries of a row that a program holds at a time."""
    return warps * 32 * VECTORS * 16 // logits.element_size()


def _parts(rows, logits):
    """How many programs a row gets, a power of two: enough to keep the device busy, of at least a block."""
    wanted = -(-PROGRAMS_PER_SM * _multiprocessors(logits.device) // rows)
    most = min(-(-logits.shape[-1] // _block(logits, WARPS)), MAX_PARTS)
    return min(triton.next_power_of_2(wanted), 1 << most.bit_length() - 1)


def _row_groups(tensor):
    """(size, stride) of the dimensions in front of V, neighbours merged where one stride serves both."""
    groups = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        elif size != 1:
            groups.append((size, stride))
    return groups


def _rows(tensor):
    """What ``_row_start`` takes, of a tensor (..., V) whose rows lie on at most two strides."""
    groups = _row_groups(tensor)
    (_, outer_stride), (inner_rows, inner_stride) = [(1, 0)] * (2 - len(groups)) + groups
    return inner_rows, outer_stride, inner_stride


def _pieces(strided, per_row):
    """Tensors (..., V), and those with a value or a few for each of their rows, cut where the rows of the
    former lie on more than two strides, which is rare. Nothing, if there is no row."""
    if strided[0].numel() == 0:
        return
    if all(len(_row_groups(x)) <= 2 for x in strided):
        yield strided, per_row
    else:
        for i in range(strided[0].shape[0]):
            yield from _pieces([x[i] for x in strided], [x[i] for x in per_row])


def _same_alignment(a, b):
    vector = 16 // a.element_size()
    return all((x - y) % vector == 0 for x, y in zip(a.stride()[:-1], b.stride()[:-1], strict=True))


def on_device(device):
    """Kernels go to the tensors' device, which need not be the current one, and to its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _empty_triplets(labels):
    return (
        torch.empty((*labels.shape, 3), dtype=torch.float64, device=labels.device),
        torch.empty(labels.shape, dtype=torch.int64, device=labels.device),
    )


def _forward(logits, labels, ignore_index, triplet, runner_up_id, parts, scale=None):
    """Launches for logits on two strides; with a ``scale``, several parts return the triplet's gradient."""
    rows, vocab, device = labels.numel(), logits.shape[-1], logits.device
    partial = partial_id = grad_triplet = None
    if parts > 1:
        partial = torch.empty((rows, parts, 3), dtype=torch.float32, device=device)
        partial_id = torch.empty((rows, parts), dtype=torch.int32, device=device)
    triplet_forward_kernel[(rows * parts,)](
        logits,
        *_rows(logits),
        vocab,
        labels,
        ignore_index,
        triplet,
        runner_up_id,
        partial,
        partial_id,
        PARTS=parts,
        BLOCK=_block(logits, WARPS),
        num_warps=WARPS,
        **_CHECKED,
    )
    if parts > 1:
        if scale is not None:
            grad_triplet = torch.empty_like(triplet)
        triplet_combine_kernel[(rows,)](
            logits,
            *_rows(logits),
            labels,
            ignore_index,
            partial,
            partial_id,
            triplet,
            runner_up_id,
            scale,
            grad_triplet,
            PARTS=parts,
            GRADIENT=scale is not None,
            num_warps=1,
        )
    return grad_triplet


def _backward(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, first_column, softcap, out):
    rows, vocab = labels.numel(), logits.shape[-1]
    parts = _parts(rows, logits)
    triplet_backward_kernel[(rows * parts,)](
        logits,
        *_rows(logits),
        vocab,
        first_column,
        labels,
        ignore_index,
        softcap,
        triplet,
        runner_up_id,
        grad_triplet,
        out,
        *_rows(out),
        PARTS=parts,
        SOFTCAP=softcap > 0,
        SAME_ALIGNMENT=_same_alignment(logits, out),
        BLOCK=_block(logits, WARPS),
        num_warps=WARPS,
    )


def _check_labels_of_interpreter(logits, labels, ignore_index):
    """Raise ``IndexError`` for a bad label: Triton's interpreter does not run the kernels' assert."""
    if labels.device.type == "cpu":
        check_label_values(labels, logits.shape[-1], ignore_index)


def triplet_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See ``reference.triplet_forward``."""
    _check_labels_of_interpreter(logits, labels, ignore_index)
    labels = labels.contiguous()
    triplet, runner_up_id = _empty_triplets(labels)
    with on_device(logits.device):
        for (y,), (t, *out) in _pieces([logits], [labels, triplet, runner_up_id]):
            _forward(y, t, ignore_index, *out, _parts(t.numel(), y))
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    *,
    first_column: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.triplet_backward``."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    per_row = [x.contiguous() for x in (grad_triplet, labels, triplet, runner_up_id)]
    with on_device(logits.device):
        for (y, grad), (g, t, saved, r) in _pieces([logits, out], per_row):
            _backward(g, y, t, ignore_index, saved, r, first_column, softcap, grad)
    return out


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    _check_labels_of_interpreter(logits, labels, ignore_index)
    labels = labels.contiguous()
    triplet, runner_up_id = _empty_triplets(labels)
    with on_device(logits.device):
        for (y,), (t, *out) in _pieces([logits], [labels, triplet, runner_up_id]):
            rows, vocab = t.numel(), y.shape[-1]
            parts = _parts(rows, y)
            if parts > 1:  # too few rows to keep the device busy with a program each
                g = _forward(y, t, ignore_index, *out, parts, scale)
                _backward(g, y, t, ignore_index, *out, 0, 0.0, y)
                continue
            warps = FUSED_WARPS * (2 if vocab * y.element_size() > FUSED_LONG_ROW else 1)
            inverted_hinge_kernel[(rows,)](
                y,
                *_rows(y),
                vocab,
                t,
                ignore_index,
                *out,
                scale,
                BLOCK=_block(y, warps),
                num_warps=warps,
                **_CHECKED,
                **_TWO_PROGRAMS,
            )
    return triplet, runner_up_id


def triplet_columns_(
    logits: Tensor,
    labels: Tensor,
    state: OnlineState,
    *,
    first_column: int,
    softcap: float,
    out: Tensor | None = None,
) -> None:
    """See ``reference.triplet_columns_``."""
    rows, columns = logits.shape
    if rows == 0:
        return
    with on_device(logits.device):
        triplet_columns_kernel[(rows,)](
            logits,
            logits.stride(0),
            columns,
            first_column,
            labels,
            softcap,
            out,
            0 if out is None else out.stride(0),
            *state,
            STORE=out is not None,
            SOFTCAP=softcap > 0,
            SAME_ALIGNMENT=out is None or _same_alignment(logits, out),
            BLOCK=_block(logits, WARPS),
            num_warps=WARPS,
        )


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """See ``reference.scale_rows_``. Rows whose factor is 1 are not read."""
    factor = factor.expand(logits.shape[:-1])
    if factor.dim() and not all(stride == 0 for stride in factor.stride()):
        factor = factor.contiguous()
    with on_device(logits.device):
        for (y,), (f,) in _pieces([logits], [factor]):
            rows, vocab = f.numel(), y.shape[-1]
            parts = _parts(rows, y)
            scale_rows_kernel[(rows * parts,)](
                y,
                *_rows(y),
                vocab,
                f,
                f.stride(-1) if f.dim() else 0,
                PARTS=parts,
                BLOCK=_block(y, WARPS),
                num_warps=WARPS,
            )

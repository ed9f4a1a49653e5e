"""Softmax triplet, Triton kernels: forward, backward, the fused in-place kernels, losses and scaling.

A program takes a row of logits, or one of several parts of it. The reduction of a row and the gradient of its
entries are in ``rows.py``, the launches in ``triplet.py``. Before each kernel are its floors: the bytes that
it must move, and the instructions an entry that its loop takes in the code for bfloat16 and sm_90. A copy of
bfloat16 logits leaves an H200 the time for some 31 instructions an entry.
"""

import triton
import triton.language as tl

from loku_kernels.backends.triton.rows import (
    MINUS_INFINITY,
    assert_label,
    combine_parts,
    edge_columns,
    exact_logit,
    inverted_hinge_gradient,
    log_of_rest,
    part_of,
    reduce_row,
    row_start,
    softmax_of_triplet,
    split_row,
    write_gradient,
)

# --- forward, alone or with the gradient in place -------------------------------------------------
#
# Floors: one read of the logits, and one write with a gradient. The loop of the reduction takes 10
# instructions an entry, that of the gradient 8. The second read of a gradient is free only if the L2 cache
# still has the row. Two programs a multiprocessor have 17 MB of rows under way at V = 32000 bfloat16 on an
# H100. At V = 128256 one program has 34 MB. A prototype of the reduction, whose loop also looked for the
# target, took 0.153 ms for 8192 x 32000 bfloat16 logits on one H200, where a copy takes 0.248 ms
# (benchmarks/results/prototypes_fused_h200.json).


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab"])
def triplet_parts_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    labels,
    ignore_index,
    softcap,
    triplet,
    partial,
    partial_ids,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce the parts of the rows of logits (N, V) to partial (N, PARTS, 3) and partial_ids (N, PARTS).

    The target's logit goes to the triplet, before ``triplet_kernel`` overwrites it.
    """
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    if label == ignore_index:
        return
    assert_label(label, vocab)
    target = label.to(tl.int32)
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    runner_up, runner_up_id, largest, total = reduce_row(
        logits, start, vocab, target, part, softcap, PARTS, SOFTCAP, BLOCK
    )
    place = n.to(tl.int64) * PARTS + part
    tl.store(partial + place * 3, runner_up)
    tl.store(partial + place * 3 + 1, largest)
    tl.store(partial + place * 3 + 2, total)
    tl.store(partial_ids + place, runner_up_id)
    target_logit = exact_logit(tl.load(logits + start + target), softcap, SOFTCAP)
    tl.store(triplet + n * 3, target_logit, mask=part == 0)


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab"])
def triplet_kernel(
    logits,
    inner_rows,
    outer_stride,
    inner_stride,
    vocab,
    labels,
    ignore_index,
    softcap,
    triplet,
    runner_up_ids,
    partial,
    partial_ids,
    scale,
    PARTS: tl.constexpr,
    WRITE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute triplet (N, 3) and runner_up_ids (N,) of logits (N, V) and labels (N,).

    With several PARTS a row it combines the results of ``triplet_parts_kernel``. WRITE "inverted_hinge"
    overwrites the logits with ``scale`` times the gradient of IHL, "rest_probabilities" with exp(y - rest)
    times the softcap's slope. Then PARTS programs share each row.
    """
    PROGRAMS: tl.constexpr = PARTS if WRITE != "" else 1
    n = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    start = row_start(n, inner_rows, outer_stride, inner_stride)
    label = tl.load(labels + n)
    counted = label != ignore_index
    target = tl.full((), -1, tl.int32)
    runner_up_id = target
    target_logit = tl.full((), 0.0, tl.float64)
    runner_up_logit, rest = target_logit, target_logit
    if counted:
        assert_label(label, vocab)
        target = label.to(tl.int32)
        if PARTS == 1:
            runner_up, runner_up_id, largest, total = reduce_row(
                logits, start, vocab, target, 0, softcap, 1, SOFTCAP, BLOCK
            )
            target_logit = exact_logit(tl.load(logits + start + target), softcap, SOFTCAP)
        else:
            runner_up, runner_up_id, largest, total = combine_parts(
                partial, partial_ids, n, softcap, PARTS, SOFTCAP
            )
            target_logit = tl.load(triplet + n * 3)
        runner_up_logit = exact_logit(runner_up, softcap, SOFTCAP)
        rest = log_of_rest(exact_logit(largest, softcap, SOFTCAP), total)
    tl.store(triplet + n * 3, target_logit, mask=part == 0)
    tl.store(triplet + n * 3 + 1, runner_up_logit, mask=part == 0)
    tl.store(triplet + n * 3 + 2, rest, mask=part == 0)
    tl.store(runner_up_ids + n, runner_up_id.to(tl.int64), mask=part == 0)
    if WRITE != "":
        g0 = tl.full((), 0.0, tl.float64)
        g1, g2 = g0, g0 + 1.0
        if WRITE == "inverted_hinge":
            p0, p1, p2 = softmax_of_triplet(target_logit, runner_up_logit, rest, tl.float32)
            g0, g1, g2 = inverted_hinge_gradient(p0, p1, p2)
            factor = tl.load(scale)
            g0, g1, g2 = g0 * factor, g1 * factor, g2 * factor
        # Every thread has read the row, and each is about to overwrite a part of it.
        tl.debug_barrier()
        write_gradient(
            logits, start, vocab, logits, start, part, counted, target, runner_up_id, g0, g1, g2, rest,
            softcap, PARTS, SOFTCAP, True, BLOCK,
        )  # fmt: skip


# --- backward -------------------------------------------------------------------------------------
#
# Floors: one read and one write of the logits. 8 instructions an entry.


@triton.jit(
    do_not_specialize=[
        "inner_rows",
        "outer_stride",
        "inner_stride",
        "vocab",
        "first_column",
        "factor_stride",
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
    factors,
    factor_stride,
    grad_logits,
    grad_inner_rows,
    grad_outer_stride,
    grad_inner_stride,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute grad_logits (N, V), which may be the logits, from factors (N,) times grad_triplet (N, 3).

    The logits may be a block of columns that begins at ``first_column``.
    """
    n = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(labels + n)
    factor = 1.0 if factors is None else tl.load(factors + n * factor_stride).to(tl.float64)
    write_gradient(
        logits,
        row_start(n, inner_rows, outer_stride, inner_stride),
        vocab,
        grad_logits,
        row_start(n, grad_inner_rows, grad_outer_stride, grad_inner_stride),
        part,
        label != ignore_index,
        (label - first_column).to(tl.int32),
        (tl.load(runner_up_ids + n) - first_column).to(tl.int32),
        tl.load(grad_triplet + n * 3) * factor,
        tl.load(grad_triplet + n * 3 + 1) * factor,
        tl.load(grad_triplet + n * 3 + 2) * factor,
        tl.load(triplet + n * 3 + 2),
        softcap,
        PARTS,
        SOFTCAP,
        SAME_ALIGNMENT,
        BLOCK,
    )


# --- losses of rows, and their number -------------------------------------------------------------
#
# One program serves a mean or a sum, so that the order of its additions is the same every time. Floors: 8
# bytes a label (twice with a mean), and 48 bytes a row of triplet and gradient, which the caches have.


@triton.jit
def _mean_scale(labels, rows, ignore_index, BLOCK: tl.constexpr):
    """Compute 1 / max(number of labels that are not ignored, 1) in float64."""
    i = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        counts += tl.load(labels + first + i, mask=first + i < rows, other=ignore_index) != ignore_index
    return 1.0 / tl.maximum(tl.sum(counts), 1).to(tl.float64)


@triton.jit(do_not_specialize=["rows"])
def mean_scale_kernel(labels, rows, ignore_index, scale, BLOCK: tl.constexpr):
    """Compute scale () of labels (N,)."""
    tl.store(scale, _mean_scale(labels, rows, ignore_index, BLOCK))


@triton.jit
def _log1p(s, TERMS: tl.constexpr):
    """Compute log(1 + s) for 0 <= s <= 2, to the last digits near 0.

    It is 2 artanh(s / (2 + s)), by its power series. The argument is at most 1/2.
    """
    z = s / (2 + s)
    series = 0 * z
    for i in tl.static_range(TERMS):
        series = series * (z * z) + 1 / (2 * (TERMS - i) - 1)
    return 2 * z * series


@triton.jit(do_not_specialize=["rows"])
def token_losses_kernel(
    triplet,
    labels,
    rows,
    ignore_index,
    losses,
    grad_triplet,
    LOSS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the losses (N,), or their mean or sum (), and grad_triplet (N, 3) if it is not None."""
    # A loss in float64 has all its arithmetic in float64.
    REAL: tl.constexpr = losses.dtype.element_ty
    TERMS: tl.constexpr = 26 if REAL == tl.float64 else 13
    i = tl.arange(0, BLOCK)
    begin = 0 if REDUCTION != "none" else tl.program_id(0) * BLOCK
    end = rows if REDUCTION != "none" else begin + 1
    scale = _mean_scale(labels, rows, ignore_index, BLOCK) if REDUCTION == "mean" else 1.0
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        n = first + i
        inside = n < rows
        counted = tl.load(labels + n, mask=inside, other=ignore_index) != ignore_index
        y0 = tl.load(triplet + n * 3, mask=counted, other=0.0)
        y1 = tl.load(triplet + n * 3 + 1, mask=counted, other=0.0)
        y2 = tl.load(triplet + n * 3 + 2, mask=counted, other=0.0)
        p0, p1, p2 = softmax_of_triplet(y0, y1, y2, REAL)
        if LOSS == "inverted_hinge":
            loss = (2 * p0 + p2).to(tl.float64)
            g0, g1, g2 = inverted_hinge_gradient(p0, p1, p2)
        else:
            # log(sum of exp(y)) is the largest y plus log1p(sum of the others' exp). Nothing cancels.
            high, low = tl.maximum(y1, y2), tl.minimum(y1, y2)
            top = tl.maximum(y0, high)
            others = tl.exp((tl.minimum(y0, high) - top).to(REAL)) + tl.exp((low - top).to(REAL))
            loss = (top - y0) + _log1p(others, TERMS).to(tl.float64)
            loss = tl.where(p0 == p0, loss, p0.to(tl.float64))  # a maximum does not see a NaN
            g0, g1, g2 = -(p1 + p2), p1, p2
        loss = tl.where(counted, loss, 0.0)
        if REDUCTION == "none":
            tl.store(losses + n, loss.to(REAL), mask=inside)
        else:
            total += loss
        if grad_triplet is not None:
            tl.store(grad_triplet + n * 3, tl.where(counted, g0.to(tl.float64) * scale, 0.0), mask=inside)
            tl.store(grad_triplet + n * 3 + 1, tl.where(counted, g1.to(tl.float64) * scale, 0.0), mask=inside)
            tl.store(grad_triplet + n * 3 + 2, tl.where(counted, g2.to(tl.float64) * scale, 0.0), mask=inside)
    if REDUCTION != "none":
        tl.store(losses, (tl.sum(total) * scale).to(REAL))


# --- the end of the linear operator's backward ----------------------------------------------------
#
# Floors: one read of the direction and one write of the gradient, (N, D) each, and two rows of the weight a
# token, which the L2 cache has if tokens share words. 3 instructions an entry besides conversions.


@triton.jit
def _slope(y, softcap):
    """Compute 1 - (y / softcap)^2 in float32. Only the products that may cancel are float64."""
    return ((softcap - y) * (softcap + y)).to(tl.float32) / (softcap * softcap)


@triton.jit(do_not_specialize=["factor_stride", "vocab"])
def hidden_gradient_kernel(
    grad_triplet,
    factors,
    factor_stride,
    weight,
    weight_stride,
    vocab,
    labels,
    triplet,
    runner_up_ids,
    direction,
    direction_stride,
    grad_hidden,
    columns,
    softcap,
    logit_scale,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute grad_hidden (N, D) from grad_triplet (N, 3), weight (V, D) and direction (N, D).

    It is factor (g0 slope_t weight[t] + g1 slope_r weight[r] + g2 logit_scale direction), and 0 in ignored
    rows.
    """
    n = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = grad_hidden + n.to(tl.int64) * columns + column
    runner_up_id = tl.load(runner_up_ids + n)
    if runner_up_id < 0:
        tl.store(place, tl.zeros([BLOCK], grad_hidden.dtype.element_ty), mask=inside)
        return
    factor = (
        logit_scale if factors is None else tl.load(factors + n * factor_stride).to(tl.float64) * logit_scale
    )
    g0 = tl.load(grad_triplet + n * 3) * factor
    g1 = tl.load(grad_triplet + n * 3 + 1) * factor
    g2 = tl.load(grad_triplet + n * 3 + 2) * factor
    g2 = tl.where(tl.load(triplet + n * 3 + 2) == MINUS_INFINITY, 0.0, g2)
    if SOFTCAP:
        g0 *= _slope(tl.load(triplet + n * 3), softcap)
        g1 *= _slope(tl.load(triplet + n * 3 + 1), softcap)
    # Both may have changed since the forward, and they are addresses here.
    label = tl.load(labels + n)
    assert_label(label, vocab)
    assert_label(runner_up_id, vocab)
    target_row = weight + label * weight_stride + column
    runner_up_row = weight + runner_up_id * weight_stride + column
    direction_row = direction + n.to(tl.int64) * direction_stride + column
    total = g2.to(tl.float32) * tl.load(direction_row, mask=inside, other=0.0).to(tl.float32)
    total += g0.to(tl.float32) * tl.load(target_row, mask=inside, other=0.0).to(tl.float32)
    total += g1.to(tl.float32) * tl.load(runner_up_row, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(grad_hidden.dtype.element_ty), mask=inside)


# --- scaling by a factor that only the device knows -----------------------------------------------
#
# Floors: one read and one write of the logits, or none for a factor of 1.


@triton.jit(do_not_specialize=["inner_rows", "outer_stride", "inner_stride", "vocab", "factor_stride"])
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
    entry = tl.arange(0, BLOCK)
    block = logits + aligned + begin
    for position in range(begin, end, BLOCK):
        inside = entry < body - position
        x = tl.load(block + entry, mask=inside).to(tl.float32) * factor
        tl.store(block + entry, x.to(logits.dtype.element_ty), mask=inside)
        block += BLOCK
    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid).to(tl.float32) * factor
    tl.store(logits + start + column, x.to(logits.dtype.element_ty), mask=valid)

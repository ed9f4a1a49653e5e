"""Device functions of the Triton kernels: the reduction of a row of logits, and the gradient of its entries.

A program walks a row, or one of several parts of it, in blocks that it holds in registers. It keeps the
runner-up out of the sum of the rest. The sum is relative to the largest entry of the *rest*. So neither a
dominant target nor a dominant runner-up costs the rest its digits. A block without a new runner-up is the
common case. It needs one reduction across threads, for its maximum. The terms of the sum stay in their lanes
until the end of the row.

An entry is a logit. With a softcap it is u = tanh(z / softcap) and stands for softcap * u (see
``loku_kernels/backends/__init__.py``). Arithmetic on entries is float32. Arithmetic on the triplet and its
gradient, a few numbers a row, is float64.
"""

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))
NO_COLUMN = tl.constexpr(2**31 - 1)


# --- a row ----------------------------------------------------------------------------------------
#
# A vector load of 16 bytes must be aligned, but a row of odd length may begin anywhere. So a row has a body
# of whole aligned vectors, and edges of less than a vector before and after the body. The two edges form a
# small block of their own. A `position` counts from the begin of the body, a `column` from the begin of the
# row.
#
# The length, number and begins of rows vary from batch to batch. The kernels do not specialise on them. A new
# compilation for a number that is 1 or a multiple of 16 would gain nothing, because `split_row` finds the
# aligned part.


@triton.jit
def row_start(n, inner_rows, outer_stride, inner_stride):
    """Compute the offset, in 64 bits, of row n of a tensor whose rows come in groups of ``inner_rows``."""
    return (n // inner_rows).to(tl.int64) * outer_stride + (n % inner_rows).to(tl.int64) * inner_stride


@triton.jit
def split_row(start, vocab, VECTOR: tl.constexpr):
    """Return the offset of the first aligned vector, the columns before it, and the body's length."""
    aligned = (start + (VECTOR - 1)) // VECTOR * VECTOR
    head = tl.minimum((aligned - start).to(tl.int32), vocab)
    body = (vocab - head) // VECTOR * VECTOR
    return aligned, head, body


@triton.jit
def part_of(body, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the begin, a multiple of BLOCK, and the end of a part of the body. It may be empty."""
    length = tl.cdiv(tl.cdiv(body, BLOCK), PARTS) * BLOCK
    begin = part * length
    return begin, tl.minimum(begin + length, body)


@triton.jit
def edge_columns(head, body, vocab, asked, VECTOR: tl.constexpr):
    """Return the columns of the edges, and a mask of the valid ones, which is false if not ``asked``."""
    i = tl.arange(0, 2 * VECTOR)
    column = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return column, ((i < head) | (i >= VECTOR)) & (column < tl.where(asked, vocab, 0))


@triton.jit
def _exp_of_difference(x, reference, softcap, SOFTCAP: tl.constexpr):
    """Compute exp(y - y_reference) of entries x and a reference entry."""
    difference = x - reference
    if SOFTCAP:
        difference *= softcap
    return tl.exp(difference)


@triton.jit
def _take_runner_up(x, column, target, runner_up, runner_up_id):
    """Take the target, and a new runner-up if there is one, out of entries x at ``column``.

    Returns:
        x with -inf in place of both, the largest entry that joins the rest, the former runner-up (-inf if it
        stays), the runner-up, and its column. The former runner-up joins the rest too.
    """
    x = tl.where(column == target, MINUS_INFINITY, x)
    top = tl.max(x)
    best = tl.min(tl.where(x == top, column, NO_COLUMN))
    # The lower column wins on ties. The ids are compared, because the edge at the begin of a row comes last.
    take = (top > runner_up) | ((top == runner_up) & (best < runner_up_id) & (top > MINUS_INFINITY))
    x = tl.where(column == tl.where(take, best, -1), MINUS_INFINITY, x)
    leaving = tl.where(take, runner_up, MINUS_INFINITY)
    joining = tl.maximum(tl.max(x), leaving)
    return x, joining, leaving, tl.where(take, top, runner_up), tl.where(take, best, runner_up_id)


@triton.jit
def _raise_largest(largest, joining, softcap, SOFTCAP: tl.constexpr):
    """Return the new largest entry of the rest, the entry to subtract, and the factor of earlier terms."""
    new_largest = tl.maximum(largest, joining)
    # If all entries are masked, no entry can be subtracted. A NaN shows in the sum for any reference.
    reference = tl.where(new_largest == MINUS_INFINITY, 0.0, new_largest)
    return new_largest, reference, _exp_of_difference(largest, reference, softcap, SOFTCAP)


@triton.jit
def reduce_row(
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
    """Reduce a part of the row at offset ``start``. The last part includes the edges.

    Returns:
        The runner-up, its column, the largest entry of the rest, and the sum over the rest of
        exp(y - largest).
    """
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = split_row(start, vocab, VECTOR)
    begin, end = part_of(body, part, PARTS, BLOCK)

    runner_up = MINUS_INFINITY
    runner_up_id = (target == 0).to(tl.int32)  # the lowest other column, if all are masked
    largest = MINUS_INFINITY
    demoted = 0.0  # sum of the terms of former runner-ups
    terms = tl.zeros([BLOCK // VECTOR], tl.float32)  # the other terms, one lane for each vector of a block
    lane = tl.arange(0, BLOCK)
    block = logits + aligned + begin
    for position in range(begin, end, BLOCK):
        x = tl.load(block + lane, mask=lane < body - position, other=MINUS_INFINITY).to(tl.float32)
        block += BLOCK
        joining = tl.max(x)  # largest entry that joins the rest
        leaving = MINUS_INFINITY
        offset = position + head  # column of the block's first entry
        if (joining > runner_up) | ((target >= offset) & (target < offset + BLOCK)):
            # Lanes stand for columns here, because they take no registers.
            x, joining, leaving, runner_up, runner_up_id = _take_runner_up(
                x, lane, target - offset, runner_up, runner_up_id - offset
            )
            runner_up_id += offset
        largest, reference, factor = _raise_largest(largest, joining, softcap, SOFTCAP)
        share = _exp_of_difference(x, reference, softcap, SOFTCAP)
        terms = terms * factor + tl.sum(tl.reshape(share, [BLOCK // VECTOR, VECTOR]), 1)
        demoted = demoted * factor + _exp_of_difference(leaving, reference, softcap, SOFTCAP)

    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid, other=MINUS_INFINITY).to(tl.float32)
    x, joining, leaving, runner_up, runner_up_id = _take_runner_up(x, column, target, runner_up, runner_up_id)
    largest, reference, factor = _raise_largest(largest, joining, softcap, SOFTCAP)
    total = (tl.sum(terms) + demoted) * factor
    total += tl.sum(_exp_of_difference(x, reference, softcap, SOFTCAP))
    total += _exp_of_difference(leaving, reference, softcap, SOFTCAP)
    return runner_up, runner_up_id, largest, total


# --- a row's numbers ------------------------------------------------------------------------------


@triton.jit
def assert_label(label, vocab):
    """Assert that a label is in the vocabulary."""
    tl.device_assert((label >= 0) & (label < vocab), "loku_kernels: a label is outside the vocabulary")


@triton.jit
def exact_logit(x, softcap, SOFTCAP: tl.constexpr):
    """Return the logit of an entry in float64."""
    y = x.to(tl.float64)
    return y * softcap if SOFTCAP else y


@triton.jit
def log_of_rest(largest, total):
    """Compute the log of the sum of the exponentials of the rest. It is -inf without a rest."""
    return largest + tl.log(total.to(tl.float64))


@triton.jit
def write_triplet(triplet, runner_up_ids, n, target, runner_up, rest, runner_up_id):
    """Store the triplet and the runner-up's column of row n."""
    tl.store(triplet + n * 3, target)
    tl.store(triplet + n * 3 + 1, runner_up)
    tl.store(triplet + n * 3 + 2, rest)
    tl.store(runner_up_ids + n, runner_up_id.to(tl.int64))


@triton.jit
def write_ignored(triplet, runner_up_ids, n):
    """Store zeros and -1 for an ignored row n."""
    zero = tl.full((), 0.0, tl.float64)
    write_triplet(triplet, runner_up_ids, n, zero, zero, zero, tl.full((), -1, tl.int32))


@triton.jit
def inverted_hinge_gradient(target, runner_up, rest, scale):
    """Compute ``scale`` times the gradient of IHL = 1 + p_0 - p_1 in the triplet, with p its softmax.

    Only sums of probabilities occur, so nothing cancels for p_0 near 1.

    Every thread of a program computes this. The exponentials and quotients are float32, because float64 would
    take some 200 instructions more. An H100 has half as many units for float64 as for float32, other GPUs
    have a 64th. Only the differences are float64.
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
    """Compute g0 at the target, g1 at the runner-up and g2 exp(y - rest) elsewhere, times the slope."""
    # `rest` is split into two floats. One float would lose the digits that exp() needs at a large offset.
    rest_high = rest.to(tl.float32)
    rest_low = (rest - rest_high.to(tl.float64)).to(tl.float32)
    missing = rest == MINUS_INFINITY  # no rest, so no gradient
    rest_high, rest_low = tl.where(missing, 0.0, rest_high), tl.where(missing, 0.0, rest_low)
    share = tl.exp(((x * softcap if SOFTCAP else x) - rest_high) - rest_low)
    grad = share * tl.where(missing, 0.0, g2.to(tl.float32))
    grad = tl.where(column == target, g0.to(tl.float32), grad)
    grad = tl.where(column == runner_up_id, g1.to(tl.float32), grad)
    return grad * ((1.0 - x) * (1.0 + x)) if SOFTCAP else grad


@triton.jit
def write_gradient(
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
    """Store the gradient of a part of the row at offset ``start``. The last part includes the edges.

    The result goes to the offset ``out_start`` of ``out``, which may be the logits. A row that is not
    ``counted`` gets zeros and is not read. SAME_ALIGNMENT says that each row of ``out`` begins as far from an
    aligned vector as its row of logits.
    """
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = split_row(start, vocab, VECTOR)
    if SAME_ALIGNMENT:
        out_aligned, _, _ = split_row(out_start, vocab, VECTOR)
    else:
        out_aligned = out_start + head
    begin, end = part_of(body, part, PARTS, BLOCK)
    readable, readable_body = tl.where(counted, vocab, 0), tl.where(counted, body, 0)
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(blocks):  # backwards, because the cache still has the last blocks of an earlier pass
        position = begin + (blocks - 1 - i) * BLOCK
        x = tl.load(logits + aligned + position + lane, mask=lane < readable_body - position, other=0.0)
        offset = position + head  # column of the block's first entry
        grad = _gradient_of_entries(
            x.to(tl.float32), lane, target - offset, runner_up_id - offset, g0, g1, g2, rest, softcap, SOFTCAP
        )
        tl.store(
            out + out_aligned + position + lane, grad.to(out.dtype.element_ty), mask=lane < body - position
        )
    # The edges are so short that several threads hold each entry. Only one of them stores it, after its load.
    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid & (column < readable), other=0.0).to(tl.float32)
    grad = _gradient_of_entries(x, column, target, runner_up_id, g0, g1, g2, rest, softcap, SOFTCAP)
    tl.store(out + out_start + column, grad.to(out.dtype.element_ty), mask=valid)

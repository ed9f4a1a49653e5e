"""Device functions of the Triton kernels: the reduction of a row of logits, and the gradient of its entries.

A program walks a row, or one of several parts of it, in blocks. A lane is the place of a vector of 16 bytes
in a block. Each lane keeps the largest entry that it has met and its sum of exponentials relative to that
entry. So the loop has no reduction across threads and no branch on the logits. The lanes meet at the end of
the row. The runner-up is then in one lane's sum. If it leads, a subtraction would cost that sum its digits.
So that lane's entries, V / lanes of them, are read once more and summed without the runner-up.

An entry is a logit. With a softcap it is u = tanh(z / softcap) and stands for softcap * u (see
``loku_kernels/backends/__init__.py``). Arithmetic on entries is float32. Arithmetic on the triplet and its
gradient, a few numbers a row, is float64.
"""

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))
NO_COLUMN = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)
AGAIN = tl.constexpr(32)  # vectors of the runner-up's lane that are read at a time


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
def exp_of_difference(difference, softcap, SOFTCAP: tl.constexpr):
    """Compute exp(y - y_reference) from a difference of entries.

    exp2 is one instruction. It flushes subnormal results to 0. exp would take four.
    """
    return tl.exp2(difference * ((softcap * LOG2_E) if SOFTCAP else LOG2_E))


@triton.jit
def finite(largest):
    """Return the entry to subtract. If all entries are masked, that is 0, because -inf - -inf is NaN."""
    return tl.where(largest == MINUS_INFINITY, 0.0, largest)


@triton.jit
def _is_at(lane, inner, position):
    """Say which entry of a block (lanes, entries of a vector) is at a position in the block.

    A compiler knows each thread's ``inner``, so the comparison takes few registers.
    """
    VECTOR: tl.constexpr = inner.shape[0]
    return (lane == position // VECTOR)[:, None] & (inner == position % VECTOR)[None, :]


@triton.jit
def take_block(x, largest, terms, softcap, SOFTCAP: tl.constexpr):
    """Take a block (lanes, entries of a vector) into the lanes' largest entries and sums.

    Returns:
        The block's largest entries, those of all, and the sums relative to them.
    """
    x = x.to(tl.float32)
    top = tl.max(x, 1)
    raised = tl.maximum(largest, top)
    reference = finite(raised)
    terms *= exp_of_difference(largest - reference, softcap, SOFTCAP)
    return top, raised, terms + tl.sum(exp_of_difference(x - reference[:, None], softcap, SOFTCAP), 1)


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
    LANES: tl.constexpr = BLOCK // VECTOR
    aligned, head, body = split_row(start, vocab, VECTOR)
    begin, end = part_of(body, part, PARTS, BLOCK)
    target_position = target - head

    lane, inner = tl.arange(0, LANES), tl.arange(0, VECTOR)
    entry = lane[:, None] * VECTOR + inner[None, :]
    largest = tl.full([LANES], MINUS_INFINITY, tl.float32)
    terms = tl.zeros([LANES], tl.float32)
    met = tl.zeros([LANES], tl.int32)  # position of the block in which the lane first met its largest entry
    # The block of the target comes last, so that the loop need not look for the target.
    here = (target_position >= begin) & (target_position < end)
    last = tl.where(here, begin + (target_position - begin) // BLOCK * BLOCK, end)
    body_row = logits + aligned
    last_x = tl.load(body_row + last + entry, mask=entry < end - last, other=MINUS_INFINITY)
    position = tl.where(last == begin, begin + BLOCK, begin)
    ahead = tl.load(body_row + position + entry, mask=entry < end - position, other=MINUS_INFINITY)
    for _ in range(begin, tl.where(here, end - BLOCK, end), BLOCK):
        top, raised, terms = take_block(ahead, largest, terms, softcap, SOFTCAP)
        met = tl.where(top > largest, position, met)
        largest = raised
        position += tl.where(position + BLOCK == last, 2 * BLOCK, BLOCK)
        ahead = tl.load(body_row + position + entry, mask=entry < end - position, other=MINUS_INFINITY)
    last_x = tl.where(_is_at(lane, inner, target_position - last), MINUS_INFINITY, last_x)
    top, raised, terms = take_block(last_x, largest, terms, softcap, SOFTCAP)
    met = tl.where((top > largest) | ((top == largest) & (last < met)), last, met)
    largest = raised

    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    edge = tl.load(logits + start + column, mask=valid & (column != target), other=MINUS_INFINITY)
    edge = edge.to(tl.float32)

    # The runner-up, and the lowest column that has it. In the body the earliest vector that has it decides.
    runner_up = tl.maximum(tl.max(largest), tl.max(edge))
    masked = runner_up == MINUS_INFINITY
    vector = tl.min(tl.where((largest == runner_up) & (not masked), met + lane * VECTOR, NO_COLUMN))
    missing = vector == NO_COLUMN
    position = tl.where(missing, 0, vector) + inner
    readable = position < tl.where(missing, 0, end)
    tied = tl.load(logits + aligned + position, mask=readable, other=MINUS_INFINITY).to(tl.float32)
    is_tied = readable & (tied == runner_up) & (position != target_position)
    of_body = tl.min(tl.where(is_tied, head + position, NO_COLUMN))
    of_edge = tl.min(tl.where((edge == runner_up) & valid & (column != target), column, NO_COLUMN))
    # If all other words are masked, it is the lowest of them.
    runner_up_id = tl.where(masked, (target == 0).to(tl.int32), tl.minimum(of_body, of_edge))

    # The lane of the runner-up, without the runner-up.
    again = tl.where(of_body < of_edge, vector // VECTOR % LANES, LANES)  # no lane if it is in an edge
    again_largest = MINUS_INFINITY
    again_terms = 0.0
    for first in range(begin, tl.where(again < LANES, end, begin), AGAIN * BLOCK):
        place = first + tl.arange(0, AGAIN)[:, None] * BLOCK + again * VECTOR + inner[None, :]
        keep = (place < end) & (place != target_position) & (place != runner_up_id - head)
        x = tl.load(logits + aligned + place, mask=keep, other=MINUS_INFINITY).to(tl.float32)
        again_raised = tl.maximum(again_largest, tl.max(x))
        again_reference = finite(again_raised)
        again_terms *= exp_of_difference(again_largest - again_reference, softcap, SOFTCAP)
        again_terms += tl.sum(exp_of_difference(x - again_reference, softcap, SOFTCAP))
        again_largest = again_raised

    # A NaN is never taken out. If all other words are masked but it, `runner_up_id` may be its column.
    edge = tl.where((column == runner_up_id) & (edge == runner_up), MINUS_INFINITY, edge)
    largest = tl.where(lane == again, MINUS_INFINITY, largest)
    rest_largest = tl.maximum(tl.maximum(tl.max(largest), again_largest), tl.max(edge))
    reference = finite(rest_largest)
    total = tl.sum(terms * exp_of_difference(largest - reference, softcap, SOFTCAP))
    total += tl.sum(exp_of_difference(edge - reference, softcap, SOFTCAP))
    total += again_terms * exp_of_difference(again_largest - reference, softcap, SOFTCAP)
    return runner_up, runner_up_id, rest_largest, total


@triton.jit
def combine_parts(partial, partial_ids, n, softcap, PARTS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Combine the results of ``reduce_row`` for the parts of row n. Returns the row's."""
    place = n.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    tops = tl.load(partial + place * 3)
    largests = tl.load(partial + place * 3 + 1)
    totals = tl.load(partial + place * 3 + 2)
    ids = tl.load(partial_ids + place)
    runner_up = tl.max(tops)
    runner_up_id = tl.min(tl.where(tops == runner_up, ids, NO_COLUMN))
    demoted = tl.where(ids == runner_up_id, MINUS_INFINITY, tops)  # the other parts' join the rest
    largest = tl.maximum(tl.max(demoted), tl.max(largests))
    reference = finite(largest)
    totals *= exp_of_difference(largests - reference, softcap, SOFTCAP)
    totals += exp_of_difference(demoted - reference, softcap, SOFTCAP)
    return runner_up, runner_up_id, largest, tl.sum(totals)


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
def softmax_of_triplet(target, runner_up, rest, REAL: tl.constexpr):
    """Compute the softmax p0, p1, p2 of triplets in the type REAL. Only the differences are float64.

    float64 exponentials and quotients would take some 200 instructions more. An H100 has half as many units
    for float64 as for float32, other GPUs have a 64th.
    """
    top = tl.maximum(target, tl.maximum(runner_up, rest))
    e0 = tl.exp((target - top).to(REAL))
    e1 = tl.exp((runner_up - top).to(REAL))
    e2 = tl.exp((rest - top).to(REAL))
    total = e0 + e1 + e2
    return e0 / total, e1 / total, e2 / total


@triton.jit
def inverted_hinge_gradient(p0, p1, p2):
    """Compute the gradient of IHL = 1 + p0 - p1 in the triplet, with p its softmax.

    Only sums of probabilities occur, so nothing cancels for p0 near 1.
    """
    return p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)


# --- the gradient of a row's entries --------------------------------------------------------------


@triton.jit
def _slope_of(x, SOFTCAP: tl.constexpr):
    """Return dy/dz of entries. It is 1 without a softcap."""
    return (1.0 - x) * (1.0 + x) if SOFTCAP else 1.0


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

    # `rest` is split into the entry nearest to it and a difference. The entry alone would lose the digits
    # that exp() needs at a large offset. The difference, at most log V, becomes a factor. Without a rest
    # there is no gradient.
    missing = rest == MINUS_INFINITY
    rest_entry = rest.to(tl.float32) / softcap if SOFTCAP else rest.to(tl.float32)
    rest_low = tl.where(missing, 0.0, (rest - exact_logit(rest_entry, softcap, SOFTCAP)).to(tl.float32))
    rest_entry = tl.where(missing, 0.0, rest_entry)
    g0 = tl.where(counted, g0.to(tl.float32), 0.0)
    g1 = tl.where(counted, g1.to(tl.float32), 0.0)
    g2 = tl.where(missing | (not counted), 0.0, g2.to(tl.float32)) * tl.exp2(-rest_low * LOG2_E)

    lane, inner = tl.arange(0, BLOCK // VECTOR), tl.arange(0, VECTOR)
    entry = lane[:, None] * VECTOR + inner[None, :]
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(blocks):  # backwards, because the cache still has the last blocks of an earlier pass
        position = begin + (blocks - 1 - i) * BLOCK
        x = tl.load(logits + aligned + position + entry, mask=entry < readable_body - position, other=0.0)
        x = x.to(tl.float32)
        grad = exp_of_difference(x - rest_entry, softcap, SOFTCAP) * g2
        t, r = target - head - position, runner_up_id - head - position
        if ((t >= 0) & (t < BLOCK)) | ((r >= 0) & (r < BLOCK)):
            grad = tl.where(_is_at(lane, inner, t), g0, grad)
            grad = tl.where(_is_at(lane, inner, r), g1, grad)
        grad = (grad * _slope_of(x, SOFTCAP)).to(out.dtype.element_ty)
        tl.store(out + out_aligned + position + entry, grad, mask=entry < body - position)
    # The edges are so short that several threads hold each entry. Only one of them stores it, after its load.
    column, valid = edge_columns(head, body, vocab, part == PARTS - 1, VECTOR)
    x = tl.load(logits + start + column, mask=valid & (column < readable), other=0.0).to(tl.float32)
    grad = exp_of_difference(x - rest_entry, softcap, SOFTCAP) * g2
    grad = tl.where(column == target, g0, tl.where(column == runner_up_id, g1, grad))
    grad = (grad * _slope_of(x, SOFTCAP)).to(out.dtype.element_ty)
    tl.store(out + out_start + column, grad, mask=valid)

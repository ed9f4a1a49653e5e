"""KL divergence of rows of logits from a reference's, Triton kernel: one launch for divergence and gradient.

A program takes a row of both models. The first pass computes the normalizers, the second the divergence and
the gradient. The second pass subtracts the normalizers as plain torch does, so a probability near 1 and a
divergence near 0 keep their digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton.rows import (
    MINUS_INFINITY,
    edge_columns,
    exp_of,
    finite,
    split_row,
    take_block,
)
from loku_kernels.backends.triton.triplet import on_device, same_alignment

# Warps of a program. Each thread holds one vector of 16 bytes of both rows at a time. Some AMD devices have
# warps twice as wide.
WARPS = 8 if torch.version.hip else 16


@triton.jit
def _normalizer(logits, start, vocab, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the largest entry of the row at offset ``start``, and log of the sum of exp(y - y_largest)."""
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = split_row(start, vocab, VECTOR)
    entry = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([BLOCK // VECTOR], MINUS_INFINITY, tl.float32)
    terms = tl.zeros([BLOCK // VECTOR], tl.float32)
    for position in range(0, body, BLOCK):
        x = tl.load(logits + aligned + position + entry, mask=entry < body - position, other=MINUS_INFINITY)
        _, largest, terms = take_block(x, largest, terms, softcap, SOFTCAP)
    column, valid = edge_columns(head, body, vocab, True, VECTOR)
    edge = tl.load(logits + start + column, mask=valid, other=MINUS_INFINITY).to(tl.float32)
    top = tl.maximum(tl.max(largest), tl.max(edge))
    reference = finite(top)
    total = tl.sum(terms * exp_of(largest - reference, softcap, SOFTCAP))
    total += tl.sum(exp_of(edge - reference, softcap, SOFTCAP))
    return top, tl.log(total.to(tl.float64)).to(tl.float32)


@triton.jit
def _terms_and_gradient(x, r, top_p, log_p, top_q, log_q, softcap, SOFTCAP: tl.constexpr):
    """Compute q (log q - log p) and (p - q) times the slope of entries x of the model, r of the reference."""
    x, r = x.to(tl.float32), r.to(tl.float32)
    scale = softcap if SOFTCAP else 1.0
    log_of_p = (x - top_p) * scale - log_p
    log_of_q = (r - top_q) * scale - log_q
    p, q = tl.exp(log_of_p), tl.exp(log_of_q)
    slope = (1.0 - x) * (1.0 + x) if SOFTCAP else 1.0
    return tl.where(q == 0.0, 0.0, q * (log_of_q - log_of_p)), (p - q) * slope


# Floors: one read of both rows, and one write of a row for a gradient. The second pass is free of main memory
# if the L2 cache still has the rows.


@triton.jit(do_not_specialize=["row_stride", "reference_stride", "vocab"])
def divergence_kernel(
    logits,
    row_stride,
    reference_logits,
    reference_stride,
    vocab,
    softcap,
    divergences,
    normalizers,
    STORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute divergences (N,) and normalizers (2, N, 2) of logits (N, V) and reference_logits (N, V).

    With STORE the gradient overwrites the logits.
    """
    n = tl.program_id(0)
    start, start_q = n.to(tl.int64) * row_stride, n.to(tl.int64) * reference_stride
    top_p, log_p = _normalizer(logits, start, vocab, softcap, SOFTCAP, BLOCK)
    top_q, log_q = _normalizer(reference_logits, start_q, vocab, softcap, SOFTCAP, BLOCK)
    # Every thread has read the row, and each is about to overwrite a part of it.
    tl.debug_barrier()

    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    aligned, head, body = split_row(start, vocab, VECTOR)
    if SAME_ALIGNMENT:
        aligned_q, _, _ = split_row(start_q, vocab, VECTOR)
    else:
        aligned_q = start_q + head
    entry = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    sums = tl.zeros([BLOCK // VECTOR], tl.float32)
    blocks = tl.cdiv(body, BLOCK)
    for i in range(blocks):  # backwards, because the cache still has the last blocks of the first pass
        position = (blocks - 1 - i) * BLOCK
        inside = entry < body - position
        x = tl.load(logits + aligned + position + entry, mask=inside, other=MINUS_INFINITY)
        r = tl.load(reference_logits + aligned_q + position + entry, mask=inside, other=MINUS_INFINITY)
        terms, grad = _terms_and_gradient(x, r, top_p, log_p, top_q, log_q, softcap, SOFTCAP)
        sums += tl.sum(terms, 1)
        if STORE:
            tl.store(logits + aligned + position + entry, grad.to(logits.dtype.element_ty), mask=inside)
    column, valid = edge_columns(head, body, vocab, True, VECTOR)
    x = tl.load(logits + start + column, mask=valid, other=MINUS_INFINITY)
    r = tl.load(reference_logits + start_q + column, mask=valid, other=MINUS_INFINITY)
    terms, grad = _terms_and_gradient(x, r, top_p, log_p, top_q, log_q, softcap, SOFTCAP)
    if STORE:
        tl.store(logits + start + column, grad.to(logits.dtype.element_ty), mask=valid)
    tl.store(divergences + n, tl.sum(sums) + tl.sum(terms))
    scale = softcap if SOFTCAP else 1.0
    of_q = normalizers + (tl.num_programs(0) + n) * 2
    tl.store(normalizers + n * 2, top_p * scale)
    tl.store(normalizers + n * 2 + 1, log_p)
    tl.store(of_q, top_q * scale)
    tl.store(of_q + 1, log_q)


def divergence_(
    logits: Tensor, reference_logits: Tensor, *, softcap: float, store: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.divergence_``. The reference's logits stay as they are."""
    rows, vocab = logits.shape
    divergences = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizers = torch.empty((2, rows, 2), dtype=torch.float32, device=logits.device)
    if rows:
        with on_device(logits.device):
            divergence_kernel[(rows,)](
                logits,
                logits.stride(0),
                reference_logits,
                reference_logits.stride(0),
                vocab,
                softcap,
                divergences,
                normalizers,
                STORE=store,
                SOFTCAP=softcap > 0,
                SAME_ALIGNMENT=same_alignment(logits, reference_logits),
                BLOCK=8192 // logits.element_size(),
                num_warps=WARPS,
            )
    return divergences, normalizers

"""KL divergence of rows of logits: the Triton kernel and its launch.

Floors: two reads of both models' logits, and one write of the model's. The L2 cache serves the second read if
it still has the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.reference import divergence_ as plain_divergence_
from loku_kernels.backends.triton.rows import (
    LOG2_E,
    MINUS_INFINITY,
    edge_columns,
    exp_of_difference,
    finite,
    split_row,
    take_block,
)
from loku_kernels.backends.triton.triplet import on_device

BLOCK_BYTES = 8192  # bytes of a row that a program holds at a time
WARPS = 8  # warps of a program


@triton.jit
def _join(largest, terms, edge, softcap, SOFTCAP: tl.constexpr):
    """Return a row's largest entry, and the logarithm of the sum of exponentials relative to it."""
    top = tl.maximum(tl.max(largest), tl.max(edge))
    reference = finite(top)
    total = tl.sum(terms * exp_of_difference(largest - reference, softcap, SOFTCAP))
    total += tl.sum(exp_of_difference(edge - reference, softcap, SOFTCAP))
    return top, tl.log(total)


@triton.jit
def _divergence_of_entries(x, z, top_p, log_p, top_q, log_q, softcap, SOFTCAP: tl.constexpr):
    """Return q (log q - log p), and (p - q) times the slope, of entries x and z of both models."""
    # The largest entry is subtracted first. So a word that is nearly sure keeps its digits.
    difference_p, difference_q = x - top_p, z - top_q
    if SOFTCAP:
        difference_p *= softcap
        difference_q *= softcap
    difference_p -= log_p
    difference_q -= log_q
    p, q = tl.exp2(difference_p * LOG2_E), tl.exp2(difference_q * LOG2_E)
    term = tl.where(q == 0.0, 0.0, q * (difference_q - difference_p))
    return term, (p - q) * ((1.0 - x) * (1.0 + x)) if SOFTCAP else p - q


@triton.jit(do_not_specialize=["row_stride", "vocab"])
def divergence_kernel(
    logits,
    reference_logits,
    row_stride,
    vocab,
    softcap,
    divergences,
    normalizers,
    STORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute divergences (N,) and normalizers (2, N, 2) of rows of logits (N, V).

    The rows lie alike in both tensors. With STORE the gradient of the divergence overwrites ``logits``.
    """
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // VECTOR
    n = tl.program_id(0)
    start = n.to(tl.int64) * row_stride
    aligned, head, body = split_row(start, vocab, VECTOR)
    entry = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    column, valid = edge_columns(head, body, vocab, True, VECTOR)

    largest_p = tl.full([LANES], MINUS_INFINITY, tl.float32)
    largest_q = largest_p
    terms_p = tl.zeros([LANES], tl.float32)
    terms_q = terms_p
    for position in range(0, body, BLOCK):
        inside = entry < body - position
        x = tl.load(logits + aligned + position + entry, mask=inside, other=MINUS_INFINITY)
        z = tl.load(reference_logits + aligned + position + entry, mask=inside, other=MINUS_INFINITY)
        _, largest_p, terms_p = take_block(x, largest_p, terms_p, softcap, SOFTCAP)
        _, largest_q, terms_q = take_block(z, largest_q, terms_q, softcap, SOFTCAP)
    edge_p = tl.load(logits + start + column, mask=valid, other=MINUS_INFINITY).to(tl.float32)
    edge_q = tl.load(reference_logits + start + column, mask=valid, other=MINUS_INFINITY).to(tl.float32)
    top_p, log_p = _join(largest_p, terms_p, edge_p, softcap, SOFTCAP)
    top_q, log_q = _join(largest_q, terms_q, edge_q, softcap, SOFTCAP)

    sums = tl.zeros([LANES], tl.float32)
    blocks = tl.cdiv(body, BLOCK)
    for i in range(blocks):  # backwards, because the cache still has the last blocks of the first pass
        position = (blocks - 1 - i) * BLOCK
        inside = entry < body - position
        x = tl.load(logits + aligned + position + entry, mask=inside, other=MINUS_INFINITY).to(tl.float32)
        z = tl.load(reference_logits + aligned + position + entry, mask=inside, other=MINUS_INFINITY)
        term, grad = _divergence_of_entries(x, z.to(tl.float32), top_p, log_p, top_q, log_q, softcap, SOFTCAP)
        sums += tl.sum(term, 1)
        if STORE:
            tl.store(logits + aligned + position + entry, grad.to(logits.dtype.element_ty), mask=inside)
    term, grad = _divergence_of_entries(edge_p, edge_q, top_p, log_p, top_q, log_q, softcap, SOFTCAP)
    if STORE:
        # The edges are so short that several threads hold each entry. All have loaded it before one stores.
        tl.debug_barrier()
        tl.store(logits + start + column, grad.to(logits.dtype.element_ty), mask=valid)
    tl.store(divergences + n, tl.sum(sums) + tl.sum(tl.where(valid, term, 0.0)))
    scale = softcap if SOFTCAP else 1.0
    tl.store(normalizers + n * 2, top_p * scale)
    tl.store(normalizers + n * 2 + 1, log_p)
    normalizers += tl.num_programs(0) * 2
    tl.store(normalizers + n * 2, top_q * scale)
    tl.store(normalizers + n * 2 + 1, log_q)


def divergence_(
    logits: Tensor, reference_logits: Tensor, *, softcap: float, store: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.divergence_``."""
    alike = logits.stride() == reference_logits.stride() and logits.dtype == reference_logits.dtype
    if not alike or logits.stride(-1) != 1 or (logits.data_ptr() - reference_logits.data_ptr()) % 16:
        return plain_divergence_(logits, reference_logits, softcap=softcap, store=store)
    rows, vocab = logits.shape
    divergence = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizers = torch.empty(2, rows, 2, dtype=torch.float32, device=logits.device)
    if rows:
        with on_device(logits.device):
            divergence_kernel[(rows,)](
                logits,
                reference_logits,
                logits.stride(0),
                vocab,
                softcap,
                divergence,
                normalizers,
                STORE=store,
                SOFTCAP=softcap > 0,
                BLOCK=BLOCK_BYTES // logits.element_size(),
                num_warps=WARPS,
            )
    return divergence, normalizers

"""One block of logits at a time: what the ops are made of, on the backend that serves the tensor.

Every function takes logits (..., V) whose last dimension is contiguous and labels (...). Those that take
``first`` take logits of the columns [first, first + C) only. With a softcap an entry is
u = tanh(z / softcap), standing for the logit y = softcap * u: neither y nor the slope dy/dz = 1 - u^2 is
then rounded to the logits' dtype. A softcap of 0 means none: an entry is a logit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loku_kernels import native, reference
from loku_kernels.dispatch import backend

_REFERENCE_ENTRIES = 1 << 22  # entries of a float64 piece in the reference: 32 MiB


def check_labels(labels, vocab, ignore_index):
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if labels.device.type == "cpu":
        if bad.any():
            position = bad.reshape(-1).nonzero()[0].item()
            native.raise_bad_label(labels, position, vocab, ignore_index)
    else:
        torch._assert_async(~bad.any(), "loku_kernels: a label is outside the vocabulary")


def _kernels(op, logits, labels, ignore_index):
    """The backend of an op that reads labels. Kernels check those, but in Triton's interpreter."""
    kernels = backend(op, logits)
    if kernels not in (None, native) and labels.device.type == "cpu":
        check_labels(labels, logits.shape[-1], ignore_index)
    return kernels


def _row_pieces(logits, *per_row):
    """Views of a few rows each, so that the reference's float64 copies stay small."""
    tensors = (logits, *per_row)
    if logits.dim() == 1:
        yield tuple(x.unsqueeze(0) for x in tensors)
    elif logits.dim() == 2:
        rows = max(1, _REFERENCE_ENTRIES // logits.shape[-1])
        yield from zip(*(x.split(rows) for x in tensors), strict=True)
    else:
        for parts in zip(*(x.unbind(0) for x in tensors), strict=True):
            yield from _row_pieces(*parts)


def triplet_forward(logits, labels, ignore_index):
    """triplet (..., 3) float64 and runner_up_id (...) int64."""
    kernels = _kernels("triplet_forward", logits, labels, ignore_index)
    if kernels:
        return kernels.triplet_forward(logits, labels, ignore_index)
    check_labels(labels, logits.shape[-1], ignore_index)
    triplet = torch.empty(*labels.shape, 3, dtype=torch.float64, device=logits.device)
    runner_up_id = torch.empty_like(labels, memory_format=torch.contiguous_format)
    for y, t, out, out_id in _row_pieces(logits, labels, triplet, runner_up_id):
        piece, piece_id = reference.softmax_triplet(y, t, ignore_index)
        out.copy_(piece)
        out_id.copy_(piece_id)
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, *, first=0, softcap=0.0, out=None
):
    """Gradient of the logits in their dtype, contiguous, or in ``out``, which may be the logits, or of
    another dtype: then the logits may be overwritten too."""
    kernels = backend("triplet_backward", logits)
    if kernels is native and out is not None and out.dtype != logits.dtype:  # its kernels know one dtype
        arguments = (grad_triplet, logits, labels, ignore_index, triplet, runner_up_id)
        return out.copy_(native.triplet_backward(*arguments, first=first, softcap=softcap, out=logits))
    if kernels:
        return kernels.triplet_backward(
            grad_triplet,
            logits,
            labels,
            ignore_index,
            triplet,
            runner_up_id,
            first=first,
            softcap=softcap,
            out=out,
        )
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for y, t, saved, r, g, target in _row_pieces(logits, labels, triplet, runner_up_id, grad_triplet, out):
        target.copy_(reference.softmax_triplet_backward(g, y, t, ignore_index, saved, r, first, softcap))
    return out


def inverted_hinge_(logits, labels, ignore_index, scale):
    """Overwrite the logits with ``scale``, a float64 tensor (), x the gradient of the rows' IHL; return the
    triplets."""
    kernels = _kernels("inverted_hinge_", logits, labels, ignore_index)
    if kernels:
        return kernels.inverted_hinge_(logits, labels, ignore_index, scale)
    triplet, runner_up_id = triplet_forward(logits, labels, ignore_index)
    p0, p1, p2 = triplet.softmax(-1).unbind(-1)
    # d IHL = p_j (g_j - sum_i g_i p_i) with g = (1, -1, 0), as sums of probabilities: nothing cancels
    grad = torch.stack([p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)], -1) * scale
    triplet_backward(grad, logits, labels, ignore_index, triplet, runner_up_id, out=logits)
    return triplet, runner_up_id


class OnlineState(NamedTuple):
    """Triplets of N rows whose columns come in several blocks."""

    numbers: Tensor  # (N, 4) float64: target, runner_up, rest_max, sum over the rest of exp(y - rest_max)
    runner_up_id: Tensor  # (N,) int64
    rescale: Tensor  # (N,) float32: exp(rest_max before the last block - rest_max now), for earlier terms
    demoted_id: Tensor  # (N,) int64: a runner-up of earlier blocks that the last one put into the rest, or -1
    demoted_share: Tensor  # (N,) float32: its term, exp(y - rest_max) times the softcap's slope

    @classmethod
    def start(cls, labels):
        n, device = labels.numel(), labels.device
        numbers = torch.full((n, 4), -torch.inf, dtype=torch.float64, device=device)
        numbers[:, 3] = 0.0
        return cls(
            numbers,
            (labels == 0).long(),  # any but the target
            torch.ones(n, device=device),
            torch.full_like(labels, -1),
            torch.zeros(n, device=device),
        )

    def triplet(self):
        target, runner_up, rest_max, rest_sum = self.numbers.unbind(1)
        rest = torch.where(rest_sum == 0, -torch.inf, rest_max + rest_sum.log())
        return torch.stack([target, runner_up, rest], 1)


def triplet_columns_(logits, first, labels, state, softcap, out=None):
    """Take logits (N, C) of the next columns, from ``first`` on, into ``state``.

    exp(y - rest_max), 0 at target and runner-up, times the softcap's slope, goes to ``out`` (N, C), which may
    be the logits, or of another dtype: then the logits may be overwritten too. No label is ignored here: the
    block loop has dropped them.
    """
    kernels = backend("triplet_columns_", logits)
    if kernels is native:  # in place
        native.triplet_columns_(logits, first, labels, state, softcap, out is not None)
        if out is not None and out is not logits:
            out.copy_(logits)
        return
    if kernels:
        kernels.triplet_columns_(logits, first, labels, state, softcap, out)
        return
    for y, t, target, *piece in _row_pieces(logits, labels, logits if out is None else out, *state):
        terms, *new = reference.triplet_columns(y, first, t, *piece[:2], softcap)
        for old, value in zip(piece, new, strict=True):
            old.copy_(value)
        if out is not None:
            target.copy_(terms)


def scale_(logits, factor):
    """logits (..., V) *= factor, () or (...); where it is 1, without touching them."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1.0:
        return
    kernels = backend("scale_rows_", logits)
    if kernels:
        kernels.scale_rows_(logits, factor)
    else:
        logits.mul_(factor.unsqueeze(-1))

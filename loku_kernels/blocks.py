"""One block of logits at a time: what the ops are made of, on the backend that serves the tensor.

Every function takes logits (..., V) whose last dimension is contiguous and labels (...). With a softcap
an entry is u = tanh(z / softcap), standing for the logit y = softcap * u: neither y nor the slope
dy/dz = 1 - u^2 is then rounded to the logits' dtype. A softcap of 0 means none: an entry is a logit.
"""

import torch

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


def triplet_forward(logits, labels, ignore_index, softcap=0.0):
    """triplet (..., 3) float64 and runner_up_id (...) int64."""
    kernels = _kernels("triplet_forward", logits, labels, ignore_index)
    if kernels:
        return kernels.triplet_forward(logits, labels, ignore_index, softcap)
    check_labels(labels, logits.shape[-1], ignore_index)
    triplet = torch.empty(*labels.shape, 3, dtype=torch.float64, device=logits.device)
    runner_up_id = torch.empty_like(labels, memory_format=torch.contiguous_format)
    for y, t, out, out_id in _row_pieces(logits, labels, triplet, runner_up_id):
        piece, piece_id = reference.softmax_triplet(y, t, ignore_index, softcap)
        out.copy_(piece)
        out_id.copy_(piece_id)
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, softcap=0.0, out=None
):
    """Gradient of the logits in their dtype, contiguous, or in ``out``, which may be the logits."""
    kernels = backend("triplet_backward", logits)
    if kernels:
        return kernels.triplet_backward(
            grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, softcap, out
        )
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for y, t, saved, r, g, target in _row_pieces(logits, labels, triplet, runner_up_id, grad_triplet, out):
        target.copy_(reference.softmax_triplet_backward(g, y, t, ignore_index, saved, r, softcap))
    return out


def ihl_forward_backward_(logits, labels, ignore_index, scale):
    """Overwrite the logits with ``scale``, a float64 tensor (), x the gradient of the rows' IHL; return the
    triplets."""
    kernels = _kernels("triplet_fused_", logits, labels, ignore_index)
    if kernels:
        if kernels is native:  # whose kernels run on the CPU, where a number is at hand
            scale = scale.item()
        return kernels.triplet_fused_(logits, labels, ignore_index, kernels.INVERTED_HINGE, scale)
    triplet, runner_up_id = triplet_forward(logits, labels, ignore_index)
    p0, p1, p2 = triplet.softmax(-1).unbind(-1)
    # d IHL = p_j (g_j - sum_i g_i p_i) with g = (1, -1, 0), as sums of probabilities: nothing cancels
    grad = torch.stack([p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)], -1) * scale
    triplet_backward(grad, logits, labels, ignore_index, triplet, runner_up_id, out=logits)
    return triplet, runner_up_id


def rest_forward_backward_(logits, labels, softcap=0.0):
    """Overwrite the logits with exp(y - rest), 0 at target and runner-up; return the triplets.

    Times the softcap's slope, and without ignored labels: the block loop has dropped them.
    """
    kernels = backend("triplet_fused_", logits)
    if kernels:
        return kernels.triplet_fused_(logits, labels, -1, kernels.REST, 1.0, softcap)
    triplet, runner_up_id = triplet_forward(logits, labels, -1, softcap)
    grad = torch.zeros_like(triplet)
    grad[..., 2] = 1.0
    triplet_backward(grad, logits, labels, -1, triplet, runner_up_id, softcap, out=logits)
    return triplet, runner_up_id


def scale_(logits, factor):
    """logits (..., V) *= factor, () or (...); where it is 1, without touching them."""
    kernels = backend("scale_rows_", logits)
    if kernels:
        kernels.scale_rows_(logits, factor)
    elif factor.dim() or factor.device.type != "cpu" or factor.item() != 1.0:
        logits.mul_(factor.unsqueeze(-1))

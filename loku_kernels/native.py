"""The boundary to the compiled core: the only module that hands out addresses.

It assumes what ``ops`` has checked (shapes, devices, dtypes), and adds what only memory cares about:
contiguous small tensors, 64-bit row offsets, labels inside the vocabulary.
"""

import os
import warnings

import torch

try:
    from loku_kernels import _core  # after torch, whose OpenMP runtime it then shares
except ImportError:
    _core = None

_DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INVERTED_HINGE, REST = 0, 1  # FusedGradient in csrc/triplet_cpu.h

_forked = False


def _note_fork():
    global _forked
    _forked = True


# A forked child has none of its parent's OpenMP threads and would wait for them for ever.
os.register_at_fork(after_in_child=_note_fork)


def warn_if_missing():
    if _core is None:
        warnings.warn(
            "loku_kernels has no compiled core here, so the slower plain-torch reference implementation "
            "is in use. To build the core, install a C++ compiler and run: pip install .",
            RuntimeWarning,
            stacklevel=3,
        )


def serves(tensor):
    """Whether the core computes on this tensor."""
    return _core is not None and tensor.device.type == "cpu" and tensor.dtype in _DTYPE_TAGS


def _threads():
    return 1 if _forked else torch.get_num_threads()


def _row_offsets(tensor):
    """Where each row of (..., V) begins, in elements from the first: any strides in front of V."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.reshape(-1)


def _rows(tensor, offsets):
    vocab = tensor.shape[-1]
    return tensor.data_ptr(), offsets.data_ptr(), offsets.numel(), vocab, _DTYPE_TAGS[tensor.dtype]


def _empty_triplets(labels):
    return (
        torch.empty(*labels.shape, 3, dtype=torch.float64),
        torch.empty(labels.shape, dtype=torch.int64),
    )


def check_labels(labels, vocab, ignore_index):
    labels = labels.contiguous()
    bad = _core.first_bad_label(labels.data_ptr(), labels.numel(), vocab, ignore_index)
    if bad >= 0:
        raise_bad_label(labels, bad, vocab, ignore_index)


def raise_bad_label(labels, position, vocab, ignore_index):
    raise IndexError(
        f"label {labels.reshape(-1)[position].item()} at position {position} is neither in [0, {vocab}) "
        f"nor ignore_index ({ignore_index})"
    )


def triplet_forward(logits, labels, ignore_index, softcap=0.0):
    """logits (..., V), labels (...) -> triplet (..., 3) float64, runner_up_id (...) int64."""
    labels = labels.contiguous()
    check_labels(labels, logits.shape[-1], ignore_index)
    offsets = _row_offsets(logits)
    triplet, runner_up_id = _empty_triplets(labels)
    _core.triplet_forward(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        softcap,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        _threads(),
    )
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, softcap=0.0, out=None
):
    """Gradient of the logits, contiguous, or in ``out``, which may be the logits."""
    labels, triplet, runner_up_id, grad_triplet = (
        labels.contiguous(),
        triplet.contiguous(),
        runner_up_id.contiguous(),
        grad_triplet.contiguous(),
    )
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    offsets, grad_offsets = _row_offsets(logits), _row_offsets(grad_logits)
    _core.triplet_backward(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        grad_triplet.data_ptr(),
        softcap,
        _rows(grad_logits, grad_offsets),
        _threads(),
    )
    return grad_logits


def triplet_fused_(logits, labels, ignore_index, gradient, scale=1.0, softcap=0.0):
    """Overwrite logits (..., V) with ``scale`` x the gradient of IHL, or of ``rest``; return the triplets."""
    labels = labels.contiguous()
    check_labels(labels, logits.shape[-1], ignore_index)
    offsets = _row_offsets(logits)
    triplet, runner_up_id = _empty_triplets(labels)
    _core.triplet_fused_(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        gradient,
        scale,
        softcap,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        _threads(),
    )
    return triplet, runner_up_id

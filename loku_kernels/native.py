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
    columns = tensor.shape[-1]
    return tensor.data_ptr(), offsets.data_ptr(), offsets.numel(), columns, _DTYPE_TAGS[tensor.dtype]


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


def triplet_forward(logits, labels, ignore_index):
    """logits (..., V), labels (...) -> triplet (..., 3) float64, runner_up_id (...) int64."""
    labels = labels.contiguous()
    check_labels(labels, logits.shape[-1], ignore_index)
    offsets = _row_offsets(logits)
    triplet, runner_up_id = _empty_triplets(labels)
    _core.triplet_forward(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        _threads(),
    )
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, *, first=0, softcap=0.0, out=None
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
        first,
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


def inverted_hinge_(logits, labels, ignore_index, scale):
    """Overwrite logits (..., V) with ``scale`` x the gradient of IHL; return the triplets."""
    labels = labels.contiguous()
    check_labels(labels, logits.shape[-1], ignore_index)
    offsets = _row_offsets(logits)
    triplet, runner_up_id = _empty_triplets(labels)
    _core.inverted_hinge_(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        scale,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        _threads(),
    )
    return triplet, runner_up_id


def triplet_columns_(logits, first, labels, state, softcap, store):
    """Logits (N, C) from column ``first`` on go into ``state``, see blocks.OnlineState, in place."""
    offsets = _row_offsets(logits)
    _core.triplet_columns_(
        _rows(logits, offsets),
        first,
        labels.data_ptr(),
        softcap,
        store,
        *(tensor.data_ptr() for tensor in state),
        _threads(),
    )


def _features(tensor):
    return tensor.data_ptr(), tensor.shape[2], tensor.stride(0), tensor.stride(1)


def accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor):
    """fisher (d, k), or (d,) with a divisor, float32; inputs (n, T, k), grad_outputs (n, T, d)."""
    inputs, grad_outputs = (x if x.stride(2) == 1 else x.contiguous() for x in (inputs, grad_outputs))
    total = fisher.contiguous()
    divisor = None if divisor is None else divisor.contiguous()
    _core.accumulate_squared_grad_(
        *inputs.shape[:2],
        _DTYPE_TAGS[inputs.dtype],
        _features(inputs),
        _features(grad_outputs),
        (total.data_ptr(), total.stride(0)),
        (0, 0) if divisor is None else (divisor.data_ptr(), divisor.stride(0)),
        _threads(),
    )
    if total is not fisher:
        fisher.copy_(total)


def add_squares_(fisher, product):
    """fisher += product^2, for a product (rows, columns) in bfloat16 and rows of the Fisher in float32."""
    _core.add_squares_(product.data_ptr(), *product.shape, (fisher.data_ptr(), fisher.stride(0)), _threads())

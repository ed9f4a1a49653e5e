"""The boundary to the compiled core: the only module that hands out addresses.

It assumes what ``ops`` has checked (shapes, devices, dtypes), and adds what only memory cares about:
contiguous small tensors, 64-bit row offsets, labels inside the vocabulary.
"""

import functools
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
    """Whether the core computes on this tensor.

    Raises:
        RuntimeError: ``LOKU_BACKEND=native`` asks for CUDA kernels that were not built.
    """
    if _core is None or tensor.dtype not in _DTYPE_TAGS:
        return False
    if not _on_cuda(tensor):
        return tensor.device.type == "cpu"
    if not _core.has_cuda and os.environ.get("LOKU_BACKEND") == "native":
        raise RuntimeError(
            "LOKU_BACKEND=native, but loku_kernels was installed without its CUDA kernels: "
            "install it again where nvcc is found, with LOKU_CUDA=1"
        )
    return _core.has_cuda and _cuda_works()


def _on_cuda(tensor):
    return tensor.device.type == "cuda"


@functools.cache
def _cuda_works():
    error = _core.cuda_error()
    if error:
        warnings.warn(f"loku_kernels: its CUDA kernels are not used: {error}", RuntimeWarning, stacklevel=5)
    return not error


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
    if _on_cuda(logits):
        return _cuda_triplet_forward(logits, labels, ignore_index)
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
    if _on_cuda(logits):
        return _cuda_triplet_backward(
            grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, first, softcap, out
        )
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
    """Overwrite logits (..., V) with ``scale``, float64 (), x the gradient of IHL; return the triplets."""
    if _on_cuda(logits):
        return _cuda_inverted_hinge_(logits, labels, ignore_index, scale)
    labels = labels.contiguous()
    check_labels(labels, logits.shape[-1], ignore_index)
    offsets = _row_offsets(logits)
    triplet, runner_up_id = _empty_triplets(labels)
    _core.inverted_hinge_(
        _rows(logits, offsets),
        labels.data_ptr(),
        ignore_index,
        scale.item(),
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        _threads(),
    )
    return triplet, runner_up_id


def triplet_columns_(logits, first, labels, state, softcap, store):
    """Logits (N, C) from column ``first`` on go into ``state``, see blocks.OnlineState, in place."""
    if _on_cuda(logits):
        _launch(
            "cuda_triplet_columns_",
            logits,
            _device_rows(logits),
            first,
            labels.data_ptr(),
            softcap,
            store,
            *(tensor.data_ptr() for tensor in state),
        )
        return
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


def scale_rows_(logits, factor):
    """logits (..., V) *= factor, () or (...); rows whose factor is 1 are left alone."""
    if _on_cuda(logits):
        logits.mul_(factor.unsqueeze(-1))
        return
    offsets = _row_offsets(logits)
    factors = factor.expand(logits.shape[:-1]).reshape(-1).float().contiguous()
    _core.scale_rows_(_rows(logits, offsets), factors.data_ptr(), _threads())


def _features(tensor):
    return tensor.data_ptr(), tensor.shape[2], tensor.stride(0), tensor.stride(1)


def accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor):
    """fisher (d, k), or (d,) with a divisor, float32; inputs (n, T, k), grad_outputs (n, T, d)."""
    if _on_cuda(inputs):
        return _cuda_accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor)
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


# --- CUDA -----------------------------------------------------------------------------------------
#
# Labels are checked by the kernels, which assert; nothing here waits for the device.


def _launch(name, tensor, *arguments):
    """Call a CUDA function of the core where and on which stream torch would compute with this tensor now."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        getattr(_core, name)(*arguments, (tensor.device.index, stream))


def _device_rows(tensor):
    """Where each row of (..., V) begins, as two strides; None if the dimensions before V need three."""
    levels = []  # (size, stride) of the dimensions before V; neighbours that are one are merged
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(levels)) + levels
    return (
        tensor.data_ptr(),
        outer * inner,
        inner,
        outer_stride,
        inner_stride,
        tensor.shape[-1],
        _DTYPE_TAGS[tensor.dtype],
    )


def _cuda_triplets(logits, labels):
    return (
        torch.empty(*labels.shape, 3, dtype=torch.float64, device=logits.device),
        torch.empty(labels.shape, dtype=torch.int64, device=logits.device),
    )


def _stack(pieces):
    triplets, runner_up_ids = zip(*pieces, strict=True)
    return torch.stack(triplets), torch.stack(runner_up_ids)


def _cuda_triplet_forward(logits, labels, ignore_index):
    triplet, runner_up_id = _cuda_triplets(logits, labels)
    if labels.numel() == 0:
        return triplet, runner_up_id
    rows, labels = _device_rows(logits), labels.contiguous()
    if rows is None:
        return _stack(_cuda_triplet_forward(y, t, ignore_index) for y, t in zip(logits, labels, strict=True))
    _launch(
        "cuda_triplet_forward",
        logits,
        rows,
        labels.data_ptr(),
        ignore_index,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
    )
    return triplet, runner_up_id


def _cuda_triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, first, softcap, out
):
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if labels.numel() == 0:
        return out
    rows, grad_rows = _device_rows(logits), _device_rows(out)
    if rows is None or grad_rows is None:
        for g, y, t, saved, r, part in zip(
            grad_triplet, logits, labels, triplet, runner_up_id, out, strict=True
        ):
            _cuda_triplet_backward(g, y, t, ignore_index, saved, r, first, softcap, part)
        return out
    labels, triplet, runner_up_id, grad_triplet = (
        x.contiguous() for x in (labels, triplet, runner_up_id, grad_triplet)
    )
    _launch(
        "cuda_triplet_backward",
        logits,
        rows,
        first,
        labels.data_ptr(),
        ignore_index,
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
        grad_triplet.data_ptr(),
        softcap,
        grad_rows,
    )
    return out


def _cuda_inverted_hinge_(logits, labels, ignore_index, scale):
    triplet, runner_up_id = _cuda_triplets(logits, labels)
    if labels.numel() == 0:
        return triplet, runner_up_id
    rows, labels = _device_rows(logits), labels.contiguous()
    if rows is None:
        return _stack(
            _cuda_inverted_hinge_(y, t, ignore_index, scale) for y, t in zip(logits, labels, strict=True)
        )
    _launch(
        "cuda_inverted_hinge_",
        logits,
        rows,
        labels.data_ptr(),
        ignore_index,
        scale.data_ptr(),
        triplet.data_ptr(),
        runner_up_id.data_ptr(),
    )
    return triplet, runner_up_id


def _aligned_features(tensor):
    """(n, T, features) such that each token's features begin, and the last vector ends, on 16 bytes."""
    width = 16 // tensor.element_size()
    if tensor.shape[-1] % width:
        return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % width))
    strides_fit = tensor.stride(-1) == 1 and all(stride % width == 0 for stride in tensor.stride()[:-1])
    if not strides_fit or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _cuda_accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor):
    (n, tokens, k), d = inputs.shape, grad_outputs.shape[2]
    total = fisher.contiguous()
    partials = None
    if divisor is not None:
        divisor = divisor.contiguous()
        partials = torch.empty(-(-k // _core.FISHER_TILE), d, dtype=torch.float32, device=fisher.device)
    aligned = [_aligned_features(x) for x in (inputs, grad_outputs)]
    _launch(
        "cuda_accumulate_squared_grad_",
        inputs,
        n,
        tokens,
        _DTYPE_TAGS[inputs.dtype],
        *((x.data_ptr(), width, *x.stride()[:2]) for x, width in zip(aligned, (k, d), strict=True)),
        (total.data_ptr(), total.stride(0)),
        (0, 0) if divisor is None else (divisor.data_ptr(), divisor.stride(0)),
        0 if partials is None else partials.data_ptr(),
    )
    if partials is not None:
        fisher += partials.sum(0)
    elif total is not fisher:
        fisher.copy_(total)

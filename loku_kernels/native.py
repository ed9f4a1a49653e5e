"""The boundary to the compiled core: the only module that hands out addresses.

``ops`` has checked what its callers passed; here every size and dtype that an address is used with is checked
again (``ValueError``), since ``torch.ops.loku_kernels`` can be called without it. To that comes what only
memory cares about: contiguous small tensors, 64-bit row offsets, labels inside the vocabulary.
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
            "loku_kernels has no compiled core here, so the slower plain-torch reference implementation is "
            "in use on the CPU, and on a GPU where triton is not installed. To build the core, install a C++ "
            "compiler and run: pip install .",
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


def _call(name, *arguments):
    """Call a function of the core; of a tensor it gets the address."""
    getattr(_core, name)(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))


def _require(name, tensor, shape, dtype, like):
    """Raise ``ValueError`` unless the tensor has this shape and dtype, on the device of ``like``."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {like.device}, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )


def _require_rows(logits):
    if logits.dim() < 1 or (logits.stride(-1) != 1 and logits.numel() > 0):
        raise ValueError(f"the last dimension of logits must be contiguous, got strides {logits.stride()}")


def _row_offsets(tensor):
    """Where each row of (..., V) begins, in elements from the first: any strides in front of V."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.reshape(-1)


def _rows(tensor, offsets):
    columns = tensor.shape[-1]
    return tensor.data_ptr(), offsets.data_ptr(), offsets.numel(), columns, _DTYPE_TAGS[tensor.dtype]


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
    return _triplets("triplet_forward", logits, labels, ignore_index)


def inverted_hinge_(logits, labels, ignore_index, scale):
    """Overwrite logits (..., V) with ``scale``, float64 (), x the gradient of IHL; return the triplets."""
    return _triplets("inverted_hinge_", logits, labels, ignore_index, scale)


def _triplets(name, logits, labels, ignore_index, *scale):
    _require_rows(logits)
    _require("labels", labels, logits.shape[:-1], torch.int64, logits)
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must have shape (..., V) with V >= 2, got {tuple(logits.shape)}")
    for x in scale:
        _require("scale", x, (), torch.float64, logits)
    triplet = torch.empty(*labels.shape, 3, dtype=torch.float64, device=labels.device)
    runner_up_id = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
    labels = labels.contiguous()
    if _on_cuda(logits):
        for (rows,), (t, out, out_id) in _row_pieces((logits,), (labels, triplet, runner_up_id)):
            _launch(name, logits, rows, t, ignore_index, *scale, out, out_id)
    else:
        check_labels(labels, logits.shape[-1], ignore_index)
        offsets, scale = _row_offsets(logits), [x.item() for x in scale]
        _call(name, _rows(logits, offsets), labels, ignore_index, *scale, triplet, runner_up_id, _threads())
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, *, first=0, softcap=0.0, out=None
):
    """Gradient of the logits, contiguous, or in ``out``, which may be the logits."""
    shape = logits.shape[:-1]
    _require_rows(logits)
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _require("out", out, logits.shape, logits.dtype, logits)
    _require_rows(out)
    for name, ids in (("labels", labels), ("runner_up_id", runner_up_id)):
        _require(name, ids, shape, torch.int64, logits)
    for name, numbers in (("triplet", triplet), ("grad_triplet", grad_triplet)):
        _require(name, numbers, (*shape, 3), torch.float64, logits)
    per_row = [x.contiguous() for x in (labels, triplet, runner_up_id, grad_triplet)]
    if _on_cuda(logits):
        for (rows, out_rows), (t, *saved) in _row_pieces((logits, out), per_row):
            _launch("triplet_backward", logits, rows, first, t, ignore_index, *saved, softcap, out_rows)
    else:
        offsets, out_offsets = _row_offsets(logits), _row_offsets(out)
        rows, out_rows = _rows(logits, offsets), _rows(out, out_offsets)
        t, *saved = per_row
        _call("triplet_backward", rows, first, t, ignore_index, *saved, softcap, out_rows, _threads())
    return out


def triplet_columns_(logits, first, labels, state, softcap, store):
    """Logits (N, C) from column ``first`` on go into ``state``, see blocks.OnlineState, in place."""
    rows = (len(logits),)
    _require_rows(logits)
    _require("labels", labels, rows, torch.int64, logits)
    _require("numbers", state.numbers, (*rows, 4), torch.float64, logits)
    for name in ("runner_up_id", "demoted_id"):
        _require(name, getattr(state, name), rows, torch.int64, logits)
    for name in ("rescale", "demoted_share"):
        _require(name, getattr(state, name), rows, torch.float32, logits)
    if not all(x.is_contiguous() for x in (labels, *state)):
        raise ValueError("labels and state must be contiguous")
    if _on_cuda(logits):
        _launch("triplet_columns_", logits, _device_rows(logits), first, labels, softcap, store, *state)
    else:
        offsets = _row_offsets(logits)
        rows = _rows(logits, offsets)
        _call("triplet_columns_", rows, first, labels, softcap, store, *state, _threads())


def scale_rows_(logits, factor):
    """logits (..., V) *= factor, () or (...); rows whose factor is 1 are left alone."""
    _require_rows(logits)
    factors = factor.expand(logits.shape[:-1]).float().contiguous()
    _require("factor", factors, logits.shape[:-1], torch.float32, logits)
    if _on_cuda(logits):
        for (rows,), (part,) in _row_pieces((logits,), (factors,)):
            _launch("scale_rows_", logits, rows, part)
    else:
        offsets = _row_offsets(logits)
        _call("scale_rows_", _rows(logits, offsets), factors, _threads())


def _features(tensor, width):
    """Of (n, T, features): its address, how many features there are, its strides."""
    return tensor.data_ptr(), width, tensor.stride(0), tensor.stride(1)


def _matrix(tensor):
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor):
    """fisher (d, k), or (d,) with a divisor, float32; inputs (n, T, k), grad_outputs (n, T, d)."""
    if inputs.dim() != 3:
        raise ValueError(f"inputs must have shape (n, T, k), got {tuple(inputs.shape)}")
    _require("grad_outputs", grad_outputs, (*inputs.shape[:2], grad_outputs.shape[-1]), inputs.dtype, inputs)
    weight_shape = (grad_outputs.shape[2], inputs.shape[2])
    _require("fisher", fisher, weight_shape[: 2 if divisor is None else 1], torch.float32, inputs)
    if divisor is not None:
        _require("divisor", divisor, weight_shape, torch.float32, inputs)
    if 0 in (*inputs.shape, *grad_outputs.shape):
        return
    total = fisher.contiguous()
    divisor = None if divisor is None else divisor.contiguous()
    tag, widths = _DTYPE_TAGS[inputs.dtype], (inputs.shape[2], grad_outputs.shape[2])
    if _on_cuda(inputs):
        operands = [_aligned_features(x) for x in (inputs, grad_outputs)]
    else:
        operands = [x if x.stride(2) == 1 else x.contiguous() for x in (inputs, grad_outputs)]
    arguments = *inputs.shape[:2], tag, *map(_features, operands, widths), _matrix(total), _matrix(divisor)
    if not _on_cuda(inputs):
        _call("accumulate_squared_grad_", *arguments, _threads())
    elif divisor is None:
        _launch("accumulate_squared_grad_", inputs, *arguments, 0)
    else:
        tiles = -(-widths[0] // _core.FISHER_TILE)
        partials = torch.empty(tiles, widths[1], dtype=torch.float32, device=fisher.device)
        _launch("accumulate_squared_grad_", inputs, *arguments, partials)
        total += partials.sum(0)
    if total is not fisher:
        fisher.copy_(total)


def add_squares_(fisher, product):
    """fisher += product^2, for a product (rows, columns) in bfloat16 and rows of the Fisher in float32."""
    _require("fisher", fisher, product.shape, torch.float32, product)
    if product.dtype != torch.bfloat16 or not product.is_contiguous() or fisher.stride(1) != 1:
        raise ValueError("product must be contiguous and bfloat16, and the rows of fisher contiguous")
    _call("add_squares_", product, *product.shape, _matrix(fisher), _threads())


# --- CUDA -----------------------------------------------------------------------------------------
#
# Labels are checked by the kernels, which assert; nothing here waits for the device.


def _launch(name, tensor, *arguments):
    """Call a CUDA function of the core where and on which stream torch would compute with this tensor now."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        _call(f"cuda_{name}", *arguments, (tensor.device.index, stream))


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


def _row_pieces(wide, per_row):
    """The rows of tensors (..., V), in pieces that two strides describe, each with its part of contiguous
    tensors (...) or (..., 3); nothing where there are no rows."""
    rows = [_device_rows(tensor) for tensor in wide]
    if None in rows:
        for parts in zip(*wide, *per_row, strict=True):
            yield from _row_pieces(parts[: len(wide)], parts[len(wide) :])
    elif rows[0][1]:
        yield rows, per_row


def _aligned_features(tensor):
    """(n, T, features) such that each token's features begin, and the last vector ends, on 16 bytes."""
    width = 16 // tensor.element_size()
    if tensor.shape[-1] % width:
        return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % width))
    strides_fit = tensor.stride(-1) == 1 and all(stride % width == 0 for stride in tensor.stride()[:-1])
    if not strides_fit or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor

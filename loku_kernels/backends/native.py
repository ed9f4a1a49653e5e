"""The compiled core as a backend: the only module that passes addresses of tensors.

The public functions have checked their arguments. This module checks every size and dtype that goes with an
address again (``ValueError``), because ``torch.ops.loku_kernels`` can be called without those functions. The
core also needs contiguous small tensors, 64-bit row offsets and labels inside the vocabulary.

Two facts of the core are private to this module. Its kernels write the dtype that they read, so a result in
another dtype is computed in place and copied. The library's bfloat16 products are faster than the core's on a
CPU with instructions for them, so the Fisher uses them there.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import reference
from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import bad_label_error

_core: Any
try:
    # Imported after torch, so that the core shares torch's OpenMP runtime.
    from loku_kernels import _core  # type: ignore[attr-defined, no-redef]
except ImportError:
    _core = None

_DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# A forked child has none of its parent's OpenMP threads. With more than one thread it would wait for them for
# ever.
os.register_at_fork(after_in_child=_note_fork)


def warn_if_missing() -> None:
    """Warn if the package was installed without its compiled core."""
    if _core is None:
        warnings.warn(
            "loku_kernels has no compiled core here, so the slower plain-torch reference implementation is "
            "in use on the CPU, and on a GPU where triton is not installed. To build the core, install a C++ "
            "compiler and run: pip install .",
            RuntimeWarning,
            stacklevel=3,
        )


def serves(tensor: Tensor) -> bool:
    """Say whether the core computes on tensors of a device and dtype.

    Args:
        tensor: A tensor of that device and dtype.

    Returns:
        True for float32, bfloat16 and float16 on the CPU, and on CUDA if its kernels were built and run here.

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
    return bool(_core.has_cuda) and _cuda_works()


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@functools.cache
def _cuda_works() -> bool:
    """Ask the core once whether its CUDA kernels run here. Warn if they do not."""
    error: str = _core.cuda_error()
    if error:
        warnings.warn(f"loku_kernels: its CUDA kernels are not used: {error}", RuntimeWarning, stacklevel=5)
    return not error


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the core. Each tensor is passed as its address."""
    getattr(_core, name)(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))


def _require(name: str, tensor: Tensor, shape: Any, dtype: torch.dtype, like: Tensor) -> None:
    """Raise ``ValueError`` unless the tensor has this shape and dtype, on the device of ``like``."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {like.device}, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )


def _require_rows(logits: Tensor) -> None:
    """Raise ``ValueError`` unless the logits have a dtype of the core and contiguous rows."""
    if logits.dim() < 1 or (logits.stride(-1) != 1 and logits.numel() > 0):
        raise ValueError(f"the last dimension of logits must be contiguous, got strides {logits.stride()}")
    if logits.dtype not in _DTYPE_TAGS:
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")


def _row_offsets(tensor: Tensor) -> Tensor:
    """Compute the offset of each row of (..., V) from the first row, in elements, for any strides."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.reshape(-1)


def _host_rows(tensor: Tensor, offsets: Tensor) -> tuple[int, int, int, int, int]:
    """Describe the rows of (..., V) to the core's CPU functions, by their offsets."""
    columns = tensor.shape[-1]
    return tensor.data_ptr(), offsets.data_ptr(), offsets.numel(), columns, _DTYPE_TAGS[tensor.dtype]


def _check_label_memory(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ``IndexError`` for a label that would make the core write outside its row.

    The labels must be contiguous.
    """
    bad = _core.first_bad_label(labels.data_ptr(), labels.numel(), vocab, ignore_index)
    if bad >= 0:
        raise bad_label_error(labels, bad, vocab, ignore_index)


def triplet_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See ``reference.triplet_forward``."""
    return _call_for_triplets("triplet_forward", logits, labels, ignore_index)


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    return _call_for_triplets("inverted_hinge_", logits, labels, ignore_index, scale)


def _call_for_triplets(
    name: str, logits: Tensor, labels: Tensor, ignore_index: int, *scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a function that returns triplets, and call it.

    ``scale`` holds the factor of ``inverted_hinge_``, and nothing for ``triplet_forward``.
    """
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
        for (rows,), (t, out, out_id) in _two_stride_pieces((logits,), (labels, triplet, runner_up_id)):
            _launch(name, logits, rows, t, ignore_index, *scale, out, out_id)
    else:
        _check_label_memory(labels, logits.shape[-1], ignore_index)
        offsets, scales = _row_offsets(logits), [x.item() for x in scale]
        _call(
            name,
            _host_rows(logits, offsets),
            labels,
            ignore_index,
            *scales,
            triplet,
            runner_up_id,
            _threads(),
        )
    return triplet, runner_up_id


def triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    *,
    first_column: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.triplet_backward``."""
    if out is not None and out.dtype != logits.dtype:
        arguments = (grad_triplet, logits, labels, ignore_index, triplet, runner_up_id)
        return out.copy_(triplet_backward(*arguments, first_column=first_column, softcap=softcap, out=logits))
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
        for (rows, out_rows), (t, *saved) in _two_stride_pieces((logits, out), per_row):
            rows_and_labels = (rows, first_column, t, ignore_index)
            _launch("triplet_backward", logits, *rows_and_labels, *saved, softcap, out_rows)
    else:
        offsets, out_offsets = _row_offsets(logits), _row_offsets(out)
        rows, out_rows = _host_rows(logits, offsets), _host_rows(out, out_offsets)
        t, *saved = per_row
        _call("triplet_backward", rows, first_column, t, ignore_index, *saved, softcap, out_rows, _threads())
    return out


def triplet_columns_(
    logits: Tensor,
    labels: Tensor,
    state: OnlineState,
    *,
    first_column: int,
    softcap: float,
    out: Tensor | None = None,
) -> None:
    """See ``reference.triplet_columns_``."""
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
    store = out is not None
    if _on_cuda(logits):
        device_rows = _device_rows(logits)
        _launch("triplet_columns_", logits, device_rows, first_column, labels, softcap, store, *state)
    else:
        offsets = _row_offsets(logits)
        arguments = (_host_rows(logits, offsets), first_column, labels, softcap, store)
        _call("triplet_columns_", *arguments, *state, _threads())
    if out is not None and out is not logits:
        out.copy_(logits)


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """See ``reference.scale_rows_``. Rows whose factor is 1 are left alone."""
    _require_rows(logits)
    factors = factor.expand(logits.shape[:-1]).float().contiguous()
    _require("factor", factors, logits.shape[:-1], torch.float32, logits)
    if _on_cuda(logits):
        for (rows,), (part,) in _two_stride_pieces((logits,), (factors,)):
            _launch("scale_rows_", logits, rows, part)
    else:
        offsets = _row_offsets(logits)
        _call("scale_rows_", _host_rows(logits, offsets), factors, _threads())


def _features(tensor: Tensor, width: int) -> tuple[int, int, int, int]:
    """Describe a tensor (n, T, features) to the core: its address, the number of features, the strides."""
    return tensor.data_ptr(), width, tensor.stride(0), tensor.stride(1)


def _matrix(tensor: Tensor | None) -> tuple[int, int]:
    """Describe a matrix to the core: its address and row stride, or zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def accumulate_squared_grad_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
) -> None:
    """See ``reference.accumulate_squared_grad_``. The sums are float32."""
    if inputs.dtype == torch.bfloat16 and not _on_cuda(inputs):
        if reference.multiplies_bfloat16(inputs.device):
            arguments = (fisher, inputs, grad_outputs, divisor)
            reference.accumulate_by_products_(*arguments, torch.bfloat16, _add_squares)
            return
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


def _add_squares(fisher: Tensor, product: Tensor, scratch: Tensor) -> None:
    """Add the squares of a bfloat16 product (rows, columns) to a tile of the Fisher in float32."""
    _require("fisher", fisher, product.shape, torch.float32, product)
    if product.dtype != torch.bfloat16 or not product.is_contiguous() or fisher.stride(1) != 1:
        raise ValueError("product must be contiguous and bfloat16, and the rows of fisher contiguous")
    _call("add_squares_", product, *product.shape, _matrix(fisher), _threads())


# --- CUDA -----------------------------------------------------------------------------------------
#
# The kernels check the labels by asserts. So nothing here waits for the device.


def _launch(name: str, tensor: Tensor, *arguments: Any) -> None:
    """Call a CUDA function of the core on the tensor's device and on torch's current stream there."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        _call(f"cuda_{name}", *arguments, (tensor.device.index, stream))


def _device_rows(tensor: Tensor) -> tuple[int, ...] | None:
    """Describe the rows of (..., V) to the core's CUDA functions, by two strides.

    Returns:
        The fields of ``DeviceRows`` in csrc/triplet_cuda.h, or None if the rows need three strides.
    """
    # (size, stride) of the dimensions before V. Neighbours that one stride serves are merged.
    levels: list[tuple[int, int]] = []
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


def _two_stride_pieces(
    wide: Sequence[Tensor], per_row: Sequence[Tensor]
) -> Iterator[tuple[list[tuple[int, ...]], Sequence[Tensor]]]:
    """Cut tensors into pieces whose rows lie on two strides.

    Args:
        wide: Tensors (..., V) with any strides.
        per_row: Contiguous tensors (...) or (..., 3) with entries for each row.

    Yields:
        The ``_device_rows`` of each wide tensor's piece, and the pieces of ``per_row``. Nothing if there is
        no row.
    """
    described = [_device_rows(tensor) for tensor in wide]
    rows = [one for one in described if one is not None]
    if len(rows) < len(described):
        for parts in zip(*wide, *per_row, strict=True):
            yield from _two_stride_pieces(parts[: len(wide)], parts[len(wide) :])
    elif rows[0][1]:
        yield rows, per_row


def _aligned_features(tensor: Tensor) -> Tensor:
    """Align the features of each token of (n, T, features) to 16 bytes, by a copy if necessary.

    The last vector of 16 bytes of each token is whole too. It may run into padding.
    """
    width = 16 // tensor.element_size()
    if tensor.shape[-1] % width:
        return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % width))
    strides_fit = tensor.stride(-1) == 1 and all(stride % width == 0 for stride in tensor.stride()[:-1])
    if not strides_fit or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor

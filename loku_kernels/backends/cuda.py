"""The compiled fused row kernel as a backend for CUDA: the two operations in which it is faster than Triton.

The kernel needs a device of compute capability 9.0 or more, and a row that fits a cluster of blocks. The
functions leave longer rows to Triton. They check every size and dtype that goes with an address, like
``native``. The kernel checks the labels. So nothing here waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import native, reference


def check_built(tensor: Tensor) -> None:
    """Check that ``LOKU_BACKEND=native`` can be obeyed.

    Args:
        tensor: A tensor of the device on which the kernels are to run.

    Raises:
        RuntimeError: The core was not built. Or the tensor is on CUDA, and the kernel was not built or cannot
            run on the device.
    """
    if native._core is None:
        raise RuntimeError("LOKU_BACKEND=native, but loku_kernels was installed without its compiled core")
    if not _on_cuda(tensor):
        return
    if not native._core.has_cuda:
        raise RuntimeError(
            "LOKU_BACKEND=native, but loku_kernels was installed without its CUDA kernels: "
            "install it again where nvcc is found, with LOKU_CUDA=1"
        )
    if not _longest_row(tensor.device.index):
        reason = _error() or "they need compute capability 9.0 or more"
        raise RuntimeError(
            f"LOKU_BACKEND=native, but the kernels of loku_kernels cannot run on {tensor.device}: {reason}"
        )


def serves(tensor: Tensor) -> bool:
    """Say whether the kernel computes on a tensor of logits.

    Args:
        tensor: The logits (..., V).

    Returns:
        True for float32, bfloat16 and float16 on CUDA, if the kernel was built, the device can run it and a
        row is short enough.
    """
    return _on_cuda(tensor) and tensor.dtype in native._DTYPE_TAGS and _fits(tensor)


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@functools.cache
def _error() -> str:
    """Ask the core once why its CUDA kernels cannot run on this machine. Warn if there is a reason."""
    error: str = native._core.cuda_error()
    if error:
        warnings.warn(f"loku_kernels: its CUDA kernels are not used: {error}", RuntimeWarning, stacklevel=6)
    return error


@functools.cache
def _longest_row(device_index: int | None) -> int:
    """Ask the core for the bytes of the longest row on a device, 0 if it cannot run there."""
    if native._core is None or not native._core.has_cuda or _error():
        return 0
    return int(native._core.cuda_longest_row(device_index or 0))


def _fits(logits: Tensor) -> bool:
    """Say whether the rows are short enough. A row that is not aligned to 16 bytes takes a vector more."""
    size, longest = logits.element_size(), _longest_row(logits.device.index)
    row = logits.shape[-1] * size
    if row + 16 - size <= longest:
        return True
    if row > longest:
        return False
    return logits.data_ptr() % 16 == 0 and all(size * stride % 16 == 0 for stride in logits.stride()[:-1])


@functools.cache
def _fallback() -> ModuleType:
    """Return the backend for longer rows: Triton's, or the reference where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return reference
    from loku_kernels.backends import triton

    return triton


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    if not _fits(logits):
        result: tuple[Tensor, Tensor] = _fallback().inverted_hinge_(logits, labels, ignore_index, scale)
        return result
    _require("scale", scale, (), torch.float64, logits)
    return _fused("inverted_hinge_", logits, labels, ignore_index, scale.data_ptr())


def rest_probabilities_(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``reference.rest_probabilities_``."""
    if not _fits(logits):
        fallback = _fallback()
        result: tuple[Tensor, Tensor] = fallback.rest_probabilities_(
            logits, labels, ignore_index, softcap=softcap
        )
        return result
    return _fused("rest_probabilities_", logits, labels, ignore_index, softcap)


def _require(name: str, tensor: Tensor, shape: Any, dtype: torch.dtype, logits: Tensor) -> None:
    """Raise ``ValueError`` unless the tensor has this shape and dtype, on the device of the logits."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != logits.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {logits.device}, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )


def _fused(
    name: str, logits: Tensor, labels: Tensor, ignore_index: int, scale_or_softcap: float
) -> tuple[Tensor, Tensor]:
    """Check the arguments, and call a function of the core on torch's current stream of the device."""
    if logits.dtype not in native._DTYPE_TAGS or not _on_cuda(logits):
        raise ValueError(
            f"logits must be float32, bfloat16 or float16 on CUDA, got {logits.dtype} on {logits.device}"
        )
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must have shape (..., V) with V >= 2, got {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.numel() > 0:
        raise ValueError(f"the last dimension of logits must be contiguous, got strides {logits.stride()}")
    _require("labels", labels, logits.shape[:-1], torch.int64, logits)
    triplet = torch.empty((*labels.shape, 3), dtype=torch.float64, device=labels.device)
    runner_up_id = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
    function = getattr(native._core, f"cuda_{name}")
    for rows, *addresses in _pieces(logits, labels.contiguous(), triplet, runner_up_id):
        _launch(function, logits, rows, addresses[0], ignore_index, scale_or_softcap, *addresses[1:])
    return triplet, runner_up_id


def _launch(function: Callable[..., None], logits: Tensor, *arguments: object) -> None:
    index = logits.device.index
    stream = (index, torch.cuda.current_stream(index).cuda_stream)
    if torch.cuda.current_device() == index:  # entering a device costs more than a launch
        function(*arguments, stream)
    else:
        with torch.cuda.device(index):
            function(*arguments, stream)


def _pieces(
    logits: Tensor, labels: Tensor, triplet: Tensor, runner_up_id: Tensor
) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Cut tensors into pieces whose rows lie on two strides. Nearly always there is one piece.

    Args:
        logits: Logits (..., V) with any strides before V.
        labels: Contiguous labels (...).
        triplet: A contiguous tensor (..., 3).
        runner_up_id: A contiguous tensor (...).

    Yields:
        The fields of ``DeviceRows`` in csrc/fused_rows_cuda.h, and the addresses of the other three. Nothing
        if there is no row.
    """
    # (size, stride) of the dimensions before V. Neighbours that one stride serves are merged.
    levels: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 0:
            return
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        elif size != 1:
            levels.append((size, stride))
    if len(levels) > 2:
        for part in zip(logits, labels, triplet, runner_up_id, strict=True):
            yield from _pieces(*part)
        return
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(levels)) + levels
    tag = native._DTYPE_TAGS[logits.dtype]
    rows = (logits.data_ptr(), outer * inner, inner, outer_stride, inner_stride, logits.shape[-1], tag)
    yield rows, labels.data_ptr(), triplet.data_ptr(), runner_up_id.data_ptr()

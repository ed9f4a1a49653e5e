"""Launches of the Triton kernels of the softmax triplet.

The kernels are in ``triplet_kernels.py``. One program handles a row. Several programs share each row if there
are too few rows to keep the device busy.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from loku_kernels.backends.online_state import OnlineState
from loku_kernels.backends.triton.triplet_kernels import (
    inverted_hinge_kernel,
    scale_rows_kernel,
    triplet_backward_kernel,
    triplet_columns_kernel,
    triplet_combine_kernel,
    triplet_forward_kernel,
)
from loku_kernels.checks import check_label_values

VECTORS = 2  # vectors of 16 bytes that a thread holds of a row at a time
WARPS = 8  # warps of a program
FUSED_WARPS = 16  # warps of a program of the fused kernel
# A row of the fused kernel should stay in the L2 cache between its two passes. So programs of longer rows get
# twice the threads. This halves the number of rows under way.
FUSED_LONG_ROW = 128 << 10  # bytes of a row
MAX_PARTS = 64  # parts of a row
PROGRAMS_PER_SM = 4  # programs a multiprocessor that keep the device busy

# device_assert needs `debug`. The second option keeps `debug` from checking integer operations for overflow.
_CHECKED = {"debug": True, "sanitize_overflow": False}
# Two programs of 512 threads share a multiprocessor's 65536 registers: 64 for each of its 1024 threads.
_TWO_PROGRAMS = {} if torch.version.hip else {"maxnreg": 64}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _block(logits: Tensor, warps: int) -> int:
    """Count the entries of a row that a program holds at a time."""
    return warps * 32 * VECTORS * 16 // logits.element_size()


def _parts(rows: int, logits: Tensor) -> int:
    """Choose the number of programs a row, a power of two.

    It is enough to keep the device busy, but each part has at least one block.
    """
    wanted = -(-PROGRAMS_PER_SM * _multiprocessors(logits.device) // rows)
    most = min(-(-logits.shape[-1] // _block(logits, WARPS)), MAX_PARTS)
    return min(int(triton.next_power_of_2(wanted)), 1 << most.bit_length() - 1)


def _row_groups(tensor: Tensor) -> list[tuple[int, int]]:
    """List (size, stride) of the dimensions before V. Neighbours that one stride serves are merged."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        elif size != 1:
            groups.append((size, stride))
    return groups


def _row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return inner_rows, outer_stride and inner_stride of a tensor (..., V), as ``row_start`` takes them.

    The rows must lie on at most two strides.
    """
    groups = _row_groups(tensor)
    (_, outer_stride), (inner_rows, inner_stride) = [(1, 0)] * (2 - len(groups)) + groups
    return inner_rows, outer_stride, inner_stride


def _launchable_pieces(
    strided: Sequence[Tensor], per_row: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Cut tensors into pieces whose rows lie on at most two strides. Nearly always there is one piece.

    Args:
        strided: Tensors (..., V) with any strides.
        per_row: Tensors (...) or (..., 3) with entries for each row.

    Yields:
        The pieces of ``strided`` and the pieces of ``per_row``. Nothing if there is no row.
    """
    if strided[0].numel() == 0:
        return
    if all(len(_row_groups(x)) <= 2 for x in strided):
        yield strided, per_row
    else:
        for i in range(strided[0].shape[0]):
            yield from _launchable_pieces([x[i] for x in strided], [x[i] for x in per_row])


def _same_alignment(a: Tensor, b: Tensor) -> bool:
    """Say whether the row strides of two tensors agree up to whole vectors of 16 bytes."""
    vector = 16 // a.element_size()
    return all((x - y) % vector == 0 for x, y in zip(a.stride()[:-1], b.stride()[:-1], strict=True))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make launches go to the tensors' device, which need not be the current one, and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _empty_triplets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate a triplet (..., 3) and runner_up_id (...) for labels (...)."""
    return (
        torch.empty((*labels.shape, 3), dtype=torch.float64, device=labels.device),
        torch.empty(labels.shape, dtype=torch.int64, device=labels.device),
    )


def _forward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    parts: int,
    scale: Tensor | None = None,
) -> Tensor | None:
    """Launch the forward of logits on two strides.

    Returns:
        ``scale`` times the gradient of IHL in the triplet, if there are several parts and a ``scale``. Else
        None.
    """
    rows, vocab, device = labels.numel(), logits.shape[-1], logits.device
    partial = partial_id = grad_triplet = None
    if parts > 1:
        partial = torch.empty((rows, parts, 3), dtype=torch.float32, device=device)
        partial_id = torch.empty((rows, parts), dtype=torch.int32, device=device)
    triplet_forward_kernel[(rows * parts,)](
        logits,
        *_row_strides(logits),
        vocab,
        labels,
        ignore_index,
        triplet,
        runner_up_id,
        partial,
        partial_id,
        PARTS=parts,
        BLOCK=_block(logits, WARPS),
        num_warps=WARPS,
        **_CHECKED,
    )
    if parts > 1:
        if scale is not None:
            grad_triplet = torch.empty_like(triplet)
        triplet_combine_kernel[(rows,)](
            logits,
            *_row_strides(logits),
            labels,
            ignore_index,
            partial,
            partial_id,
            triplet,
            runner_up_id,
            scale,
            grad_triplet,
            PARTS=parts,
            GRADIENT=scale is not None,
            num_warps=1,
        )
    return grad_triplet


def _backward(
    grad_triplet: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    first_column: int,
    softcap: float,
    out: Tensor,
) -> None:
    """Launch the backward of logits on two strides."""
    rows, vocab = labels.numel(), logits.shape[-1]
    parts = _parts(rows, logits)
    triplet_backward_kernel[(rows * parts,)](
        logits,
        *_row_strides(logits),
        vocab,
        first_column,
        labels,
        ignore_index,
        softcap,
        triplet,
        runner_up_id,
        grad_triplet,
        out,
        *_row_strides(out),
        PARTS=parts,
        SOFTCAP=softcap > 0,
        SAME_ALIGNMENT=_same_alignment(logits, out),
        BLOCK=_block(logits, WARPS),
        num_warps=WARPS,
    )


def _check_labels_for_interpreter(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raise ``IndexError`` for a bad label on the CPU. Triton's interpreter skips the kernels' assert."""
    if labels.device.type == "cpu":
        check_label_values(labels, logits.shape[-1], ignore_index)


def triplet_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See ``reference.triplet_forward``."""
    _check_labels_for_interpreter(logits, labels, ignore_index)
    labels = labels.contiguous()
    triplet, runner_up_id = _empty_triplets(labels)
    with on_device(logits.device):
        for (y,), (t, out, out_id) in _launchable_pieces([logits], [labels, triplet, runner_up_id]):
            _forward(y, t, ignore_index, out, out_id, _parts(t.numel(), y))
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
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    per_row = [x.contiguous() for x in (grad_triplet, labels, triplet, runner_up_id)]
    with on_device(logits.device):
        for (y, grad), (g, t, saved, r) in _launchable_pieces([logits, out], per_row):
            _backward(g, y, t, ignore_index, saved, r, first_column, softcap, grad)
    return out


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    _check_labels_for_interpreter(logits, labels, ignore_index)
    labels = labels.contiguous()
    triplet, runner_up_id = _empty_triplets(labels)
    with on_device(logits.device):
        for (y,), (t, out, out_id) in _launchable_pieces([logits], [labels, triplet, runner_up_id]):
            rows, vocab = t.numel(), y.shape[-1]
            parts = _parts(rows, y)
            if parts > 1:  # too few rows to keep the device busy with one program each
                g = _forward(y, t, ignore_index, out, out_id, parts, scale)
                _backward(g, y, t, ignore_index, out, out_id, 0, 0.0, y)
                continue
            warps = FUSED_WARPS * (2 if vocab * y.element_size() > FUSED_LONG_ROW else 1)
            inverted_hinge_kernel[(rows,)](
                y,
                *_row_strides(y),
                vocab,
                t,
                ignore_index,
                out,
                out_id,
                scale,
                BLOCK=_block(y, warps),
                num_warps=warps,
                **_CHECKED,
                **_TWO_PROGRAMS,
            )
    return triplet, runner_up_id


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
    rows, columns = logits.shape
    if rows == 0:
        return
    with on_device(logits.device):
        triplet_columns_kernel[(rows,)](
            logits,
            logits.stride(0),
            columns,
            first_column,
            labels,
            softcap,
            out,
            0 if out is None else out.stride(0),
            *state,
            STORE=out is not None,
            SOFTCAP=softcap > 0,
            SAME_ALIGNMENT=out is None or _same_alignment(logits, out),
            BLOCK=_block(logits, WARPS),
            num_warps=WARPS,
        )


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """See ``reference.scale_rows_``. Rows whose factor is 1 are not read."""
    factor = factor.expand(logits.shape[:-1])
    if factor.dim() and not all(stride == 0 for stride in factor.stride()):
        factor = factor.contiguous()
    with on_device(logits.device):
        for (y,), (f,) in _launchable_pieces([logits], [factor]):
            rows, vocab = f.numel(), y.shape[-1]
            parts = _parts(rows, y)
            scale_rows_kernel[(rows * parts,)](
                y,
                *_row_strides(y),
                vocab,
                f,
                f.stride(-1) if f.dim() else 0,
                PARTS=parts,
                BLOCK=_block(y, WARPS),
                num_warps=WARPS,
            )

"""Launches of the Triton kernels of the softmax triplet.

The kernels are in ``triplet_kernels.py``. One program handles a row of logits. Several programs share each
row if there are too few rows to keep the device busy.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends.triton.triplet_kernels import (
    hidden_gradient_kernel,
    mean_scale_kernel,
    scale_rows_kernel,
    token_losses_kernel,
    triplet_backward_kernel,
    triplet_kernel,
    triplet_parts_kernel,
)
from loku_kernels.checks import Reduction, TokenLoss, check_label_values

VECTORS = 2  # vectors of 16 bytes that a thread holds of a row at a time
WARPS = 4  # warps of a program
FUSED_WARPS = 16  # warps of a program that also overwrites its row
# A row should stay in the L2 cache between the two passes. So programs of longer rows get twice the threads.
# This halves the number of rows under way. Some AMD devices have warps twice as wide, and a program has at
# most 1024 threads.
FUSED_LONG_ROW = 128 << 10  # bytes of a row
FUSED_MOST_WARPS = 16 if torch.version.hip else 32
MAX_PARTS = 64  # parts of a row
PROGRAMS_PER_SM = 4  # programs a multiprocessor that keep the device busy
LOSS_ROWS = 2048  # rows of the triplet that a program holds at a time
LABELS = 8192  # labels that a program holds at a time
HIDDEN_COLUMNS = 2048  # columns of the hidden states' gradient that a program computes

# device_assert needs `debug`. The second option keeps `debug` from checking integer operations for overflow.
_CHECKED = {"debug": True, "sanitize_overflow": False}
# Two programs of 512 threads share a multiprocessor's 65536 registers: 64 for each of its 1024 threads.
_TWO_PROGRAMS = {} if torch.version.hip else {"maxnreg": 64}
_CURRENT_DEVICE = contextlib.nullcontext()


# --- the shape of a launch ------------------------------------------------------------------------


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
    most = min(-(-logits.shape[-1] // _block(logits, WARPS)), MAX_PARTS)
    wanted = -(-PROGRAMS_PER_SM * _multiprocessors(logits.device) // rows) if most > 1 else 1
    return 1 << min((wanted - 1).bit_length(), most.bit_length() - 1)


def _row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return inner_rows, outer_stride and inner_stride of a piece (..., V), as ``row_start`` takes them."""
    if tensor.is_contiguous():
        return 1, tensor.shape[-1], 0
    if tensor.dim() == 3:
        return tensor.shape[1], tensor.stride(0), tensor.stride(1)
    return 1, tensor.stride(0), 0


def _pieces(strided: Sequence[Tensor], per_row: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Cut tensors into pieces whose rows lie on at most two strides. Nearly always there is one piece.

    Args:
        strided: Tensors (..., V) with any strides.
        per_row: Tensors (...) or (..., 3) with entries for each row, or None.

    Yields:
        The pieces of ``strided`` and the pieces of ``per_row``. Nothing if there is no row.
    """
    if strided[0].numel() == 0:
        return
    if all(x.dim() <= 3 or x.is_contiguous() for x in strided):
        yield strided, per_row
    else:
        for i in range(strided[0].shape[0]):
            yield from _pieces([x[i] for x in strided], [None if x is None else x[i] for x in per_row])


def _same_alignment(a: Tensor, b: Tensor) -> bool:
    """Say whether the row strides of two tensors agree up to whole vectors of 16 bytes."""
    vector = 16 // a.element_size()
    return all((x - y) % vector == 0 for x, y in zip(a.stride()[:-1], b.stride()[:-1], strict=True))


def _per_row(factor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Expand a factor () or (...) to the rows, so that a stride of 0 or 1 serves them."""
    if factor is None:
        return None
    factor = factor.expand(shape)
    return factor.contiguous() if any(factor.stride()) else factor


def _stride(factor: Tensor | None) -> int:
    """Return the stride of a factor by ``_per_row``."""
    return 0 if factor is None else int(any(factor.stride()))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make launches go to the tensors' device, which need not be the current one, and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _CURRENT_DEVICE
    return torch.cuda.device(device)


# --- forward, alone or with the gradient in place -------------------------------------------------


def _check_labels_for_interpreter(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raise ``IndexError`` for a bad label on the CPU. Triton's interpreter skips the kernels' assert."""
    if labels.device.type == "cpu":
        check_label_values(labels, logits.shape[-1], ignore_index)


def _triplet(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float, write: str, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute triplet and runner-up, and with ``write`` overwrite the logits (see ``triplet_kernel``)."""
    _check_labels_for_interpreter(logits, labels, ignore_index)
    labels = labels.contiguous()
    triplet = torch.empty((*labels.shape, 3), dtype=torch.float64, device=labels.device)
    runner_up_id = torch.empty_like(labels)
    capped = softcap > 0
    with on_device(logits.device):
        for (y,), (t, out, out_id) in _pieces([logits], [labels, triplet, runner_up_id]):
            rows, vocab, strides = t.numel(), y.shape[-1], _row_strides(y)
            parts = _parts(rows, y)
            partial = partial_id = None
            if parts > 1:  # too few rows to keep the device busy with one program each
                partial = torch.empty((rows, parts, 3), dtype=torch.float32, device=y.device)
                partial_id = torch.empty((rows, parts), dtype=torch.int32, device=y.device)
                triplet_parts_kernel[(rows * parts,)](
                    y,
                    *strides,
                    vocab,
                    t,
                    ignore_index,
                    softcap,
                    out,
                    partial,
                    partial_id,
                    PARTS=parts,
                    SOFTCAP=capped,
                    BLOCK=_block(y, WARPS),
                    num_warps=WARPS,
                    **_CHECKED,
                )
            fused = write and parts == 1
            warps = WARPS
            if fused:
                long = vocab * y.element_size() > FUSED_LONG_ROW
                warps = min(FUSED_WARPS * 2, FUSED_MOST_WARPS) if long else FUSED_WARPS
            triplet_kernel[(rows * parts if write else rows,)](
                y,
                *strides,
                vocab,
                t,
                ignore_index,
                softcap,
                out,
                out_id,
                partial,
                partial_id,
                scale,
                PARTS=parts,
                WRITE=write,
                SOFTCAP=capped,
                BLOCK=_block(y, warps),
                num_warps=warps,
                **_CHECKED,
                **(_TWO_PROGRAMS if fused else {}),
            )
    return triplet, runner_up_id


def triplet_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``reference.triplet_forward``."""
    return _triplet(logits, labels, ignore_index, softcap, "")


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``reference.inverted_hinge_``."""
    return _triplet(logits, labels, ignore_index, 0.0, "inverted_hinge", scale)


def rest_probabilities_(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``reference.rest_probabilities_``."""
    return _triplet(logits, labels, ignore_index, softcap, "rest_probabilities")


# --- backward -------------------------------------------------------------------------------------


def triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    *,
    factor: Tensor | None = None,
    first_column: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.triplet_backward``."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    per_row = [x.contiguous() for x in (grad_triplet, labels, triplet, runner_up_id)]
    with on_device(logits.device):
        for (y, grad), (g, t, saved, r, f) in _pieces(
            [logits, out], [*per_row, _per_row(factor, labels.shape)]
        ):
            rows = t.numel()
            parts = _parts(rows, y)
            triplet_backward_kernel[(rows * parts,)](
                y,
                *_row_strides(y),
                y.shape[-1],
                first_column,
                t,
                ignore_index,
                softcap,
                saved,
                r,
                g,
                f,
                _stride(f),
                grad,
                *_row_strides(grad),
                PARTS=parts,
                SOFTCAP=softcap > 0,
                SAME_ALIGNMENT=_same_alignment(y, grad),
                BLOCK=_block(y, WARPS),
                num_warps=WARPS,
            )
    return out


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """See ``reference.scale_rows_``. Rows whose factor is 1 are not read."""
    with on_device(logits.device):
        for (y,), (f,) in _pieces([logits], [_per_row(factor, logits.shape[:-1])]):
            rows = f.numel()
            parts = _parts(rows, y)
            scale_rows_kernel[(rows * parts,)](
                y,
                *_row_strides(y),
                y.shape[-1],
                f,
                _stride(f),
                PARTS=parts,
                BLOCK=_block(y, WARPS),
                num_warps=WARPS,
            )


# --- a few numbers a row --------------------------------------------------------------------------


def mean_scale(labels: Tensor, ignore_index: int) -> Tensor:
    """See ``reference.mean_scale``."""
    labels = labels.contiguous()
    scale = torch.empty((), dtype=torch.float64, device=labels.device)
    with on_device(labels.device):
        mean_scale_kernel[(1,)](labels, labels.numel(), ignore_index, scale, BLOCK=LABELS, num_warps=16)
    return scale


def token_losses(
    loss: TokenLoss,
    triplet: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.token_losses``. Exponentials are float32, or float64 if ``dtype`` is."""
    labels, triplet = labels.contiguous(), triplet.contiguous()
    rows, single = labels.numel(), reduction != "none"
    losses = torch.empty(() if single else labels.shape, dtype=dtype, device=labels.device)
    grad_triplet = torch.empty_like(triplet) if want_grad else None
    if rows or single:
        with on_device(labels.device):
            token_losses_kernel[(1 if single else -(-rows // LOSS_ROWS),)](
                triplet,
                labels,
                rows,
                ignore_index,
                losses,
                grad_triplet,
                LOSS=loss,
                REDUCTION=reduction,
                BLOCK=LOSS_ROWS,
                num_warps=16,
            )
    return losses, grad_triplet


def hidden_gradient(
    grad_triplet: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    triplet: Tensor,
    runner_up_id: Tensor,
    direction: Tensor,
    *,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """See ``reference.hidden_gradient``."""
    rows, columns = direction.shape
    out = torch.empty((rows, columns), dtype=weight.dtype, device=weight.device)
    grad_triplet, labels, triplet, runner_up_id = (
        x.contiguous() for x in (grad_triplet, labels, triplet, runner_up_id)
    )
    direction = direction if direction.stride(1) == 1 else direction.contiguous()
    factor = _per_row(factor, labels.shape)
    if rows and columns:
        with on_device(weight.device):
            hidden_gradient_kernel[(rows, -(-columns // HIDDEN_COLUMNS))](
                grad_triplet,
                factor,
                _stride(factor),
                weight,
                weight.stride(0),
                weight.shape[0],
                labels,
                triplet,
                runner_up_id,
                direction,
                direction.stride(0),
                out,
                columns,
                float(softcap),
                float(logit_scale),
                SOFTCAP=softcap > 0,
                BLOCK=HIDDEN_COLUMNS,
                num_warps=4,
                **_CHECKED,
            )
    return out

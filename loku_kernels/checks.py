"""Checks of arguments that several public functions share, and the messages of their errors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from loku_kernels.autocast import dtype_under_autocast

TokenLoss = Literal["inverted_hinge", "cross_entropy"]
Reduction = Literal["mean", "sum", "none"]

IGNORE_INDEX = -100
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Check that logits and labels fit the operators and one another.

    Args:
        logits: The logits (..., V).
        labels: The labels (...).

    Raises:
        ValueError: A shape, dtype, device or stride is wrong.
    """
    if logits.dim() < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits must have shape (..., V) with V >= 2, got {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.stride(-1) != 1 and logits.numel() > 0:
        raise ValueError(
            f"the last dimension of logits must be contiguous, got strides {logits.stride()}; "
            "call logits.contiguous() first"
        )
    check_label_tensor(labels, logits, "logits")


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` unless the name of a reduction is one of three.

    Args:
        reduction: The name.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_label_tensor(labels: Tensor, tensor: Tensor, name: str) -> None:
    """Check the shape, dtype and device of labels. Their values are left to ``check_label_values``.

    Args:
        labels: The labels (...).
        tensor: The tensor (..., *) that the labels must fit.
        name: The name of ``tensor``, for the message.

    Raises:
        ValueError: The labels are not int64, or have another shape or device.
    """
    expected = tensor.shape[:-1]
    if labels.shape != expected:
        raise ValueError(
            f"labels must have the shape of {name} without its last dimension, {tuple(expected)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype is not torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}; convert them by labels.long()")
    if labels.device != tensor.device:
        raise ValueError(f"labels must be on the device of {name}, {tensor.device}, got {labels.device}")


def check_label_values(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Check that every label is in the vocabulary or is ``ignore_index``.

    Args:
        labels: The labels (...), int64.
        vocab: The number of words V.
        ignore_index: The label of rows that do not count.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if labels.device.type == "cpu":
        if bad.any():
            position = int(bad.reshape(-1).nonzero()[0])
            raise bad_label_error(labels, position, vocab, ignore_index)
    else:
        torch._assert_async(~bad.any(), "loku_kernels: a label is outside the vocabulary")


def bad_label_error(labels: Tensor, position: int, vocab: int, ignore_index: int) -> IndexError:
    """Make the error that names a bad label.

    Args:
        labels: The labels (...), int64.
        position: The position of the bad label in the flattened labels.
        vocab: The number of words V.
        ignore_index: The label of rows that do not count.

    Returns:
        The error, for the caller to raise.
    """
    return IndexError(
        f"label {labels.reshape(-1)[position].item()} at position {position} is neither in [0, {vocab}) "
        f"nor ignore_index ({ignore_index})"
    )


def check_linear_operands(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """Check that the operands of a linear operator go together.

    Args:
        hidden: The hidden states (..., D).
        weight: The output embedding (V, D).
        labels: The labels (...).
        bias: The bias (V,), or None.
        softcap: The softcap of the logits, or None.

    Raises:
        ValueError: A shape, dtype or device is wrong, V < 2, or the softcap is not positive and finite.
    """
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must have shape (V, D) with V >= 2, got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape (..., {weight.shape[1]}) to go with weight {tuple(weight.shape)}, "
            f"got {tuple(hidden.shape)}"
        )
    check_label_tensor(labels, hidden, "hidden")
    if weight.dtype not in LOGIT_DTYPES:
        raise ValueError(f"weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    _check_like_hidden("weight", weight, hidden)
    if bias is not None:
        _check_like_hidden("bias", bias, hidden)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None for none, got {softcap}")


def _check_like_hidden(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Raise ``ValueError`` unless an operand has dtype and device of the hidden states."""
    # Autocast makes the dtypes equal, as for ``linear``, unless one of them is float64.
    if tensor.dtype is not hidden.dtype and dtype_under_autocast(tensor) is not dtype_under_autocast(hidden):
        advice = "" if torch.float64 in (tensor.dtype, hidden.dtype) else ", or multiply under autocast"
        raise ValueError(
            f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}; convert one of them, "
            f"such as hidden.to({tensor.dtype}){advice}"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")

"""Functions of the compiled core that compute two operations in one call, for the time of small losses.

They check their arguments as ``native`` does. ``fused_losses.py`` calls them wherever ``native``
is the chosen backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import native
from loku_kernels.checks import Reduction, TokenLoss, bad_label_error

_SAVED_NUMBERS = 7  # numbers a row that the core's logits_loss saves


def logits_loss(
    loss: TokenLoss,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    *,
    softcap: float = 0.0,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the triplets of logits and their loss in one call, which takes half the host's time of two.

    Args:
        loss: The name of the loss.
        logits: The logits (..., V), or their tanh with a softcap.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: The dtype of the loss, float32 or float64.
        softcap: The softcap. 0 (default) means none.
        overwrite: If true, ``rest_probabilities_`` computes the triplets, else ``triplet_forward`` (default).

    Returns:
        The loss, and a tensor with the numbers that ``logits_loss_backward`` or ``hidden_loss_backward``
        needs.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``.
    """
    rows, labels = native.rows_and_labels(logits, labels)
    value = labels.new_empty(labels.shape if reduction == "none" else (), dtype=dtype)
    saved = labels.new_empty(_SAVED_NUMBERS * labels.numel(), dtype=torch.float64)
    bad = native._core.logits_loss(
        rows.arguments,
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        softcap,
        overwrite,
        native.LOSS_TAGS[loss],
        native.REDUCTION_TAGS[reduction],
        dtype is torch.float64,
        value.data_ptr(),
        saved.data_ptr(),
        native.threads(),
    )
    if bad >= 0:
        raise bad_label_error(labels, bad, logits.shape[-1], ignore_index)
    return value, saved


def inverted_hinge_loss_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    late: bool,
) -> tuple[Tensor, float | None]:
    """Compute ``inverted_hinge_`` and ``token_losses`` in one call.

    Args:
        logits: The logits (..., V). Their gradient overwrites them.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: The dtype of the loss, float32 or float64.
        late: If true, a mean's 1/N is left to the caller.

    Returns:
        The loss, and 1/N if it is left to the caller, else None.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``.
    """
    rows, labels = native.rows_and_labels(logits, labels)
    value = labels.new_empty(labels.shape if reduction == "none" else (), dtype=dtype)
    share = 1 / max(native.number_counted(labels, ignore_index), 1) if reduction == "mean" else 1.0
    bad = native._core.inverted_hinge_loss_(
        rows.arguments,
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        1.0 if late else share,
        native.REDUCTION_TAGS[reduction],
        dtype is torch.float64,
        value.data_ptr(),
        native.threads(),
    )
    if bad >= 0:
        raise bad_label_error(labels, bad, logits.shape[-1], ignore_index)
    return value, share if late else None


def logits_loss_backward(
    saved: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, factor: Tensor
) -> Tensor:
    """Compute the gradient of logits from the numbers of ``logits_loss``.

    Args:
        saved: The numbers.
        logits: The logits (..., V), as ``logits_loss`` had them.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. Their gradient is 0.
        factor: The gradient of the loss, () or (...).

    Returns:
        The gradient (..., V), a new contiguous tensor.
    """
    native.require("labels", labels, logits.shape[:-1], torch.int64)
    native.require("saved", saved, (_SAVED_NUMBERS * labels.numel(),), torch.float64)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    labels = labels.contiguous()
    rows, factors = native.Rows(logits), native.Factors(factor, labels.shape)
    _, _, _, count, columns, tag = rows.arguments
    native._core.logits_loss_backward(
        rows.arguments,
        labels.data_ptr(),
        labels.numel(),
        ignore_index,
        saved.data_ptr(),
        *factors.arguments,
        (out.data_ptr(), 0, columns, count, columns, tag),
        native.threads(),
    )
    return out


def hidden_loss_backward(
    saved: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    direction: Tensor,
    *,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Compute ``hidden_gradient`` from the numbers of ``logits_loss``.

    Args:
        saved: The numbers.
        factor: The gradient of the loss, () or (N,), or None for 1.
        weight: The output embedding (V, D).
        labels: The labels (N,), int64.
        direction: The product (N, D) of ``rest_probabilities_`` and the weight.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.

    Returns:
        The gradient (N, D) of the hidden states.
    """
    native.require("saved", saved, (_SAVED_NUMBERS * labels.numel(),), torch.float64)

    def call(
        factors: tuple[float, int], weight_rows: tuple[Any, ...], ids: tuple[int, int], *rest: Any
    ) -> int:
        return int(native._core.hidden_loss_backward(saved.data_ptr(), *factors, *weight_rows, *ids, *rest))

    return native.gradient_of_hidden(call, factor, weight, labels, direction, softcap, logit_scale)

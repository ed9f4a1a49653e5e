"""A loss of logits or of hidden states, and its gradient, by as few calls as a backend has for them.

A loss is two operations, and its gradient one. The compiled core has functions that compute two operations in
one call (``one_call.logits_loss``), which halves the host's time of a small loss on a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import PLAIN, choose, native, one_call
from loku_kernels.checks import Reduction, TokenLoss

_NATIVE: Any = native  # any, because a module is not known to be a ``Backend``

# The numbers that a backward needs: one tensor of the core, or grad_triplet, triplet and runner_up_id.
Saved = tuple[Tensor, ...]


def loss_of_logits(
    loss: TokenLoss,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    softcap: float = 0.0,
    overwrite: bool = False,
) -> tuple[Tensor, Saved]:
    """Compute a reduced loss of whole rows of logits.

    Args:
        loss: The name of the loss.
        logits: The logits (..., V), or their tanh with a softcap.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: The dtype of the loss, float32 or float64.
        softcap: The softcap. 0 (default) means none.
        overwrite: If true, ``rest_probabilities_`` overwrites the logits (N, V). Default false.

    Returns:
        The loss, and the numbers that its backward needs.
    """
    operation = "rest_probabilities_" if overwrite else "triplet_forward"
    backend = choose(operation, logits)
    if backend is _NATIVE:
        value, saved = one_call.logits_loss(
            loss, logits, labels, ignore_index, reduction, dtype, softcap=softcap, overwrite=overwrite
        )
        return value, (saved,)
    compute = backend.rest_probabilities_ if overwrite else backend.triplet_forward
    triplet, runner_up_id = compute(logits, labels, ignore_index, softcap=softcap)
    value, grad_triplet = choose("token_losses", labels).token_losses(
        loss, triplet, labels, ignore_index, reduction, dtype, True
    )
    assert grad_triplet is not None
    return value, (grad_triplet, triplet, runner_up_id)


def gradient_of_logits(
    saved: Saved, logits: Tensor, labels: Tensor, ignore_index: int, factor: Tensor
) -> Tensor:
    """Compute the gradient of logits from the numbers of ``loss_of_logits``.

    Args:
        saved: The numbers.
        logits: The logits (..., V).
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
        factor: The gradient of the loss, () or (...).

    Returns:
        The gradient (..., V).
    """
    if len(saved) == 1:
        return one_call.logits_loss_backward(saved[0], logits, labels, ignore_index, factor)
    grad_triplet, *own = saved
    backend = choose("triplet_backward", logits)
    return backend.triplet_backward(grad_triplet, logits, labels, ignore_index, *own, factor=factor)


def inverted_hinge_loss_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    late: bool,
) -> tuple[Tensor, Tensor | float | None]:
    """Compute the reduced IHL of logits, and overwrite them with its gradient.

    Args:
        logits: The logits (..., V).
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: The dtype of the loss, float32 or float64.
        late: If true, a mean's 1/N is left to the caller.

    Returns:
        The loss, and the factor by which the gradient is still to be multiplied, or None. The factor is a
        tensor () on the device of the logits, or a number, so that the host does not wait for the device.
    """
    backend = choose("inverted_hinge_", logits)
    if backend is _NATIVE:
        return one_call.inverted_hinge_loss_(logits, labels, ignore_index, reduction, dtype, late)
    of_labels = choose("token_losses", labels)
    share = of_labels.mean_scale(labels, ignore_index) if reduction == "mean" else None
    now = torch.ones((), dtype=torch.float64, device=logits.device) if late or share is None else share
    triplet, _ = backend.inverted_hinge_(logits, labels, ignore_index, now)
    value, _ = of_labels.token_losses(
        "inverted_hinge", triplet, labels, ignore_index, reduction, dtype, False
    )
    return value, share if late else None


def gradient_of_hidden(
    saved: Saved,
    factor: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    direction: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Compute the gradient of hidden states from two rows of the weight and the direction.

    Args:
        saved: The numbers of ``loss_of_logits``, or a gradient of triplets with the triplets and their
            runner-ups.
        factor: The factors (N,) of the rows' gradients, or one factor (), or None for 1.
        weight: The output embedding (V, D).
        labels: The labels (N,), int64.
        direction: The product (N, D) of ``rest_probabilities_`` and the weight.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.

    Returns:
        The gradient (N, D). It needs no logits.
    """
    if weight.stride(1) != 1:  # the kernels read a row of the weight as it lies
        backend = PLAIN
    elif len(saved) == 1:
        return one_call.hidden_loss_backward(
            saved[0], factor, weight, labels, direction, softcap=softcap, logit_scale=logit_scale
        )
    else:
        backend = choose("hidden_gradient", direction, weight)
    grad_triplet, triplet, runner_up_id = tensors_of(saved, labels)
    return backend.hidden_gradient(
        grad_triplet,
        factor,
        weight,
        labels,
        triplet,
        runner_up_id,
        direction,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def all_rows_stay(labels: Tensor, ignore_index: int) -> bool:
    """Say whether no row is dropped: the labels are not on a CPU, or all count.

    The host knows on a CPU alone which rows count. A question to another device would wait for it.

    Args:
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count.
    """
    if not labels.is_cpu:
        return True
    if native.serves(labels):
        return native.number_counted(labels, ignore_index) == labels.shape[0]
    return bool((labels != ignore_index).all())


def tensors_of(saved: Saved, labels: Tensor) -> tuple[Tensor, ...]:
    """Return grad_triplet (..., 3), triplet (..., 3) and runner_up_id (...) of saved numbers.

    Args:
        saved: The numbers of ``loss_of_logits``.
        labels: The labels (...) of the rows.
    """
    if len(saved) == 3:
        return saved
    shape, count = labels.shape, labels.numel()
    triplet, grad_triplet, runner_up_id = saved[0].split([3 * count, 3 * count, count])
    runner_up_id = runner_up_id.view(torch.int64).view(shape)
    return grad_triplet.view(*shape, 3), triplet.view(*shape, 3), runner_up_id

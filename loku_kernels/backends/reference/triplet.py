"""Plain torch for the softmax triplet: the formulas, and the functions of the backend.

With target t and runner-up r = argmax over v != t of y_v, a row of logits y becomes

    target = y_t        runner_up = y_r        rest = log sum over v not in {t, r} of exp(y_v)

``softmax_triplet`` is differentiable. The tests compare the gradients of the kernels with autograd through
it, in float64. ``inverted_hinge_loss`` is the formula of the paper and uses no triplet.

The functions of the backend come after the formulas. They apply the formulas to a few rows at a time, so that
the float64 copies stay small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import Reduction, TokenLoss, check_label_values

PIECE_ENTRIES = 1 << 22  # entries of the float64 copy of logits (32 MiB), at a time


# --- formulas -------------------------------------------------------------------------------------


def softmax_triplet(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the triplet and the runner-up's index of each row.

    Args:
        logits: The logits (N, V), of any floating dtype, or their tanh with a softcap.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count. They get zeros and -1. Default -100.
        softcap: The softcap. 0 (default) means none.

    Returns:
        The triplet (N, 3), float64, and the runner-up's index (N,), int64.
    """
    counted = labels != ignore_index
    target_id = labels.where(counted, 0).unsqueeze(1)
    logits = logits.double() * (softcap or 1.0)
    others = logits.scatter(1, target_id, -torch.inf)
    runner_up_id = others.detach().argmax(1, keepdim=True)
    # If all other words are masked, argmax saw only -inf and may have returned the target.
    runner_up_id = runner_up_id.where(runner_up_id != target_id, (target_id == 0).long())
    rest = others.scatter(1, runner_up_id, -torch.inf).logsumexp(1)
    triplet = torch.stack([logits.gather(1, target_id)[:, 0], logits.gather(1, runner_up_id)[:, 0], rest], 1)
    return triplet.where(counted[:, None], 0.0), runner_up_id[:, 0].where(counted, -1)


def softmax_triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    first_column: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute the gradient of a block of logits from that of the triplet.

    It is g_target at the label, g_runner_up at the runner-up and g_rest * exp(y - rest) elsewhere. With a
    softcap it is the gradient of the argument of tanh.

    Args:
        grad_triplet: The gradient (N, 3) of the triplet, float64.
        logits: The logits (N, C) of the columns [first_column, first_column + C), or their tanh with a
            softcap.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count. Their gradient is 0.
        triplet: The triplet (N, 3), float64.
        runner_up_id: The runner-up's index (N,), int64.
        first_column: The column of the vocabulary at which the block begins. Default 0.
        softcap: The softcap. 0 (default) means none.

    Returns:
        The gradient (N, C), float64.
    """
    counted = (labels != ignore_index)[:, None]
    rest = triplet[:, 2:]
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    grad = grad_triplet[:, 2:] * (logits - rest).exp()
    grad = grad.where(rest != -torch.inf, 0.0)
    column = _columns(first_column, logits)
    grad = grad_triplet[:, :1].where(column == labels[:, None], grad)
    grad = grad_triplet[:, 1:2].where(column == runner_up_id[:, None], grad)
    if softcap:
        grad = grad * (1 - entries**2)
    return grad.where(counted, 0.0)


def _columns(first_column: int, logits: Tensor) -> Tensor:
    """Return the columns (C,) of the vocabulary that a block of logits (N, C) has."""
    stop = first_column + logits.shape[1]
    return torch.arange(first_column, stop, dtype=torch.int64, device=logits.device)


def triplet_columns(
    logits: Tensor,
    first_column: int,
    labels: Tensor,
    numbers: Tensor,
    runner_up_id: Tensor,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Take a block of columns into the numbers of the rows.

    Args:
        logits: The logits (N, C) of the block, or their tanh with a softcap.
        first_column: The column of the vocabulary at which the block begins.
        labels: The labels (N,), int64.
        numbers: The numbers (N, 4) of the rows so far, float64, as in ``OnlineState``.
        runner_up_id: The column (N,) of the runner-up so far, int64.
        softcap: The softcap. 0 (default) means none.

    Returns:
        Six tensors. The first holds the terms (N, C): exp(y - rest_max) times the softcap's slope, and 0 at
        target and runner-up. The others are numbers, runner_up_id, rescale, demoted_id and demoted_share of
        the next ``OnlineState``.
    """
    target, runner_up, rest_max, rest_sum = numbers.unbind(1)
    entries = logits.double()
    logits = entries * (softcap or 1.0)
    slope = 1 - entries**2 if softcap else torch.ones_like(entries)
    column = _columns(first_column, logits)
    is_target = column == labels[:, None]
    target = target.where(~is_target.any(1), logits.masked_fill(~is_target, 0).sum(1))
    others = logits.masked_fill(is_target, -torch.inf)
    best, best_index = others.max(1)
    better = best > runner_up
    demoted = better & (runner_up != -torch.inf)
    demoted_logit = runner_up.where(demoted, -torch.inf)
    demoted_id = runner_up_id.where(demoted, -1)
    runner_up = best.where(better, runner_up)
    runner_up_id = (first_column + best_index).where(better, runner_up_id)
    others = others.masked_fill(column == runner_up_id[:, None], -torch.inf)
    new_max = torch.stack([rest_max, others.amax(1), demoted_logit]).amax(0)
    reference = new_max.where(new_max != -torch.inf, 0.0)  # if all words are masked, exp(-inf) = 0
    terms = (others - reference[:, None]).exp()
    share = (demoted_logit - reference).exp()
    rescale = (rest_max - reference).exp()
    rest_sum = rest_sum * rescale + terms.sum(1) + share
    if softcap:
        share = share * (1 - (demoted_logit.where(demoted, 0.0) / softcap) ** 2)
    numbers = torch.stack([target, runner_up, new_max, rest_sum], 1)
    terms = (terms * slope).masked_fill(others == -torch.inf, 0.0)
    return terms, numbers, runner_up_id, rescale, demoted_id, share


def token_loss(loss: TokenLoss, triplet: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token, and its gradient in the triplet.

    Args:
        loss: The name of the loss.
        triplet: The triplets (..., 3), float64.

    Returns:
        The losses (...) and the gradients (..., 3), float64. Only sums of probabilities occur, so nothing
        cancels for a probability near 1.
    """
    p0, p1, p2 = triplet.softmax(-1).unbind(-1)
    if loss == "inverted_hinge":
        # 1 = p_0 + p_1 + p_2 turns 1 + p_0 - p_1 into a sum.
        return 2 * p0 + p2, torch.stack([p0 * (2 * p1 + p2), -p1 * (2 * p0 + p2), p2 * (p1 - p0)], -1)
    if loss == "cross_entropy":
        return -triplet.log_softmax(-1)[..., 0], torch.stack([-(p1 + p2), p1, p2], -1)
    raise ValueError(f'loss must be "inverted_hinge" or "cross_entropy", got {loss!r}')


def inverted_hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute IHL by the paper's formula: 1 + p_target - max over other tokens of p (LoKU, Eq. 3).

    On ties the lowest index has the maximum and its gradient.

    Args:
        logits: The logits (N, V), of any floating dtype.
        labels: The labels (N,), int64. None is ignored.

    Returns:
        The losses (N,), in the dtype of the logits.
    """
    p = logits.softmax(-1)
    is_target = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    runner_up_id = p.detach().masked_fill(is_target, -torch.inf).argmax(-1, keepdim=True)
    return 1 + p[is_target] - p.gather(-1, runner_up_id)[..., 0]


# --- the backend: triplet -------------------------------------------------------------------------


def _slices_of_rows(logits: Tensor, *per_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut logits and their tensors per row into views of a few rows.

    Args:
        logits: The logits (..., V).
        per_row: Tensors (...) or (..., *) with entries for each row.

    Yields:
        Views of all the tensors, in their order, with (n, V) logits of at most ``PIECE_ENTRIES`` entries or
        one row.
    """
    tensors = (logits, *per_row)
    if logits.dim() == 1:
        yield tuple(x.unsqueeze(0) for x in tensors)
    elif logits.dim() == 2:
        rows = max(1, PIECE_ENTRIES // logits.shape[-1])
        yield from zip(*(torch.split(x, rows) for x in tensors), strict=True)
    else:
        for parts in zip(*(x.unbind(0) for x in tensors), strict=True):
            yield from _slices_of_rows(*parts)


def triplet_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the triplet and the runner-up's index of logits.

    Args:
        logits: The logits (..., V), or their tanh with a softcap.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. They get zeros and -1.
        softcap: The softcap. 0 (default) means none.

    Returns:
        The triplet (..., 3), float64, and the runner-up's index (...), int64.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    check_label_values(labels, logits.shape[-1], ignore_index)
    triplet = torch.empty(*labels.shape, 3, dtype=torch.float64, device=logits.device)
    runner_up_id = torch.empty_like(labels, memory_format=torch.contiguous_format)
    for y, t, out, out_id in _slices_of_rows(logits, labels, triplet, runner_up_id):
        piece, piece_id = softmax_triplet(y, t, ignore_index, softcap)
        out.copy_(piece)
        out_id.copy_(piece_id)
    return triplet, runner_up_id


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
    """Compute the gradient of the logits from that of the triplet.

    Args:
        grad_triplet: The gradient (..., 3) of the triplet, float64.
        logits: The logits (..., C) of the columns [first_column, first_column + C), or their tanh with a
            softcap.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. Their gradient is 0.
        triplet: The triplet (..., 3), float64.
        runner_up_id: The runner-up's index (...), int64.
        factor: The factors (...) of the rows' ``grad_triplet``, or one factor (), of any floating dtype.
            Default: 1.
        first_column: The column of the vocabulary at which the block begins. Default 0.
        softcap: The softcap. 0 (default) means none.
        out: The tensor (..., C) for the result, in the dtype of the logits. It may be the logits. Default: a
            new contiguous tensor.

    Returns:
        The gradient (..., C), which is ``out`` if that is given.
    """
    grad_triplet = _times(grad_triplet, factor)
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for y, t, saved, r, g, target in _slices_of_rows(
        logits, labels, triplet, runner_up_id, grad_triplet, out
    ):
        target.copy_(softmax_triplet_backward(g, y, t, ignore_index, saved, r, first_column, softcap))
    return out


def inverted_hinge_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with a multiple of the gradient of the sum of the rows' IHL.

    Args:
        logits: The logits (..., V).
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. Their gradient is 0.
        scale: The factor of the gradient, a float64 tensor ().

    Returns:
        The triplet (..., 3), float64, and the runner-up's index (...), int64.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    triplet, runner_up_id = triplet_forward(logits, labels, ignore_index)
    _, grad = token_loss("inverted_hinge", triplet)
    triplet_backward(grad * scale, logits, labels, ignore_index, triplet, runner_up_id, out=logits)
    return triplet, runner_up_id


def rest_probabilities_(
    logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with exp(y - rest) times the softcap's slope, and 0 at target and runner-up.

    Args:
        logits: The logits (N, V), or their tanh with a softcap.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count. They become zeros.
        softcap: The softcap. 0 (default) means none.

    Returns:
        The triplet (N, 3), float64, and the runner-up's index (N,), int64.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    triplet, runner_up_id = triplet_forward(logits, labels, ignore_index, softcap=softcap)
    grad = torch.zeros_like(triplet)
    grad[..., 2] = 1.0
    triplet_backward(grad, logits, labels, ignore_index, triplet, runner_up_id, softcap=softcap, out=logits)
    return triplet, runner_up_id


def triplet_columns_(
    logits: Tensor,
    labels: Tensor,
    state: OnlineState,
    *,
    first_column: int,
    softcap: float,
    store: bool,
) -> None:
    """Take a block of columns into ``state``, in place.

    Args:
        logits: The logits (N, C) of the block, or their tanh with a softcap.
        labels: The labels (N,), int64. None is ignored, because the caller has dropped the ignored rows.
        state: The state of the rows, which is overwritten.
        first_column: The column of the vocabulary at which the block begins.
        softcap: The softcap. 0 means none.
        store: If true, the terms overwrite the logits: exp(y - rest_max) times the softcap's slope, and 0 at
            target and runner-up.
    """
    for y, t, numbers, runner_up_id, *changes in _slices_of_rows(logits, labels, *state):
        terms, *new = triplet_columns(y, first_column, t, numbers, runner_up_id, softcap)
        for old, value in zip([numbers, runner_up_id, *changes], new, strict=True):
            old.copy_(value)
        if store:
            y.copy_(terms)


def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """Multiply the rows of logits, in place.

    Args:
        logits: The logits (..., V).
        factor: The factors (...) of the rows, or one factor ().
    """
    logits.mul_(factor.unsqueeze(-1))


# --- the backend: losses of triplets ---------------------------------------------------------------


def _times(grad_triplet: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply the gradients (..., 3) of triplets by the factors (...) of their rows, or by one factor ()."""
    return grad_triplet if factor is None else grad_triplet * factor.double().unsqueeze(-1)


def mean_scale(labels: Tensor, ignore_index: int) -> Tensor:
    """Compute 1 over the number of labels that count, or 1 if none does.

    Args:
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count.

    Returns:
        A float64 tensor ().
    """
    return (labels != ignore_index).sum().clamp(min=1).double().reciprocal()


def token_losses(
    loss: TokenLoss,
    triplet: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    dtype: torch.dtype,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the reduced loss of triplets, and its gradient in them.

    Args:
        loss: The name of the loss.
        triplet: The triplets (..., 3), float64.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. They have the loss 0 and no gradient.
        reduction: ``"mean"`` over the counted rows, ``"sum"`` or ``"none"``. The mean is 0 if no row counts.
        dtype: The dtype of the loss, float32 or float64.
        want_grad: If false, the second result is None.

    Returns:
        The loss (), or the losses (...) without a reduction. The gradients (..., 3), float64, are those of
        the reduced loss, or those of each row's own loss without a reduction.
    """
    counted = labels != ignore_index
    losses, grad = token_loss(loss, triplet)
    losses, grad = losses.where(counted, 0.0), grad.where(counted[..., None], 0.0)
    if reduction == "mean":
        scale = mean_scale(labels, ignore_index)
        losses, grad = losses.sum() * scale, grad * scale
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(dtype), grad if want_grad else None


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
    """Compute the gradient of the hidden states of a linear operator. It needs no logits.

    Args:
        grad_triplet: The gradient (N, 3) of the triplet, float64.
        factor: The factors (N,) of the rows' ``grad_triplet``, or one factor (), of any floating dtype, or
            None for 1.
        weight: The output embedding W (V, D). Its last dimension is contiguous.
        labels: The labels (N,), int64.
        triplet: The triplet (N, 3), float64.
        runner_up_id: The runner-up's index (N,), int64, or -1 for a row that does not count. Such a row gets
            zeros.
        direction: The product (N, D) of ``rest_probabilities_`` and W, in the dtype of ``weight``.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.

    Returns:
        The gradient (N, D) in the dtype of ``weight``: g_t y'_t W[t] + g_r y'_r W[r] + g_rest logit_scale O,
        with the slopes y' of the logits and the direction O. It is rounded once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad = _times(grad_triplet, factor)
    slope = logit_scale * (1 - (triplet[:, :2] / softcap) ** 2) if softcap else logit_scale
    # A rest of -inf (V = 2, or all other words masked) has no gradient, for any loss.
    rest = grad[:, 2:].where(triplet[:, 2:] != -torch.inf, 0.0) * logit_scale
    grad = torch.cat([grad[:, :2] * slope, rest], 1).to(dtype)
    total = direction * grad[:, 2:]
    for column, index in enumerate((labels, runner_up_id)):
        rows = weight.index_select(0, index.clamp(0, len(weight) - 1))  # a row that does not count has any
        total.addcmul_(rows.to(dtype), grad[:, column, None])
    return total.where(runner_up_id[:, None] >= 0, 0.0).to(weight.dtype)

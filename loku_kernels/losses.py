"""Losses on the softmax triplet, for logits and for hidden states with their output embedding.

The loss of a token is one line of torch on its triplet (``inverted_hinge``, ``cross_entropy``). The
``linear_*`` losses are for whole models. The others are for code that already holds logits.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from loku_kernels.backends import choose
from loku_kernels.checks import IGNORE_INDEX, check_logits
from loku_kernels.triplet import ihl_forward_backward_, linear_softmax_triplet, softmax_triplet

Reduction = Literal["mean", "sum", "none"]


def inverted_hinge(triplet: Tensor) -> Tensor:
    """Compute the Inverted Hinge Loss: 1 + p_target - max over other tokens of p (LoKU, Eq. 3).

    Args:
        triplet: The triplets (..., 3) of the tokens, as ``softmax_triplet`` returns them.

    Returns:
        The losses (...), in the dtype of ``triplet``.
    """
    p = triplet.softmax(-1)
    # 1 = p_0 + p_1 + p_2 turns the difference into a sum, which is exact for p_1 near 1.
    return 2 * p[..., 0] + p[..., 2]


def cross_entropy(triplet: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the target, in nats.

    Args:
        triplet: The triplets (..., 3) of the tokens, as ``softmax_triplet`` returns them.

    Returns:
        The losses (...), in the dtype of ``triplet``.
    """
    return -triplet.log_softmax(-1)[..., 0]


def reduce_loss(loss: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    """Reduce per-token losses over the counted tokens.

    Args:
        loss: The losses (...) of the tokens.
        counted: A bool tensor (...) that is true for each token that counts.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. ``"none"`` sets the losses of other tokens to 0.

    Returns:
        A scalar, or the losses (...) for ``"none"``. The mean is 0, with gradients of 0, if no token counts.

    Raises:
        ValueError: ``reduction`` is none of the three.
    """
    loss = loss.where(counted, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _InplaceIHL(torch.autograd.Function):
    """IHL whose forward overwrites the logits with their gradient. The backward returns that memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
        counted = labels != ignore_index
        # The forward's one write applies the mean's 1/N, except in float16. There it would round to 0 the
        # small gradients that a loss scale protects, so the backward applies it. 1/N stays a tensor, so that
        # the host does not wait for the device.
        one = torch.ones((), dtype=torch.float64, device=logits.device)
        share = counted.sum().clamp(min=1).double().reciprocal() if reduction == "mean" else one
        scale, ctx.pending = (one, share) if logits.dtype == torch.float16 else (share, one)
        grad = logits.detach()
        triplet, _ = ihl_forward_backward_(grad, labels, ignore_index, scale)
        ctx.grad = grad
        return reduce_loss(inverted_hinge(triplet), counted, reduction).to(_loss_dtype(logits.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.grad is None:
            raise RuntimeError(
                "ihl_loss(inplace=True) keeps its gradient where the logits were, and it is used up: "
                "a second backward needs inplace=False"
            )
        grad, ctx.grad = ctx.grad, None
        _scale_(grad, grad_loss * ctx.pending)
        return grad, None, None, None


def _scale_(logits: Tensor, factor: Tensor) -> None:
    """Multiply logits (..., V) by a factor, () or (...), in place. A factor known to be 1 costs nothing."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1.0:
        return
    choose("scale_rows_", logits).scale_rows_(logits, factor)


def ihl_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    inplace: bool = False,
) -> Tensor:
    """Compute the Inverted Hinge Loss of logits: 1 + p_target - max over other tokens of p (LoKU, Eq. 3).

    It equals, in plain torch::

        p = logits.softmax(-1)
        p_target = p.gather(-1, labels[..., None])[..., 0]
        p_runner_up = p.scatter(-1, labels[..., None], -torch.inf).amax(-1)
        loss = (1 + p_target - p_runner_up).mean()

    Args:
        logits: The logits (..., V), float32, bfloat16, float16 or float64. The last dimension is contiguous.
            Rows may have any stride.
        labels: The labels (...), int64, aligned with the logits. The function shifts nothing.
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted tokens (default), ``"sum"`` or ``"none"``.
        inplace: If true, the gradient overwrites ``logits``, and no tensor of their size is allocated. This
            is for logits that nothing else needs. A second backward raises ``RuntimeError``. The logits stay
            unchanged under ``no_grad``, or if they require no gradient. Default false.

    Returns:
        The loss, float32, or float64 for float64 logits. It is a scalar, or has shape (...) with zeros at
        ignored rows for ``"none"``. The mean and its gradients are 0 if no token counts (torch's cross
        entropy gives NaN).

    Raises:
        ValueError: The arguments are wrong, as for ``softmax_triplet``, or ``inplace=True`` gets expanded
            logits.
        IndexError: A label is out of range, as for ``softmax_triplet``.
    """
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        check_logits(logits, labels)
        if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError(
                "inplace=True needs logits of their own memory, got expanded ones; clone them first"
            )
        inplace_loss: Tensor = _InplaceIHL.apply(logits, labels, ignore_index, reduction)
        return inplace_loss
    triplet, _ = softmax_triplet(logits, labels, ignore_index=ignore_index)
    loss = reduce_loss(inverted_hinge(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(logits.dtype))


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the cross entropy of logits, in nats. It is the loss of language modelling.

    Args:
        logits: The logits (..., V), as for ``ihl_loss``.
        labels: The labels (...), int64, as for ``ihl_loss``.
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted tokens (default), ``"sum"`` or ``"none"``.

    Returns:
        The loss, with the dtype and shape that ``ihl_loss`` has.

    Raises:
        ValueError: The arguments are wrong, as for ``softmax_triplet``.
        IndexError: A label is out of range, as for ``softmax_triplet``.
    """
    triplet, _ = softmax_triplet(logits, labels, ignore_index=ignore_index)
    loss = reduce_loss(cross_entropy(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(logits.dtype))


def _linear_loss(
    token_loss: Callable[[Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Reduce ``token_loss`` of the triplets of hidden states (..., D)."""
    triplet, _ = linear_softmax_triplet(
        hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale
    )
    loss = reduce_loss(token_loss(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(hidden.dtype))


def linear_ihl_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute ``ihl_loss`` of the logits of an output embedding, block by block.

    The loss is ``ihl_loss(logit_scale * torch.nn.functional.linear(hidden, weight, bias), labels)``. A
    ``softcap`` changes the logits as in ``linear_softmax_triplet``.

    Args:
        hidden: The hidden states (..., D), as for ``linear_softmax_triplet``.
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        labels: The labels (...), int64, aligned with ``hidden``.
        bias: The bias (V,) of the output embedding, in the dtype of ``hidden``, or None (default).
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted tokens (default), ``"sum"`` or ``"none"``.
        softcap: The softcap of the logits, or None (default).
        logit_scale: The factor of the logits, applied before the softcap. Default 1.0.

    Returns:
        The loss, with the dtype and shape that ``ihl_loss`` has.

    Raises:
        ValueError: The arguments are wrong, as for ``linear_softmax_triplet``.
        IndexError: A label is out of range, as for ``softmax_triplet``.
    """
    return _linear_loss(
        inverted_hinge, hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
    )


def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute ``cross_entropy_loss`` of the logits of an output embedding, block by block.

    Args:
        hidden: The hidden states (..., D), as for ``linear_softmax_triplet``.
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        labels: The labels (...), int64, aligned with ``hidden``.
        bias: The bias (V,) of the output embedding, in the dtype of ``hidden``, or None (default).
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted tokens (default), ``"sum"`` or ``"none"``.
        softcap: The softcap of the logits, or None (default).
        logit_scale: The factor of the logits, applied before the softcap. Default 1.0.

    Returns:
        The loss, with the dtype and shape that ``ihl_loss`` has.

    Raises:
        ValueError: The arguments are wrong, as for ``linear_softmax_triplet``.
        IndexError: A label is out of range, as for ``softmax_triplet``.
    """
    return _linear_loss(
        cross_entropy, hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
    )

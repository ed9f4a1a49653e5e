"""Losses on the softmax triplet, for logits and for hidden states with their output embedding.

Each loss of a token is a line of torch on its triplet (``inverted_hinge``, ``cross_entropy``); the
``linear_*`` forms are for whole models, the others for code that already holds logits.
"""

import torch
from torch import Tensor

from loku_kernels.backends import choose
from loku_kernels.checks import IGNORE_INDEX, check_logits
from loku_kernels.triplet import ihl_forward_backward_, linear_softmax_triplet, softmax_triplet


def inverted_hinge(triplet):
    """IHL (...) of a triplet (..., 3): 1 + p_target - max over other tokens of p (LoKU, Eq. 3)."""
    p = triplet.softmax(-1)
    # 1 = p_0 + p_1 + p_2 turns the difference into a sum: exact where p_1 is near 1
    return 2 * p[..., 0] + p[..., 2]


def cross_entropy(triplet):
    """Negative log-likelihood (...), in nats, of the target of a triplet (..., 3)."""
    return -triplet.log_softmax(-1)[..., 0]


def reduce_loss(loss, counted, reduction):
    """Reduce per-token losses (...) over the tokens where ``counted`` (...) is true.

    ``"mean"`` over no token at all is 0, with gradients of 0.
    """
    loss = loss.where(counted, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _loss_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


class _InplaceIHL(torch.autograd.Function):
    """The forward overwrites the logits with their gradient, which the backward hands on."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, reduction):
        counted = labels != ignore_index
        # The mean's 1/N belongs in the one write there is, except in float16, which would lose the
        # small gradients that a loss scale is there to save. It is a tensor: nothing waits for the device.
        one = torch.ones((), dtype=torch.float64, device=logits.device)
        share = counted.sum().clamp(min=1).double().reciprocal() if reduction == "mean" else one
        scale, ctx.pending = (one, share) if logits.dtype == torch.float16 else (share, one)
        grad = logits.detach()
        triplet, _ = ihl_forward_backward_(grad, labels, ignore_index, scale)
        ctx.grad = grad
        return reduce_loss(inverted_hinge(triplet), counted, reduction).to(_loss_dtype(logits.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grad is None:
            raise RuntimeError(
                "ihl_loss(inplace=True) keeps its gradient where the logits were, and it is used up: "
                "a second backward needs inplace=False"
            )
        grad, ctx.grad = ctx.grad, None
        _scale_(grad, grad_loss * ctx.pending)
        return grad, None, None, None


def _scale_(logits: Tensor, factor: Tensor) -> None:
    """logits (..., V) *= factor, () or (...), without touching them where the factor is known to be 1."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1.0:
        return
    choose("scale_rows_", logits).scale_rows_(logits, factor)


def ihl_loss(logits, labels, *, ignore_index=IGNORE_INDEX, reduction="mean", inplace=False):
    """Inverted Hinge Loss of logits: 1 + p_target - max over other tokens of p (LoKU, Eq. 3).

    The same as, in plain torch::

        p = logits.softmax(-1)
        p_target = p.gather(-1, labels[..., None])[..., 0]
        p_runner_up = p.scatter(-1, labels[..., None], -torch.inf).amax(-1)
        loss = (1 + p_target - p_runner_up).mean()

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, last dimension contiguous, any row stride.
        labels: (...), int64, aligned with the logits (nothing is shifted here).
        ignore_index: rows with this label count for nothing.
        reduction: "mean" over the counted tokens, "sum" or "none".
        inplace: overwrite ``logits`` with their gradient, and allocate nothing of their size. For logits
            that nothing else needs; a second backward raises. Without grad the logits stay as they are.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or (...) with zeros where ignored.
        Where no token counts, the mean is 0 and so are the gradients (torch's cross entropy gives NaN).

    Raises: as ``softmax_triplet``.
    """
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        check_logits(logits, labels)
        if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError(
                "inplace=True needs logits of their own memory, got expanded ones; clone them first"
            )
        return _InplaceIHL.apply(logits, labels, ignore_index, reduction)
    triplet, _ = softmax_triplet(logits, labels, ignore_index=ignore_index)
    loss = reduce_loss(inverted_hinge(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(logits.dtype))


def cross_entropy_loss(logits, labels, *, ignore_index=IGNORE_INDEX, reduction="mean"):
    """Cross entropy of logits, in nats: the LM loss. Arguments, result and errors as ``ihl_loss``."""
    triplet, _ = softmax_triplet(logits, labels, ignore_index=ignore_index)
    loss = reduce_loss(cross_entropy(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(logits.dtype))


def _linear_loss(token_loss, hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale):
    triplet, _ = linear_softmax_triplet(
        hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale
    )
    loss = reduce_loss(token_loss(triplet), labels != ignore_index, reduction)
    return loss.to(_loss_dtype(hidden.dtype))


def linear_ihl_loss(
    hidden,
    weight,
    labels,
    bias=None,
    *,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    softcap=None,
    logit_scale=1.0,
):
    """``ihl_loss`` of the logits of an output embedding, which are never held whole.

    ``ihl_loss(logit_scale * torch.nn.functional.linear(hidden, weight, bias), labels)``, softcapped where
    ``softcap`` is given. Arguments and errors as ``linear_softmax_triplet``, reduction and result as
    ``ihl_loss``.
    """
    return _linear_loss(
        inverted_hinge, hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
    )


def linear_cross_entropy_loss(
    hidden,
    weight,
    labels,
    bias=None,
    *,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    softcap=None,
    logit_scale=1.0,
):
    """``cross_entropy_loss`` of the logits of an output embedding, which are never held whole.

    Arguments and errors as ``linear_softmax_triplet``, reduction and result as ``ihl_loss``.
    """
    return _linear_loss(
        cross_entropy, hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
    )

"""Losses on the softmax triplet, for logits and for hidden states with their output embedding.

The loss of a token is one line of torch on its triplet (``inverted_hinge``, ``cross_entropy``). One kernel
computes it together with its gradient in the triplet, wherever nothing traces the computation. The
``linear_*`` losses are for whole models. The others are for code that already holds logits.
"""

from typing import Any

import torch
from torch import Tensor

from loku_kernels.autocast import apply_without_autocast
from loku_kernels.backends import PLAIN, choose
from loku_kernels.backends.fused_losses import (
    all_rows_stay,
    gradient_of_logits,
    inverted_hinge_loss_,
    loss_of_logits,
    tensors_of,
)
from loku_kernels.checks import (
    IGNORE_INDEX,
    Reduction,
    TokenLoss,
    check_label_tensor,
    check_linear_operands,
    check_logits,
    check_reduction,
)
from loku_kernels.linear_triplet import (
    linear_backward,
    linear_forward,
    linear_softmax_triplet,
)
from loku_kernels.log_probabilities import wide_dtype
from loku_kernels.logits_blocks import fits_one_block, logits_of
from loku_kernels.plain import gradients_with_graph, plain_linear_triplet, plain_triplet
from loku_kernels.tracing import (
    is_batched,
    refused_results,
    traced,
    traced_gradient,
    transformed,
    wants_graph,
)
from loku_kernels.triplet import (
    ihl_forward_backward_,
    scale_rows_,
    softmax_triplet,
    softmax_triplet_backward,
)


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
    check_reduction(reduction)
    loss = loss.where(counted, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


_TOKEN_LOSSES = {"inverted_hinge": inverted_hinge, "cross_entropy": cross_entropy}


class _TripletLoss(torch.autograd.Function):
    """The reduced loss of triplets (..., 3)."""

    @staticmethod
    def forward(
        ctx: Any, triplet: Tensor, labels: Tensor, loss: TokenLoss, ignore_index: int, reduction: Reduction
    ) -> Tensor:
        value, ctx.grad_triplet = choose("token_losses", labels).token_losses(
            loss, triplet, labels, ignore_index, reduction, triplet.dtype, ctx.needs_input_grad[0]
        )
        ctx.settings = (loss, ignore_index, reduction)
        ctx.save_for_backward(triplet, labels)
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if wants_graph():
            triplet, labels = ctx.saved_tensors
            loss, ignore_index, reduction = ctx.settings

            def loss_of(triplet: Tensor) -> Tensor:
                return _loss_of_triplet(loss, triplet, labels, ignore_index, reduction)

            return *gradients_with_graph(loss_of, [triplet], [True], grad_loss), None, None, None, None
        return ctx.grad_triplet * grad_loss.unsqueeze(-1), None, None, None, None


class _LogitsLoss(torch.autograd.Function):
    """The reduced loss of logits (..., V)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, settings: tuple[TokenLoss, int, Reduction]
    ) -> Tensor:
        loss, ctx.ignore_index, reduction = ctx.settings = settings
        dtype = wide_dtype(logits.dtype)
        # Nobody else has the saved numbers, so nobody overwrites them.
        value, ctx.saved = loss_of_logits(loss, logits, labels, ctx.ignore_index, reduction, dtype)
        ctx.save_for_backward(logits, labels)
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        if wants_graph():
            loss, ignore_index, reduction = ctx.settings

            def loss_of(logits: Tensor) -> Tensor:
                triplet, _ = plain_triplet(logits, labels, ignore_index)
                return _loss_of_triplet(loss, triplet, labels, ignore_index, reduction).to(grad_loss.dtype)

            return *gradients_with_graph(loss_of, [logits], [True], grad_loss), None, None
        if not traced_gradient(grad_loss):
            return gradient_of_logits(ctx.saved, logits, labels, ctx.ignore_index, grad_loss), None, None
        grad_triplet, *own = tensors_of(ctx.saved, labels)
        grad_triplet = grad_triplet * grad_loss.unsqueeze(-1)
        return softmax_triplet_backward(grad_triplet, logits, labels, ctx.ignore_index, *own), None, None


class _LinearLoss(torch.autograd.Function):
    """The reduced loss of hidden states (N, D) and an output embedding (V, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        want_direction: bool,
        settings: tuple[int, float, float],
        request: tuple[TokenLoss, Reduction, torch.dtype],
    ) -> Tensor:
        loss, reduction, dtype = ctx.request = request
        ctx.settings = ignore_index, softcap, logit_scale = settings
        if want_direction and fits_one_block(hidden, weight) and all_rows_stay(labels, ignore_index):
            block = logits_of(hidden, weight, bias, softcap, logit_scale)
            value, ctx.saved = loss_of_logits(
                loss, block, labels, ignore_index, reduction, dtype, softcap, overwrite=True
            )
            direction = torch.mm(block, weight)
        else:
            *own, direction = linear_forward(hidden, weight, bias, labels, *settings, want_direction)
            backend = choose("token_losses", labels)
            value, grad_triplet = backend.token_losses(
                loss, own[0], labels, ignore_index, reduction, dtype, True
            )
            ctx.saved = (grad_triplet, *own)
        ctx.save_for_backward(hidden, weight, bias, labels, direction)
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs, operands = ctx.needs_input_grad[:3], ctx.saved_tensors
        if wants_graph():
            (loss, reduction, dtype), labels, ignore_index = ctx.request, operands[3], ctx.settings[0]

            def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                triplet, _ = plain_linear_triplet(hidden, weight, bias, labels, *ctx.settings)
                return _loss_of_triplet(loss, triplet, labels, ignore_index, reduction).to(dtype)

            return *gradients_with_graph(loss_of, operands[:3], needs, grad_loss), *[None] * 4
        return *linear_backward(needs, operands, ctx.saved, grad_loss, *ctx.settings), *[None] * 4


class _InplaceIHL(torch.autograd.Function):
    """IHL whose forward overwrites the logits with their gradient. The backward returns that memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
        ctx.logits, ctx.grad = logits, logits.detach()
        # The forward's one write applies the mean's 1/N, except in float16. There it would round to 0 the
        # small gradients that a loss scale protects, so the backward applies it.
        late, dtype = logits.dtype == torch.float16, wide_dtype(logits.dtype)
        if not traced(logits, labels):
            torch.autograd.graph.increment_version(ctx.grad)  # a kernel writes unseen by autograd
            value, ctx.pending = inverted_hinge_loss_(ctx.grad, labels, ignore_index, reduction, dtype, late)
            return value
        share = PLAIN.mean_scale(labels, ignore_index) if reduction == "mean" else None
        one = torch.ones((), dtype=torch.float64, device=logits.device)
        ctx.pending = share if late else None
        triplet, _ = ihl_forward_backward_(
            ctx.grad, labels, ignore_index, one if late or share is None else share
        )
        return _loss_of_triplet("inverted_hinge", triplet, labels, ignore_index, reduction).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.grad is None:
            raise RuntimeError(
                "ihl_loss(inplace=True) keeps its gradient where the logits were, and it is used up: "
                "a second backward needs inplace=False"
            )
        if not torch.compiler.is_compiling() and is_batched(grad_loss):
            raise RuntimeError("ihl_loss(inplace=True) has room for one gradient: use inplace=False")
        grad, ctx.grad = ctx.grad, None
        logits, ctx.logits = ctx.logits, None
        with torch.no_grad():
            factor = grad_loss if ctx.pending is None else grad_loss * ctx.pending
            if traced_gradient(grad_loss):
                scale_rows_(grad, factor)
            else:
                choose("scale_rows_", grad).scale_rows_(grad, factor)
        if wants_graph():
            message = "ihl_loss(inplace=True) has no second derivative: use inplace=False"
            if transformed():
                raise RuntimeError(message)
            (grad,) = refused_results(message, [grad], [logits, grad_loss])
        return grad, None, None, None


def _loss_of_triplet(
    loss: TokenLoss, triplet: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction
) -> Tensor:
    """Compute the loss of triplets (..., 3) in plain torch, which a compiler fuses."""
    return reduce_loss(_TOKEN_LOSSES[loss](triplet), labels != ignore_index, reduction)


def triplet_loss(
    loss: TokenLoss,
    triplet: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute a loss of triplets, with its gradient in one kernel.

    Args:
        loss: ``"inverted_hinge"`` or ``"cross_entropy"``.
        triplet: The triplets (..., 3), float64, as ``softmax_triplet`` returns them.
        labels: The labels (...), int64, of the same tokens. Only ``ignore_index`` has a meaning here.
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted tokens (default), ``"sum"`` or ``"none"``.

    Returns:
        The loss, float64. It is a scalar, or has shape (...) with zeros at ignored rows for ``"none"``. The
        mean and its gradients are 0 if no token counts.

    Raises:
        ValueError: The loss or the reduction has another name, or shapes or dtypes do not go together.
    """
    check_reduction(reduction)
    if loss not in _TOKEN_LOSSES:
        raise ValueError(f'loss must be "inverted_hinge" or "cross_entropy", got {loss!r}')
    if triplet.dtype != torch.float64 or triplet.shape[-1:] != (3,):
        raise ValueError(
            f"triplet must be float64 of shape (..., 3), got {triplet.dtype} {tuple(triplet.shape)}"
        )
    check_label_tensor(labels, triplet, "triplet")
    if traced(triplet, labels):
        return _loss_of_triplet(loss, triplet, labels, ignore_index, reduction)
    value: Tensor = _TripletLoss.apply(triplet, labels, loss, ignore_index, reduction)
    return value


def _logits_loss(
    loss: TokenLoss, logits: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction
) -> Tensor:
    """Compute the reduced loss of logits (..., V)."""
    check_reduction(reduction)
    if traced(logits, labels):
        triplet, _ = softmax_triplet(logits, labels, ignore_index=ignore_index)
        value = _loss_of_triplet(loss, triplet, labels, ignore_index, reduction)
        return value.to(wide_dtype(logits.dtype))
    check_logits(logits, labels)
    thin_value: Tensor = _LogitsLoss.apply(logits, labels, (loss, ignore_index, reduction))
    return thin_value


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
    if inplace and torch.is_grad_enabled() and logits.requires_grad and not transformed():
        check_reduction(reduction)
        check_logits(logits, labels)
        if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError(
                "inplace=True needs logits of their own memory, got expanded ones; clone them first"
            )
        inplace_loss: Tensor = _InplaceIHL.apply(logits, labels, ignore_index, reduction)
        return inplace_loss
    return _logits_loss("inverted_hinge", logits, labels, ignore_index, reduction)


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
    return _logits_loss("cross_entropy", logits, labels, ignore_index, reduction)


def _linear_loss(
    loss: TokenLoss,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Compute the reduced loss of hidden states (..., D)."""
    check_reduction(reduction)
    if traced(hidden, weight, bias, labels):
        triplet, _ = linear_softmax_triplet(
            hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale
        )
        value = _loss_of_triplet(loss, triplet, labels, ignore_index, reduction)
        return value.to(wide_dtype(hidden.dtype))
    check_linear_operands(hidden, weight, labels, bias, softcap)
    rows = hidden if hidden.dim() == 2 else hidden.reshape(labels.numel(), hidden.shape[-1])
    rows_labels = labels if labels.dim() == 1 else labels.reshape(-1)
    want_direction = torch.is_grad_enabled() and hidden.requires_grad
    settings = (ignore_index, float(softcap or 0.0), float(logit_scale))
    request = (loss, reduction, wide_dtype(hidden.dtype))
    thin_value: Tensor = apply_without_autocast(
        _LinearLoss.apply, (rows, weight, bias), rows_labels, want_direction, settings, request
    )
    return thin_value.view(labels.shape) if reduction == "none" else thin_value


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
        "inverted_hinge", hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
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
        "cross_entropy", hidden, weight, labels, bias, ignore_index, reduction, softcap, logit_scale
    )

"""KL divergence from a reference model's predictions, from hidden states and the output embedding.

The other losses depend on three numbers a token. This one needs both distributions whole. With the
reference's q and the model's p,

    KL(q || p) = sum over v of q_v (log q_v - log p_v),      d KL / d y_v = p_v - q_v

The reference may first have its logit of each row's label lowered (UNDIAL). That happens in the block of its
logits, before q is computed. The q of lowered logits also follows from the q of the others, by a division by
1 - q_t (1 - exp(-lowering)). For a memorised label t that cancels.

The forward works on blocks of whole rows. Two products make the logits of both models. They become p - q in
place. A third product makes the gradient of the hidden states.

The operators take plain tensors, because ``torch.library`` has no operands of other types: the ``hidden``,
``weight`` and ``bias`` of the model, then those of the reference.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.autocast import apply_without_autocast, register_autocast
from loku_kernels.backends import PLAIN, choose
from loku_kernels.checks import IGNORE_INDEX, Reduction, check_label_values, check_linear_operands
from loku_kernels.log_probabilities import divergence_gradient_, wide_dtype, wide_logits
from loku_kernels.logits_blocks import LogitsBlocks, Slices, block_slices, weight_gradient, whole_row_slices
from loku_kernels.losses import reduce_loss
from loku_kernels.plain import gradients_with_graph, plain_divergence
from loku_kernels.tracing import transformed, wants_graph

# hidden (N, D), weight (V, D), and bias (V,) or None, of one model
Head = tuple[Tensor, Tensor, Tensor | None]


def _entry_bytes(hidden: Tensor) -> int:
    """Count the bytes that the forward holds for each entry of a block.

    They are the logits of both models in the dtype of ``hidden``. Plain torch holds three more in the wide
    dtype, of which two are the logits themselves if that is their dtype.
    """
    itemsize, wide = hidden.dtype.itemsize, wide_dtype(hidden.dtype).itemsize
    if choose("divergence_", hidden) is not PLAIN:
        return 2 * itemsize
    return 3 * wide + (2 * itemsize if itemsize < wide else 0)


class _LoweredBlocks(LogitsBlocks):
    """Computes blocks of logits in which the label's logit of each row is lowered.

    Args:
        operands: The arguments of ``LogitsBlocks``.
        labels: The labels (N,), int64, in [0, V).
        lowering: The number that is subtracted from the labels' logits.
    """

    def __init__(self, *operands: Any, labels: Tensor, lowering: float) -> None:
        super().__init__(*operands)
        self.labels = labels
        # An entry of a block is logit / softcap, so it may leave the range of tanh.
        self.lowering = lowering / self.softcap if self.softcap else lowering

    def compute(self, rows: slice, columns: slice) -> Tensor:
        """See ``LogitsBlocks.compute``."""
        block = super().compute(rows, columns)
        column = self.labels[rows, None] - columns.start
        inside = (column >= 0) & (column < block.shape[1])
        column = column.where(inside, 0)
        entries = block.gather(1, column)
        return block.scatter_(1, column, (entries - self.lowering).where(inside, entries))


def _both_logits(
    model: Head,
    reference: Head,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lowering: float,
    cut: Callable[[int, int, int, str], Slices],
) -> tuple[Tensor, LogitsBlocks, LogitsBlocks]:
    """Prepare the blocks of the logits of both models, for the counted rows.

    Args:
        model: The operands of the model.
        reference: The operands of the reference, with as many rows and words.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count.
        softcap: The softcap of both models' logits. 0 means none.
        logit_scale: The factor of both models' logits, applied before the softcap.
        lowering: The number that is subtracted from the reference's logits of the labels. 0 means none.
        cut: ``whole_row_slices`` or ``block_slices``.

    Returns:
        The indices of the counted rows, the blocks of the model and those of the reference.

    Raises:
        IndexError: A label whose logit is to be lowered is not in [0, V).
    """
    index = (labels != ignore_index).nonzero()[:, 0]
    hidden, weight, bias = model
    parts = cut(len(index), len(weight), _entry_bytes(hidden), hidden.device.type)
    current = LogitsBlocks(hidden[index], weight, bias, softcap, logit_scale, parts)
    hidden, weight, bias = reference
    operands = hidden[index], weight, bias, softcap, logit_scale, parts
    if not lowering:
        return index, current, LogitsBlocks(*operands)
    check_label_values(labels, len(weight), ignore_index)
    return index, current, _LoweredBlocks(*operands, labels=labels[index], lowering=lowering)


@custom_op("loku_kernels::linear_kl_divergence", mutates_args=())
def _linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lowering: float,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the divergence of each row.

    Args:
        hidden: The model's hidden states (N, D).
        weight: The model's output embedding (V, D).
        bias: The model's bias (V,), or None.
        reference_hidden: The reference's hidden states (N, D').
        reference_weight: The reference's output embedding (V, D').
        reference_bias: The reference's bias (V,), or None.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count.
        softcap: The softcap of both models' logits. 0 means none.
        logit_scale: The factor of both models' logits, applied before the softcap.
        lowering: The number that is subtracted from the reference's logits of the labels. 0 means none.
        want_direction: If false, the third result is empty.

    Returns:
        The divergences (N,), the normalizers (2, N, 2) of both models' logits, and d KL / d hidden (N, D).
    """
    dtype = wide_dtype(hidden.dtype)
    divergence = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    normalizers = torch.zeros(2, len(hidden), 2, dtype=dtype, device=hidden.device)
    direction = hidden.new_zeros((len(hidden) if want_direction else 0, hidden.shape[1]))
    index, current, original = _both_logits(
        (hidden, weight, bias),
        (reference_hidden, reference_weight, reference_bias),
        labels,
        ignore_index,
        softcap,
        logit_scale,
        lowering,
        whole_row_slices,
    )
    for rows in current.rows:
        chosen = index[rows]
        blocks = current.compute(rows, current.columns[0]), original.compute(rows, current.columns[0])
        divergence[chosen], normalizers[:, chosen] = choose("divergence_", *blocks).divergence_(
            *blocks, softcap=softcap, store=want_direction
        )
        if want_direction:
            direction[chosen] = torch.mm(blocks[0], weight).mul_(logit_scale)
    return divergence, normalizers, direction


@_linear_kl_divergence.register_fake
def _(hidden: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype, want_direction = len(hidden), wide_dtype(hidden.dtype), operands[-1]
    direction = hidden.new_empty((count if want_direction else 0, hidden.shape[1]))
    return hidden.new_empty(count, dtype=dtype), hidden.new_empty((2, count, 2), dtype=dtype), direction


@custom_op("loku_kernels::linear_kl_divergence_backward_weight", mutates_args=())
def _kl_backward_weight(
    grad_divergence: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    labels: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lowering: float,
) -> tuple[Tensor, Tensor]:
    """Compute d weight (V, D) and d bias (V,). Each block of both models' logits is computed again.

    Args:
        grad_divergence: The gradients (N,) of the divergences.
        hidden: The model's hidden states (N, D).
        weight: The model's output embedding (V, D).
        bias: The model's bias (V,), or None.
        reference_hidden: The reference's hidden states (N, D').
        reference_weight: The reference's output embedding (V, D').
        reference_bias: The reference's bias (V,), or None.
        labels: The labels (N,), int64.
        normalizers: The normalizers (2, N, 2) that ``_linear_kl_divergence`` returned.
        ignore_index: The label of rows that do not count.
        softcap: The softcap of both models' logits. 0 means none.
        logit_scale: The factor of both models' logits, applied before the softcap.
        lowering: The number that is subtracted from the reference's logits of the labels. 0 means none.
    """
    index, current, original = _both_logits(
        (hidden, weight, bias),
        (reference_hidden, reference_weight, reference_bias),
        labels,
        ignore_index,
        softcap,
        logit_scale,
        lowering,
        block_slices,
    )
    normalizer, reference_normalizer = normalizers[:, index]
    scale = grad_divergence[index, None] * logit_scale

    def gradient(rows: slice, columns: slice) -> Tensor:
        block = current.compute(rows, columns)
        log_p = wide_logits(block, softcap)
        log_q = wide_logits(original.compute(rows, columns), softcap)
        for logits, numbers in ((log_p, normalizer[rows]), (log_q, reference_normalizer[rows])):
            logits.sub_(numbers[:, :1]).sub_(numbers[:, 1:])
        q = log_q.exp_()
        grad = divergence_gradient_(log_p, q, normalizer[rows], softcap).mul_(scale[rows])
        return block.copy_(grad)

    return weight_gradient(current, gradient)


@_kl_backward_weight.register_fake
def _(grad_divergence: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def _save_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ignore_index, softcap, logit_scale, lowering, _ = inputs
    ctx.settings = ignore_index, softcap, logit_scale, lowering
    _, normalizers, direction = output
    ctx.save_for_backward(*operands, normalizers, direction)
    ctx.mark_non_differentiable(normalizers, direction)


def _kl_backward(ctx: Any, grad_divergence: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *operands, normalizers, direction = ctx.saved_tensors
    if wants_graph():
        reference_hidden, reference_weight, reference_bias, labels = operands[3:]

        def divergence_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return plain_divergence(
                hidden,
                weight,
                bias,
                reference_hidden,
                reference_weight,
                reference_bias,
                labels,
                *ctx.settings,
            )

        needs = ctx.needs_input_grad[:3]
        return *gradients_with_graph(divergence_of, operands[:3], needs, grad_divergence), *[None] * 9
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = (direction * grad_divergence[:, None]).to(direction.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _kl_backward_weight(grad_divergence, *operands, normalizers, *ctx.settings)
        grad_weight = grad_weight if ctx.needs_input_grad[1] else None
        grad_bias = grad_bias if ctx.needs_input_grad[2] else None
    return grad_hidden, grad_weight, grad_bias, *[None] * 9


_linear_kl_divergence.register_autograd(_kl_backward, setup_context=_save_kl)
register_autocast("linear_kl_divergence", _linear_kl_divergence, operands=6)


def linear_kl_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lowering: float = 0.0,
) -> Tensor:
    """Compute KL(reference || model), in nats, from hidden states, block by block.

    The loss equals, in plain torch, for rows (N, D)::

        def logits_of(hidden, weight, bias):
            logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        log_p = logits_of(hidden, weight, bias).log_softmax(-1)
        original = logits_of(reference_hidden, reference_weight, reference_bias)
        if lowering:
            original = original - lowering * torch.nn.functional.one_hot(labels, len(weight))
        log_q = original.log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()

    with one exception: a word that both models mask (a bias of -inf) adds 0 instead of NaN. The loss is
    differentiable in ``hidden``, ``weight`` and ``bias``. The reference gets no gradient.

    The logits of both models exist for a few rows at a time. With all temporary tensors of their shape they
    take at most 16 MiB on the CPU and 256 MiB on CUDA, or one row. Forward and backward together cost three
    matrix products if ``weight`` is frozen. Each product has a few rows, so it is slower than one of all
    rows. The backward computes both models' logits again if ``weight`` or ``bias`` trains. Under autocast the
    operands are cast as ``linear`` casts them.

    Args:
        hidden: The model's hidden states (..., D), float32, bfloat16, float16 or float64.
        weight: The model's output embedding (V, D), in the dtype of ``hidden``.
        reference_hidden: The reference's hidden states (..., D'), the inputs of its output embedding. They
            have as many rows as ``hidden``.
        labels: The labels (...), int64, or None (default). A row counts if its label is not ``ignore_index``.
            All rows count without labels. Other values matter with ``lowering`` alone.
        bias: The model's bias (V,), in the dtype of ``hidden``, or None (default).
        reference_weight: The reference's output embedding (V, D'). Default: ``weight`` and ``bias`` serve
            both models.
        reference_bias: The reference's bias (V,), or None (default). It is used with ``reference_weight``.
        ignore_index: The label of rows that do not count. Default -100.
        reduction: ``"mean"`` over the counted rows (default), ``"sum"`` or ``"none"``.
        softcap: The softcap of both models' logits (as in Gemma), or None (default).
        logit_scale: The factor of both models' logits (as in Cohere's), applied before the softcap. Default
            1.0.
        lowering: The number, in nats, by which the reference's logit of each row's label is lowered, after
            the softcap. The loss is then UNDIAL's cross entropy (Dong et al., 2025) less the entropy of the
            lowered reference, which has no gradient. It needs ``labels``. 0 (default) lowers nothing. The
            lowered logit is rounded to the dtype of ``reference_hidden``.

    Returns:
        The loss, float32, or float64 for float64 operands. It is a scalar, or has shape (...) with zeros at
        ignored rows for ``"none"``. The mean and its gradients are 0 if no row counts.

    Raises:
        ValueError: V < 2, or shapes, dtypes or devices do not go together, or the softcap is not positive and
            finite, or ``lowering`` is negative, not finite or without ``labels``.
        IndexError: There is a ``lowering``, and a label is neither in [0, V) nor ``ignore_index``. On CUDA a
            device-side assert fails.
    """
    if not 0 <= lowering < math.inf:
        raise ValueError(f"lowering must be finite and not negative, got {lowering}")
    if lowering and labels is None:
        raise ValueError("lowering lowers the logits of labels: pass labels")
    if reference_weight is None:
        reference_weight, reference_bias = weight, bias
    if labels is None:
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    check_linear_operands(hidden, weight, labels, bias, softcap)
    if reference_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"reference_hidden must have the rows of hidden, {tuple(hidden.shape[:-1])}, got "
            f"{tuple(reference_hidden.shape[:-1])}"
        )
    try:
        check_linear_operands(reference_hidden, reference_weight, labels, reference_bias, softcap)
    except ValueError as error:
        raise ValueError(f"of the reference model: {error}") from None
    if (reference_hidden.dtype is torch.float64) is not (hidden.dtype is torch.float64):
        raise ValueError(
            "hidden and reference_hidden must both be float64 or both be narrower, got "
            f"{hidden.dtype} and {reference_hidden.dtype}; convert one model's operands"
        )
    if len(reference_weight) != len(weight):
        raise ValueError(
            f"reference_weight must have as many rows as weight, {len(weight)}, got {len(reference_weight)}"
        )
    counted = labels != ignore_index
    operands = (
        hidden.reshape(labels.numel(), hidden.shape[-1]),
        weight,
        bias,
        reference_hidden.detach().reshape(labels.numel(), reference_hidden.shape[-1]),
        reference_weight.detach(),
        None if reference_bias is None else reference_bias.detach(),
    )
    settings = labels.reshape(-1), ignore_index, float(softcap or 0.0), float(logit_scale), float(lowering)
    if transformed():
        divergence = apply_without_autocast(plain_divergence, operands, *settings)
    else:
        want_direction = torch.is_grad_enabled() and hidden.requires_grad
        divergence, *_ = _linear_kl_divergence(*operands, *settings, want_direction)
    return reduce_loss(divergence.view(counted.shape), counted, reduction)

"""KL divergence from a reference model's predictions, from hidden states and the output embedding.

Unlike the other losses, which depend on three numbers a token, it needs both distributions whole. With q of
the reference and p of the model,

    KL(q || p) = sum over v of q_v (log q_v - log p_v),      d KL / d y_v = p_v - q_v

so it works on blocks of whole rows: two products make both logits, which become p - q in place, and a third
one makes the gradient of the hidden states.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.checks import IGNORE_INDEX, check_linear_operands
from loku_kernels.logits_blocks import LogitsBlocks, block_slices, weight_gradient, whole_row_slices
from loku_kernels.losses import reduce_loss
from loku_kernels.triplet import register_autocast


def _wide_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _entry_bytes(hidden):
    """Bytes that are held for each entry of a block: both logits and one more, wide, and narrow copies."""
    wide = _wide_dtype(hidden.dtype).itemsize
    return 3 * wide + (2 * hidden.dtype.itemsize if hidden.dtype.itemsize < wide else 0)


def _both_logits(current, original, counted, softcap, logit_scale, slices):
    """Indices of the counted rows, and the blocks of their logits in both models.

    current, original: (hidden, weight, bias). slices: ``whole_row_slices`` or ``block_slices``.
    """
    index = counted.nonzero()[:, 0]
    hidden, weight, _ = current
    parts = slices(len(index), len(weight), _entry_bytes(hidden), hidden.device.type)
    return index, *(
        LogitsBlocks(hidden[index], weight, bias, softcap, logit_scale, parts)
        for hidden, weight, bias in (current, original)
    )


def _wide_logits(block, softcap):
    """What ``LogitsBlocks.compute`` gave, as logits in float32 or wider: in the same memory if it is wide."""
    logits = block.to(_wide_dtype(block.dtype))
    return logits.mul_(softcap) if softcap else logits


def _normalize_(logits, spare):
    """Logits (n, V) become log-probabilities; returns what was subtracted, in turn: (n, 2).

    First the maximum, so that the log-probability of a word that is nearly sure keeps its digits.
    """
    largest = logits.amax(1, keepdim=True)
    log_sum = torch.exp(logits.sub_(largest), out=spare).sum(1, keepdim=True).log_()
    logits.sub_(log_sum)
    return torch.cat([largest, log_sum], 1)


def _logits_gradient_(log_p, q, normalizer, softcap, spare=None):
    """p - q, times the softcap's slope 1 - (y / softcap)^2, y the logits; overwrites log p."""
    if not softcap:
        return log_p.exp_().sub_(q)
    slope = torch.add(log_p, normalizer.sum(1, keepdim=True), out=spare)
    slope.div_(softcap).square_().neg_().add_(1)
    return log_p.exp_().sub_(q).mul_(slope)


@custom_op("loku_kernels::linear_kl_divergence", mutates_args=())
def _linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    counted: Tensor,
    softcap: float,
    logit_scale: float,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (N,), what normalises both rows of logits (2, N, 2), and d KL / d hidden of each row (N, D)."""
    dtype = _wide_dtype(hidden.dtype)
    divergence = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    normalizers = torch.zeros(2, len(hidden), 2, dtype=dtype, device=hidden.device)
    direction = hidden.new_zeros((len(hidden) if want_direction else 0, hidden.shape[1]))
    index, current, original = _both_logits(
        (hidden, weight, bias),
        (reference_hidden, reference_weight, reference_bias),
        counted,
        softcap,
        logit_scale,
        whole_row_slices,
    )
    columns = slice(0, len(weight))
    memory = torch.empty(len(current.memory), dtype=dtype, device=hidden.device)
    for rows in current.rows:
        chosen = index[rows]
        block = current.compute(rows, columns)
        spare = memory[: block.numel()].view(block.shape)
        log_p = _wide_logits(block, softcap)
        log_q = _wide_logits(original.compute(rows, columns), softcap).to(dtype)
        normalizers[0, chosen] = normalizer = _normalize_(log_p, spare)
        normalizers[1, chosen] = _normalize_(log_q, spare)
        q = torch.exp(log_q, out=spare)
        terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0)  # a masked word is -inf in both
        divergence[chosen] = terms.sum(1)
        if want_direction:
            gradient = _logits_gradient_(log_p, q, normalizer, softcap, spare=terms)
            gradient = current.terms_of(block).copy_(gradient)
            direction[chosen] = torch.mm(gradient, weight).mul_(logit_scale)
    return divergence, normalizers, direction


@_linear_kl_divergence.register_fake
def _(hidden, weight, bias, reference_hidden, reference_weight, reference_bias, counted, *rest):
    count, dtype = len(hidden), _wide_dtype(hidden.dtype)
    direction = hidden.new_empty((count if rest[-1] else 0, hidden.shape[1]))
    return hidden.new_empty(count, dtype=dtype), hidden.new_empty((2, count, 2), dtype=dtype), direction


@custom_op("loku_kernels::linear_kl_divergence_backward_weight", mutates_args=())
def _backward_weight(
    grad_divergence: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    counted: Tensor,
    normalizers: Tensor,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """d weight (V, D) and d bias (V,): each block of both logits is computed again."""
    index, current, original = _both_logits(
        (hidden, weight, bias),
        (reference_hidden, reference_weight, reference_bias),
        counted,
        softcap,
        logit_scale,
        block_slices,
    )
    normalizer, reference_normalizer = normalizers[:, index]
    scale = grad_divergence[index, None] * logit_scale

    def gradient(rows, columns):
        block = current.compute(rows, columns)
        log_p = _wide_logits(block, softcap)
        log_q = _wide_logits(original.compute(rows, columns), softcap).to(log_p.dtype)
        for logits, numbers in ((log_p, normalizer[rows]), (log_q, reference_normalizer[rows])):
            logits.sub_(numbers[:, :1]).sub_(numbers[:, 1:])
        q = log_q.exp_()
        grad = _logits_gradient_(log_p, q, normalizer[rows], softcap).mul_(scale[rows])
        return current.terms_of(block).copy_(grad)

    return weight_gradient(current, gradient)


@_backward_weight.register_fake
def _(grad_divergence, hidden, weight, *rest):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    *operands, ctx.softcap, ctx.logit_scale, _ = inputs
    _, normalizers, direction = output
    ctx.save_for_backward(*operands, normalizers, direction)
    ctx.mark_non_differentiable(normalizers, direction)


def _backward(ctx, grad_divergence, *_):
    *operands, normalizers, direction = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = (direction * grad_divergence[:, None]).to(direction.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _backward_weight(
            grad_divergence, *operands, normalizers, ctx.softcap, ctx.logit_scale
        )
        grad_weight = grad_weight if ctx.needs_input_grad[1] else None
        grad_bias = grad_bias if ctx.needs_input_grad[2] else None
    return grad_hidden, grad_weight, grad_bias, *[None] * 7


_linear_kl_divergence.register_autograd(_backward, setup_context=_save)
register_autocast("linear_kl_divergence", _linear_kl_divergence, operands=6)


def linear_kl_divergence_loss(
    hidden,
    weight,
    reference_hidden,
    labels=None,
    bias=None,
    *,
    reference_weight=None,
    reference_bias=None,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    softcap=None,
    logit_scale=1.0,
):
    """KL(reference || model), in nats, of the logits of output embeddings, which are never held whole.

    The same as, in plain torch, for rows (N, D)::

        def log_probabilities(hidden, weight, bias):
            logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            return logits.log_softmax(-1)

        log_p = log_probabilities(hidden, weight, bias)
        log_q = log_probabilities(reference_hidden, reference_weight, reference_bias)
        loss = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()

    except that a word which both mask (a bias of -inf) adds 0 instead of NaN. Differentiable in ``hidden``,
    ``weight`` and ``bias``; the reference gets no gradient. Both logits exist for a few rows at a time (with
    what is made of them, at most 16 MiB, on CUDA 256, or one row). With a frozen ``weight`` forward and
    backward together cost three matrix products, of those few rows each, which is slower than whole ones;
    where ``weight`` or ``bias`` trains, the backward computes both logits again. Under autocast the operands
    are cast as ``linear`` casts them.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), same dtype. bias: (V,), same dtype, or None.
        reference_hidden: (..., D'), as many rows as ``hidden``; what the reference model puts into its output
            embedding.
        reference_weight: (V, D'), reference_bias: (V,) or None, the reference's output embedding, if it is
            another one; otherwise ``weight`` and ``bias`` serve both.
        labels: (...), int64, or None. They only say which rows count: those that are not ``ignore_index``.
        reduction: "mean" over the counted rows, "sum" or "none".
        softcap, logit_scale: what both models do to their logits (Gemma, Cohere).

    Returns:
        The loss, float32 (float64 for float64 operands): a scalar, or (...) with zeros where ignored. Where
        no row counts, the mean is 0 and so are the gradients.

    Raises:
        ValueError: V < 2, or shapes, dtypes or devices that do not go together.
    """
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
    if len(reference_weight) != len(weight):
        raise ValueError(
            f"reference_weight must have as many rows as weight, {len(weight)}, got {len(reference_weight)}"
        )
    counted = labels != ignore_index
    divergence, *_ = _linear_kl_divergence(
        hidden.reshape(labels.numel(), hidden.shape[-1]),
        weight,
        bias,
        reference_hidden.detach().reshape(labels.numel(), reference_hidden.shape[-1]),
        reference_weight.detach(),
        None if reference_bias is None else reference_bias.detach(),
        counted.reshape(-1),
        float(softcap or 0.0),
        float(logit_scale),
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    return reduce_loss(divergence.view(counted.shape), counted, reduction)

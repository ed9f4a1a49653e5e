"""The softmax triplet of logits and of hidden states: operators, gradients and public functions.

    softmax_triplet(logits, labels)                      -> triplet, runner_up_id
    linear_softmax_triplet(hidden, weight, labels, bias) -> the same, and the (N, V) logits never exist

The public functions check their arguments; the operators behind them do not check again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.backends import choose
from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import IGNORE_INDEX, check_label_values, check_linear_operands, check_logits
from loku_kernels.logits_blocks import LogitsBlocks, add_product, weight_gradient


def _fake_triplets(labels):
    return labels.new_empty((*labels.shape, 3), dtype=torch.float64), torch.empty_like(
        labels, memory_format=torch.contiguous_format
    )


# --- logits ---------------------------------------------------------------------------------------


@custom_op("loku_kernels::softmax_triplet", mutates_args=())
def _softmax_triplet(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return choose("triplet_forward", logits).triplet_forward(logits, labels, ignore_index)


@_softmax_triplet.register_fake
def _(logits, labels, ignore_index):
    return _fake_triplets(labels)


@custom_op("loku_kernels::softmax_triplet_backward", mutates_args=())
def _softmax_triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
) -> Tensor:
    backend = choose("triplet_backward", logits)
    return backend.triplet_backward(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id)


@_softmax_triplet_backward.register_fake
def _(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx, inputs, output):
    logits, labels, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, labels, *output)
    ctx.mark_non_differentiable(output[1])


def _logits_backward(ctx, grad_triplet, _):
    logits, labels, triplet, runner_up_id = ctx.saved_tensors
    grad = _softmax_triplet_backward(grad_triplet, logits, labels, ctx.ignore_index, triplet, runner_up_id)
    return grad, None, None


_softmax_triplet.register_autograd(_logits_backward, setup_context=_save_logits)


def softmax_triplet(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """The three numbers on which the unlearning losses of a token depend, and the runner-up's index.

    The same as, in plain torch, for logits (N, V)::

        target = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        runner_up, runner_up_id = others.max(1)
        rest = others.scatter(1, runner_up_id[:, None], -torch.inf).logsumexp(1)
        triplet = torch.stack([target[:, 0], runner_up, rest], 1).double()

    ``triplet.softmax(-1)`` holds the probabilities of the target, of the runner-up and of all the rest
    together. Differentiable in ``logits``; a row whose rest is -inf gets no gradient through it.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, last dimension contiguous. -inf masks a word.
        labels: (...), int64, aligned with the logits (nothing is shifted here).
        ignore_index: rows with this label get zeros in ``triplet``, -1 in ``runner_up_id``, no gradient.

    Returns:
        triplet (..., 3), float64: logits of target and runner-up, log-sum-exp of the rest.
        runner_up_id (...), int64: on ties the lowest index. Not differentiable.

    Raises:
        ValueError: V < 2, or shapes, dtypes or devices that do not go together.
        IndexError: on the CPU, a label outside [0, V) that is not ``ignore_index``; on CUDA an assert.
    """
    check_logits(logits, labels)
    return _softmax_triplet(logits, labels, ignore_index)


# --- logits, forward and backward at once, in place -----------------------------------------------


@custom_op("loku_kernels::ihl_forward_backward_", mutates_args=("logits",))
def ihl_forward_backward_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with ``scale``, float64 (), times the gradient of the sum of the rows' IHL."""
    return choose("inverted_hinge_", logits).inverted_hinge_(logits, labels, ignore_index, scale)


@ihl_forward_backward_.register_fake
def _(logits, labels, ignore_index, scale):
    return _fake_triplets(labels)


# --- hidden states and the output embedding -------------------------------------------------------
#
# y = softcap * tanh(logit_scale * (h W^T + b) / softcap), one block of rows and columns at a time.


def _slope(logit, softcap, logit_scale):
    """dy/dz at the logit y, for z = h W^T + b."""
    return logit_scale * (1 - (logit / softcap) ** 2) if softcap else torch.full_like(logit, logit_scale)


@custom_op("loku_kernels::linear_softmax_triplet", mutates_args=())
def _linear_softmax_triplet(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """triplet, runner_up_id, and O = sum over v not in {t, r} of exp(y_v - rest) dy_v/dz_v W[v].

    O (N, D) is all that the gradient of ``hidden`` needs beside two rows of W, for any loss.
    """
    check_label_values(labels, weight.shape[0], ignore_index)
    triplet = torch.zeros(labels.numel(), 3, dtype=torch.float64, device=hidden.device)
    runner_up_id = torch.full_like(labels, -1)
    direction = hidden.new_zeros((len(hidden) if want_direction else 0, hidden.shape[1]))
    index = (labels != ignore_index).nonzero()[:, 0]
    logits = LogitsBlocks(hidden[index], weight, bias, softcap, logit_scale)
    for rows in logits.rows:
        chosen = index[rows]
        targets = labels[chosen]
        state = OnlineState.start(targets)
        if want_direction:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            total = torch.zeros(len(chosen), hidden.shape[1], dtype=dtype, device=hidden.device)
        for columns in logits.columns:
            block = logits.compute(rows, columns)
            terms = logits.terms_of(block) if want_direction else None
            choose("triplet_columns_", block).triplet_columns_(
                block, targets, state, first_column=columns.start, softcap=softcap, out=terms
            )
            if want_direction:
                if columns.start:
                    total *= state.rescale[:, None]
                    _add_demoted(total, weight, state)
                add_product(total, terms, weight[columns])
        triplet[chosen], runner_up_id[chosen] = state.triplet(), state.runner_up_id
        if want_direction:
            rest_sum = state.numbers[:, 3:]
            share = torch.where(rest_sum == 0, 0.0, logit_scale / rest_sum)
            direction[chosen] = total.mul_(share).to(hidden.dtype)
    return triplet, runner_up_id, direction


def _add_demoted(total, weight, state):
    """The rows of ``weight`` at runner-ups of earlier blocks that have joined the rest."""
    rows = weight.index_select(0, state.demoted_id.clamp(0)).to(total.dtype)
    total.addcmul_(rows, state.demoted_share[:, None].to(total.dtype))  # a share of 0 where there is none


@_linear_softmax_triplet.register_fake
def _(hidden, weight, bias, labels, ignore_index, softcap, logit_scale, want_direction):
    direction = hidden.new_empty((labels.shape[0] if want_direction else 0, hidden.shape[1]))
    return *_fake_triplets(labels), direction


@custom_op("loku_kernels::linear_softmax_triplet_backward", mutates_args=())
def _linear_backward_hidden(
    grad_triplet: Tensor,
    weight: Tensor,
    labels: Tensor,
    triplet: Tensor,
    runner_up_id: Tensor,
    direction: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """d hidden = g_t y'_t W[t] + g_r y'_r W[r] + g_rest O: elementwise, no logits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    own = grad_triplet[:, :2] * _slope(triplet[:, :2], softcap, logit_scale)
    # A rest of -inf (V = 2, or all other words masked) has no gradient, whatever the loss says.
    rest = grad_triplet[:, 2:].where(triplet[:, 2:] != -torch.inf, 0.0)
    grad = torch.cat([own, rest], 1)
    grad = grad.where(runner_up_id[:, None] >= 0, 0.0).to(dtype)  # an ignored row has no runner-up
    grad_hidden = direction * grad[:, 2:]
    for column, index in enumerate((labels, runner_up_id)):
        grad_hidden.addcmul_(weight.index_select(0, index.clamp(0)).to(dtype), grad[:, column, None])
    return grad_hidden.to(weight.dtype)


@_linear_backward_hidden.register_fake
def _(grad_triplet, weight, labels, triplet, runner_up_id, direction, softcap, logit_scale):
    return torch.empty_like(direction)


@custom_op("loku_kernels::linear_softmax_triplet_backward_weight", mutates_args=())
def _linear_backward_weight(
    grad_triplet: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """d weight (V, D) and d bias (V,): each block of logits is computed again, and becomes its gradient."""
    index = (labels != ignore_index).nonzero()[:, 0]
    labels, triplet, runner_up_id = labels[index], triplet[index], runner_up_id[index]
    grad = grad_triplet[index] * logit_scale
    logits = LogitsBlocks(hidden[index], weight, bias, softcap, logit_scale)

    def gradient(rows, columns):
        block = logits.compute(rows, columns)
        terms = logits.terms_of(block)
        choose("triplet_backward", block).triplet_backward(
            grad[rows],
            block,
            labels[rows],
            ignore_index,
            triplet[rows],
            runner_up_id[rows],
            first_column=columns.start,
            softcap=softcap,
            out=terms,
        )
        return terms

    return weight_gradient(logits, gradient)


@_linear_backward_weight.register_fake
def _(grad_triplet, hidden, weight, bias, labels, ignore_index, triplet, runner_up_id, softcap, logit_scale):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def _save_linear(ctx, inputs, output):
    hidden, weight, bias, labels, ctx.ignore_index, ctx.softcap, ctx.logit_scale, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_backward(ctx, grad_triplet, *_):
    hidden, weight, bias, labels, triplet, runner_up_id, direction = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = _linear_backward_hidden(
            grad_triplet, weight, labels, triplet, runner_up_id, direction, ctx.softcap, ctx.logit_scale
        )
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _linear_backward_weight(
            grad_triplet,
            hidden,
            weight,
            bias,
            labels,
            ctx.ignore_index,
            triplet,
            runner_up_id,
            ctx.softcap,
            ctx.logit_scale,
        )
        grad_weight = grad_weight if ctx.needs_input_grad[1] else None
        grad_bias = grad_bias if ctx.needs_input_grad[2] else None
    return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


_linear_softmax_triplet.register_autograd(_linear_backward, setup_context=_save_linear)


_library = torch.library.Library("loku_kernels", "FRAGMENT")


def register_autocast(name: str, operator: Callable[..., Any], operands: int) -> None:
    """Under autocast cast the first ``operands`` arguments as torch.nn.functional.linear has them cast."""

    def register(device_type, key):
        def cast(*args):
            dtype = torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                low = (None if x is None else x.to(dtype) for x in args[:operands])
                return operator(*low, *args[operands:])

        _library.impl(name, cast, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


register_autocast("linear_softmax_triplet", _linear_softmax_triplet, operands=3)


def linear_softmax_triplet(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``softmax_triplet`` of the logits of an output embedding, which are never held whole.

    The same as, in plain torch::

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        triplet, runner_up_id = softmax_triplet(logits, labels)

    The logits exist for one block of rows and columns at a time (at most 16 MiB, on CUDA 256; there logits of
    16-bit operands are float32, and what multiplies W takes half as much again). With a frozen ``weight``
    forward and backward together cost two matrix products of that size; where ``weight`` or ``bias``
    trains, the backward computes each block again. Under autocast the operands are cast as ``linear``
    casts them.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), same dtype. bias: (V,), same dtype, or None.
        labels: (...), int64, aligned with ``hidden``.
        ignore_index: rows with this label are dropped before any product; they get zeros, -1, no gradient.
        softcap, logit_scale: what the model does to its logits (Gemma, Cohere).

    Returns, Raises: as ``softmax_triplet``.
    """
    check_linear_operands(hidden, weight, labels, bias, softcap)
    want_direction = torch.is_grad_enabled() and hidden.requires_grad
    triplet, runner_up_id, _ = _linear_softmax_triplet(
        hidden.reshape(labels.numel(), hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        ignore_index,
        float(softcap or 0.0),
        float(logit_scale),
        want_direction,
    )
    return triplet.view(*labels.shape, 3), runner_up_id.view(labels.shape)

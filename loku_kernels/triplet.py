"""The softmax triplet of logits and of hidden states: operators, gradients and public functions.

    softmax_triplet(logits, labels)                      -> triplet, runner_up_id
    linear_softmax_triplet(hidden, weight, labels, bias) -> triplet, runner_up_id

The second one never holds the logits (N, V) whole. The public functions check their arguments. The operators
behind them do not check again.
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


def _fake_triplets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make a triplet and runner_up_id of the right shapes for torch.compile."""
    return labels.new_empty((*labels.shape, 3), dtype=torch.float64), torch.empty_like(
        labels, memory_format=torch.contiguous_format
    )


# --- logits ---------------------------------------------------------------------------------------


@custom_op("loku_kernels::softmax_triplet", mutates_args=())
def _softmax_triplet(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return choose("triplet_forward", logits).triplet_forward(logits, labels, ignore_index)


@_softmax_triplet.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
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
def _(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, labels, *output)
    ctx.mark_non_differentiable(output[1])


def _logits_backward(ctx: Any, grad_triplet: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    logits, labels, triplet, runner_up_id = ctx.saved_tensors
    grad = _softmax_triplet_backward(grad_triplet, logits, labels, ctx.ignore_index, triplet, runner_up_id)
    return grad, None, None


_softmax_triplet.register_autograd(_logits_backward, setup_context=_save_logits)


def softmax_triplet(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Compute the three numbers on which the unlearning losses of a token depend, and the runner-up's index.

    They equal, in plain torch, for logits (N, V)::

        target = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        runner_up, runner_up_id = others.max(1)
        rest = others.scatter(1, runner_up_id[:, None], -torch.inf).logsumexp(1)
        triplet = torch.stack([target[:, 0], runner_up, rest], 1).double()

    ``triplet.softmax(-1)`` holds three probabilities: of the target, of the runner-up, and of all the rest
    together. The triplet is differentiable in ``logits``. A row whose rest is -inf gets no gradient through
    its rest.

    Args:
        logits: The logits (..., V), float32, bfloat16, float16 or float64. The last dimension is contiguous.
            -inf masks a word.
        labels: The labels (...), int64, aligned with the logits. The function shifts nothing.
        ignore_index: The label of rows that do not count. Such a row gets zeros in the triplet, -1 as the
            runner-up's index, and no gradient. Default -100.

    Returns:
        The triplet (..., 3), float64: the logits of target and runner-up, and the log-sum-exp of the rest.
        The runner-up's index (...), int64, is the lowest on ties and is not differentiable.

    Raises:
        ValueError: V < 2, or shapes, dtypes or devices do not go together.
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    check_logits(logits, labels)
    result: tuple[Tensor, Tensor] = _softmax_triplet(logits, labels, ignore_index)
    return result


# --- logits, forward and backward at once, in place -----------------------------------------------


@custom_op("loku_kernels::ihl_forward_backward_", mutates_args=("logits",))
def ihl_forward_backward_(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with a multiple of the gradient of the sum of the rows' IHL.

    Args:
        logits: The logits (..., V), as for ``softmax_triplet``.
        labels: The labels (...), int64.
        ignore_index: The label of rows that do not count. Their gradient is 0.
        scale: The factor of the gradient, a float64 tensor () on the device of the logits.

    Returns:
        The triplet (..., 3), float64, and the runner-up's index (...), int64.
    """
    return choose("inverted_hinge_", logits).inverted_hinge_(logits, labels, ignore_index, scale)


@ihl_forward_backward_.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_triplets(labels)


# --- hidden states and the output embedding -------------------------------------------------------
#
# The logits are y = softcap * tanh(logit_scale * (h W^T + b) / softcap). One block of rows and columns exists
# at a time.


def _slope(logit: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """Compute dy/dz at the logits y, for z = h W^T + b."""
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
    """Compute triplet, runner_up_id, and O = sum over v not in {t, r} of exp(y_v - rest) dy_v/dz_v W[v].

    The gradient of ``hidden`` needs O (N, D) and two rows of W, for any loss. O is empty without
    ``want_direction``.
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
            if terms is not None:
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


def _add_demoted(total: Tensor, weight: Tensor, state: OnlineState) -> None:
    """Add the terms of earlier runner-ups that the last block moved into the rest to ``total`` (N, D)."""
    rows = weight.index_select(0, state.demoted_id.clamp(0)).to(total.dtype)
    total.addcmul_(rows, state.demoted_share[:, None].to(total.dtype))  # the share is 0 without one


@_linear_softmax_triplet.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
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
    """Compute d hidden = g_t y'_t W[t] + g_r y'_r W[r] + g_rest O. It needs no logits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    own = grad_triplet[:, :2] * _slope(triplet[:, :2], softcap, logit_scale)
    # A rest of -inf (V = 2, or all other words masked) has no gradient, for any loss.
    rest = grad_triplet[:, 2:].where(triplet[:, 2:] != -torch.inf, 0.0)
    grad = torch.cat([own, rest], 1)
    grad = grad.where(runner_up_id[:, None] >= 0, 0.0).to(dtype)  # an ignored row has no runner-up
    grad_hidden = direction * grad[:, 2:]
    for column, index in enumerate((labels, runner_up_id)):
        grad_hidden.addcmul_(weight.index_select(0, index.clamp(0)).to(dtype), grad[:, column, None])
    return grad_hidden.to(weight.dtype)


@_linear_backward_hidden.register_fake
def _(
    grad_triplet: Tensor,
    weight: Tensor,
    labels: Tensor,
    triplet: Tensor,
    runner_up_id: Tensor,
    direction: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
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
    """Compute d weight (V, D) and d bias (V,). Each block of logits is computed again."""
    index = (labels != ignore_index).nonzero()[:, 0]
    labels, triplet, runner_up_id = labels[index], triplet[index], runner_up_id[index]
    grad = grad_triplet[index] * logit_scale
    logits = LogitsBlocks(hidden[index], weight, bias, softcap, logit_scale)

    def gradient(rows: slice, columns: slice) -> Tensor:
        block = logits.compute(rows, columns)
        out = logits.terms_of(block)
        choose("triplet_backward", block).triplet_backward(
            grad[rows],
            block,
            labels[rows],
            ignore_index,
            triplet[rows],
            runner_up_id[rows],
            first_column=columns.start,
            softcap=softcap,
            out=out,
        )
        return out

    return weight_gradient(logits, gradient)


@_linear_backward_weight.register_fake
def _(grad_triplet: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, ctx.softcap, ctx.logit_scale, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_backward(ctx: Any, grad_triplet: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
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


# torch does not annotate the library.
_library = torch.library.Library("loku_kernels", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]


def register_autocast(name: str, operator: Callable[..., Any], operands: int) -> None:
    """Make an operator cast its first arguments under autocast, as ``torch.nn.functional.linear`` does.

    Args:
        name: The operator's name in the library ``loku_kernels``.
        operator: The operator.
        operands: The number of leading arguments to cast. Each is a tensor or None.
    """

    def register(device_type: str, key: str) -> None:
        def cast(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                low = (None if x is None else x.to(dtype) for x in args[:operands])
                return operator(*low, *args[operands:])

        _library.impl(name, cast, key)  # type: ignore[no-untyped-call, unused-ignore]

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
    """Compute ``softmax_triplet`` of the logits of an output embedding, block by block.

    The result equals, in plain torch::

        logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        triplet, runner_up_id = softmax_triplet(logits, labels)

    One block of rows and columns of the logits exists at a time: at most 16 MiB on the CPU and 256 MiB on
    CUDA. On CUDA the logits are float32 if the operands have 16 bits. Their terms, the operand of the second
    product, then take half as much memory again. Forward and backward together cost two matrix products if
    ``weight`` is frozen. The backward computes each block again if ``weight`` or ``bias`` trains. Under
    autocast the operands are cast as ``linear`` casts them.

    Args:
        hidden: The hidden states (..., D), float32, bfloat16, float16 or float64.
        weight: The output embedding (V, D), in the dtype of ``hidden``.
        labels: The labels (...), int64, aligned with ``hidden``.
        bias: The bias (V,) of the output embedding, in the dtype of ``hidden``, or None (default).
        ignore_index: The label of rows that are dropped before any product. Such a row gets zeros, -1 and no
            gradient. Default -100.
        softcap: The softcap of the logits (as in Gemma), or None (default).
        logit_scale: The factor of the logits (as in Cohere's models), applied before the softcap. Default
            1.0.

    Returns:
        The triplet (..., 3) and the runner-up's index (...), as ``softmax_triplet`` returns them.

    Raises:
        ValueError: V < 2, or shapes, dtypes or devices do not go together, or the softcap is not positive.
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
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

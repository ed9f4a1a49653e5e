"""The softmax triplet of hidden states and an output embedding, which never holds the logits (N, V) whole.

The logits are y = softcap * tanh(logit_scale * (h W^T + b) / softcap). One block of rows exists at a time. On
a CPU a block has some of the columns, so that it stays in the cache, and ``OnlineState`` carries the rows
from block to block. On other devices a block has whole rows, and one pass computes their triplets.

The public function checks its arguments. The operators behind it do not check again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.autocast import apply_without_autocast, register_autocast
from loku_kernels.backends import choose
from loku_kernels.backends.fused_losses import Saved, all_rows_stay, gradient_of_hidden, tensors_of
from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import IGNORE_INDEX, check_label_values, check_linear_operands
from loku_kernels.log_probabilities import wide_dtype
from loku_kernels.logits_blocks import LogitsBlocks, add_product, block_slices, part_of, weight_gradient
from loku_kernels.plain import gradients_with_graph, plain_linear_triplet
from loku_kernels.tracing import traced, traced_gradient, transformed, wants_graph
from loku_kernels.triplet import fake_triplets

Triplets = tuple[Tensor, Tensor, Tensor]  # triplet, runner_up_id, direction
# hidden (N, D), weight (V, D), bias (V,) or None, labels (N,), direction (N, D)
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


# --- forward --------------------------------------------------------------------------------------


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    want_direction: bool,
) -> Triplets:
    """Compute the triplets of hidden states, and the direction O of their gradient.

    O = sum over v not in {t, r} of exp(y_v - rest) s_v W[v], with the slope s_v = 1 - (y_v / softcap)^2, or 1
    without a softcap. The gradient of ``hidden`` needs O and two rows of W, for any loss.

    Args:
        hidden: The hidden states (N, D).
        weight: The output embedding W (V, D).
        bias: The bias (V,), or None.
        labels: The labels (N,), int64.
        ignore_index: The label of rows that do not count.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.
        want_direction: If false, O has no rows.

    Returns:
        The triplet (N, 3), float64, the runner-up's index (N,), int64, and O (N, D) in the dtype of
        ``hidden``.

    Raises:
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    count, index = len(labels), None
    if not all_rows_stay(labels, ignore_index):
        check_label_values(labels, len(weight), ignore_index)  # the error names a position in all labels
        index = (labels != ignore_index).nonzero()[:, 0]
        hidden, labels = hidden[index], labels[index]
    logits = LogitsBlocks(hidden, weight, bias, softcap, logit_scale)
    by_block = _whole_rows if len(logits.columns) == 1 else _blocks_of_columns
    result = by_block(logits, labels, ignore_index, want_direction)
    return result if index is None else _spread(result, index, count, want_direction)


def _spread(result: Triplets, index: Tensor, count: int, want_direction: bool) -> Triplets:
    """Put the results of the rows that count into their places among all ``count`` rows."""
    triplet, runner_up_id, direction = result
    return (
        triplet.new_zeros(count, 3).index_copy_(0, index, triplet),
        runner_up_id.new_full((count,), -1).index_copy_(0, index, runner_up_id),
        direction.new_zeros(count, direction.shape[1]).index_copy_(0, index, direction)
        if want_direction
        else direction,
    )


def _whole_rows(logits: LogitsBlocks, labels: Tensor, ignore_index: int, want_direction: bool) -> Triplets:
    """Compute the result of ``linear_forward`` from blocks of whole rows."""
    hidden, weight, softcap = logits.hidden, logits.weight, logits.softcap
    direction = torch.empty_like(hidden) if want_direction else hidden.new_empty(0, hidden.shape[1])
    if len(logits.rows) > 1 and labels.is_cpu:  # the error of a block names a position in the block
        check_label_values(labels, len(weight), ignore_index)
    results = []
    for rows in logits.rows:
        block = logits.compute(rows, logits.columns[0])
        targets = part_of(labels, rows)
        if want_direction:
            backend = choose("rest_probabilities_", block)
            results.append(backend.rest_probabilities_(block, targets, ignore_index, softcap=softcap))
            torch.mm(block, weight, out=part_of(direction, rows))
        else:
            backend = choose("triplet_forward", block)
            results.append(backend.triplet_forward(block, targets, ignore_index, softcap=softcap))
    if len(results) == 1:
        return *results[0], direction
    if not results:
        return torch.zeros(0, 3, dtype=torch.float64, device=hidden.device), labels.clone(), direction
    triplets, runner_up_ids = zip(*results, strict=True)
    return torch.cat(triplets), torch.cat(runner_up_ids), direction


def _blocks_of_columns(
    logits: LogitsBlocks, labels: Tensor, ignore_index: int, want_direction: bool
) -> Triplets:
    """Compute the result of ``linear_forward`` from blocks of columns. Every label counts."""
    hidden, weight = logits.hidden, logits.weight
    check_label_values(labels, len(weight), ignore_index)
    direction = torch.empty_like(hidden) if want_direction else hidden.new_empty(0, hidden.shape[1])
    triplet = torch.empty(len(labels), 3, dtype=torch.float64, device=hidden.device)
    runner_up_id = torch.empty_like(labels)
    dtype = wide_dtype(hidden.dtype)
    for rows in logits.rows:
        targets = labels[rows]
        state = OnlineState.start(targets, dtype)
        width = hidden.shape[1] if want_direction else 0
        total = torch.zeros(len(targets), width, dtype=dtype, device=hidden.device)
        for columns in logits.columns:
            block = logits.compute(rows, columns)
            choose("triplet_columns_", block).triplet_columns_(
                block,
                targets,
                state,
                first_column=columns.start,
                softcap=logits.softcap,
                store=want_direction,
            )
            if want_direction:
                if columns.start:
                    total *= state.rescale[:, None]
                    _add_demoted(total, weight, state)
                add_product(total, block, weight[columns])
        triplet[rows], runner_up_id[rows] = state.triplet(), state.runner_up_id
        if want_direction:
            rest_sum = state.numbers[:, 3:]
            direction[rows] = total.mul_(torch.where(rest_sum == 0, 0.0, 1 / rest_sum))
    return triplet, runner_up_id, direction


def _add_demoted(total: Tensor, weight: Tensor, state: OnlineState) -> None:
    """Add the terms of earlier runner-ups that the last block moved into the rest to ``total`` (N, D)."""
    rows = weight.index_select(0, state.demoted_id.clamp(0)).to(total.dtype)
    total.addcmul_(rows, state.demoted_share[:, None].to(total.dtype))  # the share is 0 without one


# --- backward -------------------------------------------------------------------------------------


def linear_backward(
    needs: tuple[bool, bool, bool],
    operands: Operands,
    saved: Saved,
    factor: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of hidden states, weight and bias from that of the triplets.

    Args:
        needs: Three flags. Each says whether the gradient of hidden states, weight or bias is wanted.
        operands: hidden (N, D), weight (V, D), bias (V,) or None, labels (N,) and the direction (N, D).
        saved: The gradient (N, 3) of the triplets, float64, the triplets and their runner-ups.
        factor: The factors (N,) of the rows' gradients, or one factor (), or None for 1.
        ignore_index: The label of rows that do not count.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.

    Returns:
        The three gradients, in the dtype of the operands. One that is not wanted is None.
    """
    hidden, weight, bias, labels, direction = operands
    if traced_gradient(saved[0] if factor is None else factor):
        numbers = _times(tensors_of(saved, labels), factor)
        return _backward_by_operators(needs, operands, numbers, ignore_index, softcap, logit_scale)
    grad_hidden = grad_weight = grad_bias = None
    if needs[0]:
        grad_hidden = gradient_of_hidden(saved, factor, weight, labels, direction, softcap, logit_scale)
    if needs[1] or needs[2]:
        grad_triplet, triplet, runner_up_id = _times(tensors_of(saved, labels), factor)
        grad_weight, grad_bias = _gradient_of_weight(
            grad_triplet, hidden, weight, bias, labels, ignore_index, triplet, runner_up_id, softcap,
            logit_scale,
        )  # fmt: skip
    return grad_hidden, grad_weight if needs[1] else None, grad_bias if needs[2] else None


def _times(numbers: Saved, factor: Tensor | None) -> Saved:
    """Multiply the gradient of the triplets, the first of three tensors, by the factors of its rows."""
    grad_triplet, *own = numbers
    return numbers if factor is None else (grad_triplet * factor.unsqueeze(-1), *own)


def _gradient_of_weight(
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
    counted = labels != ignore_index
    grad = grad_triplet * logit_scale
    if hidden.device.type == "cpu":
        index = counted.nonzero()[:, 0]
        hidden, labels, grad = hidden[index], labels[index], grad[index]
        triplet, runner_up_id = triplet[index], runner_up_id[index]
    else:  # a NaN in a row that does not count must not meet the zeros of its gradient
        hidden = hidden.where(counted[:, None], 0.0)
    # Blocks of columns on every device: the wide sums of several blocks of rows are as large as a slice of W.
    slices = block_slices(len(hidden), len(weight), hidden.dtype.itemsize, hidden.device.type)
    logits = LogitsBlocks(hidden, weight, bias, softcap, logit_scale, slices)

    def gradient(rows: slice, columns: slice) -> Tensor:
        block = logits.compute(rows, columns)
        return choose("triplet_backward", block).triplet_backward(
            grad[rows],
            block,
            labels[rows],
            ignore_index,
            triplet[rows],
            runner_up_id[rows],
            first_column=columns.start,
            softcap=softcap,
            out=block,
        )

    return weight_gradient(logits, gradient)


def _gradients_with_graph(
    needs: tuple[bool, bool, bool], operands: Operands, grad_triplet: Tensor, *settings: Any
) -> tuple[Tensor | None, ...]:
    """Compute the three gradients of a backward that is to be differentiated again."""

    def triplet_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return plain_linear_triplet(hidden, weight, bias, operands[3], *settings)[0]

    return gradients_with_graph(triplet_of, operands[:3], needs, grad_triplet)


class _LinearSoftmaxTriplet(torch.autograd.Function):
    """The triplet of hidden states that nothing traces."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        softcap: float,
        logit_scale: float,
        want_direction: bool,
    ) -> tuple[Tensor, Tensor]:
        triplet, runner_up_id, direction = linear_forward(
            hidden, weight, bias, labels, ignore_index, softcap, logit_scale, want_direction
        )
        ctx.settings = (ignore_index, softcap, logit_scale)
        ctx.save_for_backward(triplet, runner_up_id, hidden, weight, bias, labels, direction)
        ctx.mark_non_differentiable(runner_up_id)
        ctx.set_materialize_grads(False)
        return triplet, runner_up_id

    @staticmethod
    def backward(ctx: Any, grad_triplet: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_triplet is None:
            return (None,) * 8
        triplet, runner_up_id, *operands = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if wants_graph():
            return *_gradients_with_graph(needs, operands, grad_triplet, *ctx.settings), *[None] * 5
        saved = (grad_triplet, triplet, runner_up_id)
        return *linear_backward(needs, operands, saved, None, *ctx.settings), *[None] * 5


# --- operators ------------------------------------------------------------------------------------


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
    return linear_forward(hidden, weight, bias, labels, ignore_index, softcap, logit_scale, want_direction)


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
    return *fake_triplets(labels), direction


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
    saved = (grad_triplet, triplet, runner_up_id)
    return gradient_of_hidden(saved, None, weight, labels, direction, softcap, logit_scale)


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
    return _gradient_of_weight(
        grad_triplet, hidden, weight, bias, labels, ignore_index, triplet, runner_up_id, softcap, logit_scale
    )


@_linear_backward_weight.register_fake
def _(grad_triplet: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, ctx.softcap, ctx.logit_scale, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_backward(ctx: Any, grad_triplet: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *operands, triplet, runner_up_id, direction = ctx.saved_tensors
    needs, settings = ctx.needs_input_grad[:3], (ctx.ignore_index, ctx.softcap, ctx.logit_scale)
    if wants_graph():
        return *_gradients_with_graph(needs, (*operands, direction), grad_triplet, *settings), *[None] * 5
    numbers = (grad_triplet, triplet, runner_up_id)
    gradients = _backward_by_operators(needs, (*operands, direction), numbers, *settings)
    return *gradients, *[None] * 5


def _backward_by_operators(
    needs: tuple[bool, bool, bool],
    operands: Operands,
    numbers: Saved,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the result of ``linear_backward`` by the registered operators."""
    hidden, weight, bias, labels, direction = operands
    grad_triplet, triplet, runner_up_id = numbers
    grad_hidden = grad_weight = grad_bias = None
    if needs[0]:
        grad_hidden = _linear_backward_hidden(
            grad_triplet, weight, labels, triplet, runner_up_id, direction, softcap, logit_scale
        )
    if needs[1] or needs[2]:
        grad_weight, grad_bias = _linear_backward_weight(
            grad_triplet, hidden, weight, bias, labels, ignore_index, triplet, runner_up_id, softcap,
            logit_scale,
        )  # fmt: skip
    return grad_hidden, grad_weight if needs[1] else None, grad_bias if needs[2] else None


_linear_softmax_triplet.register_autograd(_linear_backward, setup_context=_save_linear)


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
        ValueError: V < 2, or shapes, dtypes or devices do not go together, or the softcap is not positive and
            finite.
        IndexError: A label is neither in [0, V) nor ``ignore_index``. On CUDA a device-side assert fails.
    """
    check_linear_operands(hidden, weight, labels, bias, softcap)
    rows = hidden if hidden.dim() == 2 else hidden.reshape(labels.numel(), hidden.shape[-1])
    want_direction = torch.is_grad_enabled() and hidden.requires_grad
    settings = (labels.reshape(-1), ignore_index, float(softcap or 0.0), float(logit_scale), want_direction)
    if transformed():
        triplet, runner_up_id = apply_without_autocast(
            plain_linear_triplet, (rows, weight, bias), *settings[:-1]
        )
    elif traced(hidden, weight, bias, labels):
        triplet, runner_up_id, _ = _linear_softmax_triplet(rows, weight, bias, *settings)
    else:
        apply = _LinearSoftmaxTriplet.apply
        triplet, runner_up_id = apply_without_autocast(apply, (rows, weight, bias), *settings)
    return triplet.view(*labels.shape, 3), runner_up_id.view(labels.shape)

"""The softmax triplet of logits: operators, gradient and the public function.

The public function checks its arguments. The operators behind it do not check again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from loku_kernels.backends import choose
from loku_kernels.checks import IGNORE_INDEX, check_logits
from loku_kernels.plain import gradients_with_graph, plain_triplet
from loku_kernels.tracing import traced, traced_gradient, transformed, wants_graph


def fake_triplets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make a triplet (..., 3) and a runner_up_id (...) of labels (...) for ``torch.compile``."""
    return labels.new_empty((*labels.shape, 3), dtype=torch.float64), torch.empty_like(
        labels, memory_format=torch.contiguous_format
    )


# --- logits ---------------------------------------------------------------------------------------


@custom_op("loku_kernels::softmax_triplet", mutates_args=())
def _softmax_triplet(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return choose("triplet_forward", logits).triplet_forward(logits, labels, ignore_index)


@_softmax_triplet.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return fake_triplets(labels)


@custom_op("loku_kernels::softmax_triplet_backward", mutates_args=())
def softmax_triplet_backward(
    grad_triplet: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    triplet: Tensor,
    runner_up_id: Tensor,
) -> Tensor:
    backend = choose("triplet_backward", logits)
    return backend.triplet_backward(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id)


@softmax_triplet_backward.register_fake
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


def _gradient_with_graph(
    grad_triplet: Tensor, logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor | None, ...]:
    """Compute the result of a backward that is to be differentiated again."""

    def triplet_of(logits: Tensor) -> Tensor:
        return plain_triplet(logits, labels, ignore_index)[0]

    return *gradients_with_graph(triplet_of, [logits], [True], grad_triplet), None, None


def _logits_backward(ctx: Any, grad_triplet: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, triplet, runner_up_id = ctx.saved_tensors
    if wants_graph():
        return _gradient_with_graph(grad_triplet, logits, labels, ctx.ignore_index)
    grad = softmax_triplet_backward(grad_triplet, logits, labels, ctx.ignore_index, triplet, runner_up_id)
    return grad, None, None


_softmax_triplet.register_autograd(_logits_backward, setup_context=_save_logits)


class _SoftmaxTriplet(torch.autograd.Function):
    """The triplet of logits that nothing traces."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        triplet, runner_up_id = choose("triplet_forward", logits).triplet_forward(
            logits, labels, ignore_index
        )
        ctx.save_for_backward(logits, labels, triplet, runner_up_id)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(runner_up_id)
        ctx.set_materialize_grads(False)
        return triplet, runner_up_id

    @staticmethod
    def backward(ctx: Any, grad_triplet: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_triplet is None:
            return None, None, None
        logits, labels, *saved = ctx.saved_tensors
        if wants_graph():
            return _gradient_with_graph(grad_triplet, logits, labels, ctx.ignore_index)
        arguments = (grad_triplet, logits, labels, ctx.ignore_index, *saved)
        if traced_gradient(grad_triplet):
            return softmax_triplet_backward(*arguments), None, None
        return choose("triplet_backward", logits).triplet_backward(*arguments), None, None


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
    if transformed():
        return plain_triplet(logits, labels, ignore_index)
    compute = _softmax_triplet if traced(logits, labels) else _SoftmaxTriplet.apply
    result: tuple[Tensor, Tensor] = compute(logits, labels, ignore_index)
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
    return fake_triplets(labels)


@custom_op("loku_kernels::scale_rows_", mutates_args=("logits",))
def scale_rows_(logits: Tensor, factor: Tensor) -> None:
    """Multiply the rows of logits, in place.

    Args:
        logits: The logits (..., V).
        factor: The factors (...) of the rows, or one factor (), of any floating dtype.
    """
    choose("scale_rows_", logits).scale_rows_(logits, factor)


@scale_rows_.register_fake
def _(logits: Tensor, factor: Tensor) -> None:
    pass

"""The public functions in plain torch, for derivatives that no kernel has.

A kernel computes a value and its first derivatives. Forward mode, the transforms of ``torch.func`` and second
derivatives run these functions, which torch derives. They hold whole logits, in float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loku_kernels.log_probabilities import wide_dtype


def plain_triplet(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute ``softmax_triplet``.

    Args:
        logits: The logits (..., V).
        labels: The labels (...), int64. torch raises for one outside [0, V) that is not ``ignore_index``.
        ignore_index: The label of rows that do not count.

    Returns:
        The triplet (..., 3), float64, and the runner-up's index (...), int64.
    """
    counted = labels != ignore_index
    target_id = labels.where(counted, 0).unsqueeze(-1)
    logits = logits.double()
    others = logits.scatter(-1, target_id, -torch.inf)
    runner_up_id = others.detach().argmax(-1, keepdim=True)
    # If all other words are masked, argmax saw only -inf and may have returned the target.
    runner_up_id = runner_up_id.where(runner_up_id != target_id, (target_id == 0).long())
    others = others.scatter(-1, runner_up_id, -torch.inf)
    empty = (others == -torch.inf).all(-1, keepdim=True)
    rest = others.where(~empty, 0.0).logsumexp(-1, keepdim=True).where(~empty, -torch.inf)
    triplet = torch.cat([logits.gather(-1, target_id), logits.gather(-1, runner_up_id), rest], -1)
    triplet = triplet.where(counted.unsqueeze(-1), 0.0)
    return triplet, runner_up_id.squeeze(-1).where(counted, -1)


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, logit_scale: float
) -> Tensor:
    """Compute the logits of an output embedding.

    Args:
        hidden: The hidden states (..., D).
        weight: The output embedding (V, D).
        bias: The bias (V,), or None.
        softcap: The softcap. 0 means none.
        logit_scale: The factor of the logits, applied before the softcap.

    Returns:
        The logits (..., V), float32, or float64 for float64 operands.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias).to(wide_dtype(hidden.dtype)) * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def plain_linear_triplet(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute ``linear_softmax_triplet``. The arguments are those of both functions above."""
    hidden = hidden.where((labels != ignore_index).unsqueeze(-1), 0.0)  # such a row may hold NaN
    return plain_triplet(plain_logits(hidden, weight, bias, softcap, logit_scale), labels, ignore_index)


def plain_divergence(
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
) -> Tensor:
    """Compute KL(reference || model) of each row.

    Args:
        hidden: The model's hidden states (..., D).
        weight: The model's output embedding (V, D).
        bias: The model's bias (V,), or None.
        reference_hidden: The reference's hidden states (..., D').
        reference_weight: The reference's output embedding (V, D').
        reference_bias: The reference's bias (V,), or None.
        labels: The labels (...), int64. With ``lowering``, torch raises for one outside [0, V) that is not
            ``ignore_index``.
        ignore_index: The label of rows that do not count. They get 0.
        softcap: The softcap of both models' logits. 0 means none.
        logit_scale: The factor of both models' logits, applied before the softcap.
        lowering: The number that is subtracted from the reference's logits of the labels. 0 means none.

    Returns:
        The divergences (...), in nats, float32, or float64 for float64 operands.
    """

    counted = labels != ignore_index

    def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden = hidden.where(counted.unsqueeze(-1), 0.0)
        return plain_logits(hidden, weight, bias, softcap, logit_scale).double()

    log_p = logits_of(hidden, weight, bias).log_softmax(-1)
    original = logits_of(reference_hidden, reference_weight, reference_bias).detach()
    if lowering:
        label = labels.where(counted, 0).unsqueeze(-1)
        original = original.scatter(-1, label, original.gather(-1, label) - lowering)
    log_q = original.log_softmax(-1)
    q = log_q.exp()
    difference = (log_q - log_p).where(q != 0, 0.0)  # a word that both models mask adds 0
    return (q * difference).sum(-1).where(counted, 0.0).to(wide_dtype(hidden.dtype))


def gradients_with_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of a backward that is to be differentiated again (``create_graph=True``).

    Args:
        function: The forward in plain torch, a function of ``inputs``.
        inputs: The tensors of the forward, as autograd saved them, or None.
        needs: A flag for each input. It says whether the gradient is wanted.
        grad: The gradient of the function's result, in its shape and dtype.

    Returns:
        The gradients, with a graph that leads to ``inputs`` and ``grad``. One that is not wanted is None.
    """
    device_type = grad.device.type
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        # A view of its own has each input, as one may depend on another.
        own = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, need in zip(own, needs, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(function(*own), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)

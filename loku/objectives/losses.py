"""The losses of the methods, one small function each.

A loss takes a ``Batch`` and returns a scalar. The scalar is differentiable in the batch's triplets and
values.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from loku.objectives.rows import Batch, Rows
from loku_kernels import cross_entropy, reduce_loss, triplet_loss


def _token_mean(loss: Literal["inverted_hinge", "cross_entropy"], rows: Rows) -> Tensor:
    """Compute the mean of a loss over the counted tokens. One kernel computes it and its gradient."""
    return triplet_loss(loss, rows.triplet, rows.counted.long(), ignore_index=0)


def _mean_of(quantity: str, rows: Rows) -> Tensor:
    """Compute the mean of a quantity over its positions."""
    return reduce_loss(rows.values[quantity], rows.positions[quantity], "mean")


def lm_loss(rows: Rows) -> Tensor:
    """LM loss: the mean negative log-likelihood, in nats, of the counted tokens."""
    return _token_mean("cross_entropy", rows)


def answer_probability(triplet: Tensor, counted: Tensor) -> Tensor:
    """TOFU's answer probability (B,): exp of the mean log-probability of a row's counted tokens.

    Args:
        triplet: The softmax triplets (B, T, 3), float64.
        counted: The mask (B, T), bool, of the tokens that count.
    """
    count = counted.sum(1).clamp(min=1)
    return (-(cross_entropy(triplet).where(counted, 0.0).sum(1)) / count).exp()


def inverted_hinge_loss(batch: Batch) -> Tensor:
    """IHL: the mean over the forget tokens of 1 + p_target - max over other tokens of p (LoKU, Eq. 3)."""
    return _token_mean("inverted_hinge", batch.forget)


def gradient_ascent_loss(batch: Batch) -> Tensor:
    """GA: the mean log-likelihood, in nats, of the forget tokens (Jang et al., 2023)."""
    return -lm_loss(batch.forget)


def dpo_loss(batch: Batch) -> Tensor:
    """DPO: the mean over rows of -log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))).

    w is the refusal, which is preferred, and l the true answer. pi and ref are the probabilities of whole
    answers under the model and the original model (Rafailov et al., 2023, Eq. 7). TOFU applies it to refusals
    (Maini et al., 2024).
    """
    losses = -logsigmoid(batch.beta * (batch.refusal.log_ratio() - batch.forget.log_ratio()))
    return reduce_loss(losses, batch.refusal.labelled(), "mean")


def npo_loss(batch: Batch) -> Tensor:
    """NPO: (2 / beta) x the mean over forget rows of log(1 + (pi / ref)^beta) (Zhang et al., 2024).

    pi and ref are the probabilities of whole answers under the model and the original model.
    """
    losses = logsigmoid(-batch.beta * batch.forget.log_ratio())
    return -2 / batch.beta * reduce_loss(losses, batch.forget.labelled(), "mean")


def refusal_loss(batch: Batch) -> Tensor:
    """IDK: the LM loss of refusals in the place of the forget set's answers (TOFU, Maini et al., 2024)."""
    return lm_loss(batch.refusal)


def retain_loss(batch: Batch) -> Tensor:
    """LM loss of the retain tokens (gradient difference, Liu et al., 2022; LoKU, Eq. 3)."""
    return lm_loss(batch.retain)


def retain_divergence(batch: Batch) -> Tensor:
    """KL: the mean over the retain rows of KL(original || model), in nats (TOFU, Maini et al., 2024).

    The mean is over the positions that predict a label, or with ``divergence_over="tokens"`` over all tokens.
    """
    return _mean_of("divergence", batch.retain)

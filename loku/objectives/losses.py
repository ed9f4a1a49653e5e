"""The losses of the methods, one small function each.

A loss takes a ``Batch`` and returns a scalar. The scalar is differentiable in the batch's triplets and
values.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

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


def altpo_loss(batch: Batch) -> Tensor:
    """AltPO: 2 / beta x ``dpo_loss``, with an alternate in the place of the refusal (Mekala et al., 2025).

    An alternate is another plausible answer to the question of the row, which the model itself has written.
    """
    return 2 / batch.beta * dpo_loss(batch)


def npo_loss(batch: Batch) -> Tensor:
    """NPO: (2 / beta) x the mean over forget rows of log(1 + (pi / ref)^beta) (Zhang et al., 2024).

    pi and ref are the probabilities of whole answers under the model and the original model.
    """
    losses = logsigmoid(-batch.beta * batch.forget.log_ratio())
    return -2 / batch.beta * reduce_loss(losses, batch.forget.labelled(), "mean")


def simnpo_loss(batch: Batch) -> Tensor:
    """SimNPO: -(2 / beta) x the mean over forget rows of log sigmoid(beta (l - delta)) (Fan et al., 2024).

    l is the mean negative log-likelihood, in nats, of the row's counted tokens; there is no original model.
    The paper's gamma is outside of beta, so it is beta x ``delta``. The authors' code has it inside, as here.
    """
    forget = batch.forget
    mean = -forget.log_probability() / forget.counted.sum(1).clamp(min=1)
    losses = logsigmoid(batch.beta * (mean - batch.arguments["delta"]))
    return -2 / batch.beta * reduce_loss(losses, forget.labelled(), "mean")


def _weighted_ascent(weight: Tensor, rows: Rows) -> Tensor:
    """Compute the mean over the counted tokens of weight x log-likelihood; the weight has no gradient."""
    return -reduce_loss(weight.detach() * cross_entropy(rows.triplet), rows.counted, "mean")


def _log_other_mass(triplet: Tensor) -> Tensor:
    """log(1 - p) of the target's p, without a difference of nearly equal numbers."""
    return -softplus(triplet[..., 0] - torch.logaddexp(triplet[..., 1], triplet[..., 2]))


def wga_loss(batch: Batch) -> Tensor:
    """WGA: the mean over the forget tokens of w log p, w = p^beta without gradient (Wang et al., 2025).

    p is the model's probability of the token. The weight lowers the gradient of tokens that are forgotten.
    """
    return _weighted_ascent((-batch.beta * cross_entropy(batch.forget.triplet)).exp(), batch.forget)


def satimp_loss(batch: Batch) -> Tensor:
    """SatImp: the mean over the forget tokens of w log p, w = p^beta1 (1 - p)^beta2 (Yang et al., 2025).

    The weight has no gradient. Its factors are the saturation and the importance of a token.
    """
    triplet = batch.forget.triplet
    saturation = -batch.arguments["beta1"] * cross_entropy(triplet)
    importance = batch.arguments["beta2"] * _log_other_mass(triplet)
    return _weighted_ascent((saturation + importance).exp(), batch.forget)


def tnpo_loss(batch: Batch) -> Tensor:
    """TNPO: the mean over the forget tokens of w log p, w = 2 p^beta / (p^beta + ref^beta + epsilon).

    The weight has no gradient. p and ref are the probabilities of the token under the model and the original
    model: NPO for each token (Wang et al., 2025). The paper has no ``epsilon``; the authors' code has
    1e-5.
    """
    ours, beta = cross_entropy(batch.forget.triplet), batch.beta
    theirs = -batch.forget.values["original_log_probability"]
    # Numerator and denominator are divided by p^beta, so that a small p gives no 0 / 0.
    others = (beta * (ours - theirs)).exp()
    if epsilon := batch.arguments["epsilon"]:  # 0 x inf of a very small p would be NaN
        others = others + epsilon * (beta * ours).exp()
    return _weighted_ascent(2 / (1 + others), batch.forget)


def after_first(counted: Tensor, number: int) -> Tensor:
    """The mask (B, T), bool, of the counted positions of each row but the first ``number``."""
    return counted & (counted.cumsum(1) > number)


def ceu_loss(batch: Batch) -> Tensor:
    """CE-U: the mean over the forget tokens of -log(1 - p), in nats (Yang, 2025).

    CE-U is the cross entropy of the model with a target q: the model's own distribution without the token,
    q_v = p_v / (1 - p), which has no gradient. It is -log(1 - p) plus the entropy of q. So this value is
    KL(q || model), and its gradient is that of CE-U. The first ``ignore_first_n_answer_tokens`` counted
    tokens of each row do not count, 1 by default as in the paper.
    """
    counted = after_first(batch.forget.counted, batch.arguments["ignore_first_n_answer_tokens"])
    return -reduce_loss(_log_other_mass(batch.forget.triplet), counted, "mean")


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


def forget_divergence(batch: Batch) -> Tensor:
    """The mean over the forget rows of KL(original || model), in nats; positions as ``retain_divergence``.

    It holds the model near the original where gradient ascent acts (Zhang et al., 2024: their code's GA with
    KL on the forget set).
    """
    return _mean_of("divergence", batch.forget)

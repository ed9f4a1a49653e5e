"""Plain torch for the KL divergence of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from loku_kernels.log_probabilities import divergence_gradient_, normalize_, wide_logits


def divergence_(
    logits: Tensor, reference_logits: Tensor, *, softcap: float, store: bool
) -> tuple[Tensor, Tensor]:
    """Compute KL(q || p) of each row, with the model's p and the reference's q.

    Args:
        logits: The model's logits (N, V), or their tanh with a softcap. They are overwritten. With ``store``
            they become the gradient of the divergence: p - q, times the softcap's slope.
        reference_logits: The reference's logits (N, V), in the same form and dtype. They are overwritten.
        softcap: The softcap. 0 means none.
        store: If true, the gradient is wanted.

    Returns:
        The divergences (N,), in nats, and the normalizers (2, N, 2) of the rows of both models: the largest
        logit, and the logarithm of the sum of exponentials relative to it. They are float32, or float64 for
        float64 logits. A word that both models mask adds 0.
    """
    log_p, log_q = wide_logits(logits, softcap), wide_logits(reference_logits, softcap)
    spare = torch.empty_like(log_p)
    normalizers = torch.stack([normalize_(log_p, spare), normalize_(log_q, spare)])
    q = torch.exp(log_q, out=spare)
    terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0)
    divergence = terms.sum(1)
    if store:
        logits.copy_(divergence_gradient_(log_p, q, normalizers[0], softcap, spare=terms))
    return divergence, normalizers

"""Plain torch that turns blocks of logits into log-probabilities and into gradients of a KL divergence."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64.

    Args:
        dtype: The dtype of logits.
    """
    return torch.float64 if dtype is torch.float64 else torch.float32


def wide_logits(logits: Tensor, softcap: float) -> Tensor:
    """Turn a block of logits into one in float32 or wider, in place if it is wide.

    Args:
        logits: The logits (n, C), or their tanh with a softcap.
        softcap: The softcap. 0 means none.

    Returns:
        The logits (n, C).
    """
    logits = logits.to(wide_dtype(logits.dtype))
    return logits.mul_(softcap) if softcap else logits


def normalize_(logits: Tensor, spare: Tensor) -> Tensor:
    """Turn logits (n, V) into log-probabilities, in place.

    The maximum is subtracted first. So the log-probability of a word that is nearly sure keeps its digits.

    Args:
        logits: The logits (n, V), in float32 or wider.
        spare: A tensor of the same shape and dtype, which is overwritten.

    Returns:
        The normalizers (n, 2) of the rows: the two numbers that were subtracted, in their order.
    """
    largest = logits.amax(1, keepdim=True)
    log_sum = torch.exp(logits.sub_(largest), out=spare).sum(1, keepdim=True).log_()
    logits.sub_(log_sum)
    return torch.cat([largest, log_sum], 1)


def divergence_gradient_(
    log_p: Tensor, q: Tensor, normalizer: Tensor, softcap: float, spare: Tensor | None = None
) -> Tensor:
    """Compute p - q, times the softcap's slope 1 - (y / softcap)^2 at the logits y.

    Args:
        log_p: The model's log-probabilities (n, C). The result overwrites them.
        q: The reference's probabilities (n, C).
        normalizer: The normalizers (n, 2) of the model's rows.
        softcap: The softcap. 0 means none.
        spare: A tensor (n, C) that may be overwritten, or None (default).

    Returns:
        ``log_p``.
    """
    if not softcap:
        return log_p.exp_().sub_(q)
    slope = torch.add(log_p, normalizer.sum(1, keepdim=True), out=spare)
    slope.div_(softcap).square_().neg_().add_(1)
    return log_p.exp_().sub_(q).mul_(slope)

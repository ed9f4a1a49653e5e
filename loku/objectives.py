"""What is minimised, from the triplets of a batch."""

from loku_kernels import cross_entropy, inverted_hinge, reduce_loss


def forget_loss(triplet, counted):
    """Mean Inverted Hinge Loss over the counted tokens: 1 + p_target - max of the others (Eq. 3)."""
    return reduce_loss(inverted_hinge(triplet), counted, "mean")


def retain_loss(triplet, counted):
    """Mean negative log-likelihood, in nats, over the counted tokens: the LM loss of Eq. 3."""
    return reduce_loss(cross_entropy(triplet), counted, "mean")


def answer_probability(triplet, counted):
    """exp of the mean log-probability of a row's counted tokens (B,): TOFU's answer probability."""
    count = counted.sum(1).clamp(min=1)
    return (-(cross_entropy(triplet).where(counted, 0.0).sum(1)) / count).exp()

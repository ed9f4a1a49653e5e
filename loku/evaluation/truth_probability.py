"""The probability of the true answer against wrong ones, a form of the truth ratio of open-unlearning."""

from __future__ import annotations

import numpy as np

from loku.evaluation.tofu_logs import Section, log_truth_ratio


def truth_probability(section: Section) -> float:
    """Compute the mean probability of the true answer against the wrong ones of its row.

        p / (p + q),   p = exp(-paraphrased loss),   q = exp(-mean perturbed loss)

    The losses are means over the tokens of an answer. It is ``truth_ratio`` of open-unlearning with the
    aggregator ``prob_mean``, its extent of knowledge (Dorna et al., 2025). open-unlearning adds 1e-10 to the
    denominator, which matters for losses of more than about 15 nats alone.

    Args:
        section: The section of a parsed TOFU log, with the losses of perturbed answers.

    Returns:
        The mean over the rows with perturbed answers, in [0, 1]. At 0.5 the model does not tell the true
        answer from the wrong ones. It is high for a retained and low for a forgotten set.

    Raises:
        ValueError: The section has no perturbed answers, or a loss is no number.
    """
    log_ratio = log_truth_ratio(section)  # log p - log q
    return float(np.exp(-np.logaddexp(0, -log_ratio)).mean())

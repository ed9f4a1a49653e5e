"""Figures of an unlearned model relative to those of a model that was retrained without the forget set.

PrivLeak is MUSE's (Shi et al., "MUSE: Machine unlearning six-way evaluation for language models", ICLR 2025).
The relative difference is open-unlearning's. The small number in the denominators is open-unlearning's, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loku.evaluation.scores import TokenScores, membership_auc, min_k

CHANCE_AUC = 0.5  # of a retrained model, where none is known
PRIVLEAK_SHARE = 0.4  # MUSE takes Min-40% Prob
_SMALL = 1e-10


def privleak(auc: float, retain_auc: float = CHANCE_AUC) -> float:
    """Compute PrivLeak in percent, MUSE's measure of privacy leakage.

        100 ((1 - auc) - (1 - retain_auc)) / (1 - retain_auc)

    MUSE writes the AUC of taking a text for one that the model was *not* trained on, 1 - ``auc`` here. The
    AUCs of this package, and those in open-unlearning's logs, are near 1 if the forget set looks like rows of
    the training set.

    Args:
        auc: The AUC of telling forget from hold-out texts under the unlearned model, in [0, 1]. MUSE takes
            the one by Min-40% Prob, ``min_k_auc(forget, holdout)``.
        retain_auc: The same under a model that was retrained without the forget set, in [0, 1]; 0.5 by
            default, the AUC of chance.

    Returns:
        The measure, in percent. 0 is the aim. It is negative, down to -100, if the forget set still looks
        like rows of the training set (too little is unlearned), and positive if it looks less so than under
        the retrained model (too much is unlearned). It is NaN if an AUC is.

    Raises:
        ValueError: An AUC is not in [0, 1].
    """
    for name, value in (("auc", auc), ("retain_auc", retain_auc)):
        if not (math.isnan(value) or 0 <= value <= 1):
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    return relative_difference(1 - auc, 1 - retain_auc)


def relative_difference(value: float, retain_value: float) -> float:
    """Compute the relative difference of a measure in percent.

        100 (value - retain_value) / retain_value

    Args:
        value: The measure of the unlearned model.
        retain_value: The measure of a model that was retrained without the forget set.

    Returns:
        The difference, in percent; 0 is the aim. The denominator is 1e-10 larger, so it is huge, and tells
        nothing, if ``retain_value`` is 0.
    """
    return (value - retain_value) / (retain_value + _SMALL) * 100


def min_k_auc(
    forget: Sequence[TokenScores], holdout: Sequence[TokenScores], share: float = PRIVLEAK_SHARE
) -> float:
    """Compute the AUC of telling forget from hold-out rows by Min-K% Prob, as PrivLeak takes it.

    Args:
        forget: The ``token_scores`` of the forget rows.
        holdout: The ``token_scores`` of the hold-out rows.
        share: The share of a row's tokens that counts, in (0, 1], 0.4 by default, as MUSE's.

    Returns:
        The AUC, in [0, 1], by ``membership_auc``. It is near 1 if the forget rows look like rows of the
        training set.

    Raises:
        ValueError: The share is not in (0, 1].
    """
    return membership_auc(min_k(forget, share), min_k(holdout, share))

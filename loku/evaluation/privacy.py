"""Figures of an unlearned model relative to those of a model that was retrained without the forget set.

PrivLeak is MUSE's (Shi et al., "MUSE: Machine unlearning six-way evaluation for language models", ICLR 2025).
The relative difference is open-unlearning's. The small number in the denominators is open-unlearning's, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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

    MUSE's texts have no EOS, and open-unlearning leaves the last labelled token out. ``content_scores``
    leaves the EOS of a row out.

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


def check_reference_report(report: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Check that a report of a retrained model is about some data sets.

    Args:
        report: The parsed report of ``loku evaluate``.
        digests: The digests of the tokenised rows of the data sets, by their names.

    Raises:
        ValueError: It is no such report, it has none of the data sets or other rows of one, or it lacks the
            AUC that PrivLeak takes although there are "forget" and "holdout" here.
    """
    parts = (
        [report.get(key) for key in ("sets", "whole", "digests")] if isinstance(report, Mapping) else [None]
    )
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            "the reference report lacks 'sets', 'whole' or 'digests'; it must be a report of this version of "
            "loku evaluate"
        )
    common = [name for name in digests if name in report["sets"]]
    if not common:
        raise ValueError(
            f"the reference report has the sets {[*report['sets']]} and none of {[*digests]}; evaluate "
            "the same sets with both models"
        )
    for name in common:
        if report["digests"].get(name) != digests[name]:
            raise ValueError(
                f"the reference report is about other rows of the {name} set, or another tokenizer or "
                "max_length; evaluate the same rows with both models"
            )
    if {"forget", "holdout"} <= digests.keys() and _number(report["whole"].get("min_40_auc")) is None:
        raise ValueError(
            "the reference report has no 'min_40_auc', which PrivLeak takes; evaluate the retrained model on "
            "the forget and the holdout set"
        )


def relative_differences(
    figures: Mapping[str, Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Compute the ``relative_difference`` of each measure that a reference has, too, in percent.

    Args:
        figures: The measures of the unlearned model, ``{set: {measure: number}}``.
        references: Those of the retrained model.

    Returns:
        The differences, ``{set: {measure: percent}}``. A measure is left out where one of the two is missing
        or is no number, and where the retrained model's is 0.
    """
    found: dict[str, dict[str, float]] = {}
    for name, measures in figures.items():
        for measure, value in measures.items():
            ours, theirs = _number(value), _number(references.get(name, {}).get(measure))
            if measure != "rows" and ours is not None and theirs:
                found.setdefault(name, {})[measure] = relative_difference(ours, theirs)
    return found


def _number(value: Any) -> float | None:
    """Return a finite number as it is; None for anything else, such as null in a report."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if numeric and math.isfinite(value) else None

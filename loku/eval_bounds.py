"""The measures of an evaluation, and the one that joins forgetting and utility by bounds of both.

``forgotten_with_utility`` orders states of a model by limits of what must be forgotten and floors of what
must be kept. With measures m in [0, 1], limits L and floors F:

    some m_j < F_j:         -1 - max over the floors of (F_j - m_j) / F_j                in [-2, -1)
    else, some m_i > L_i:   - mean over the limits of max(0, m_i - L_i)                  in [-1, 0)
    else:                   min over the floors of m_j / F_j                             >= 1

So a state under all limits and over all floors is better than any other, and among those the one that kept
most is the best. Of the others those over the floors are better, and among them the nearest to the limits.

Extraction Likelihood generates text, so it is measured only where all other bounds hold. Elsewhere it counts
as 1, its greatest value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

EVAL_MEASURES = ("loss", "probability", "memorization_accuracy", "extraction_strength", "extracted")
JOINT_MEASURE = "forgotten_with_utility"
_LIKELIHOOD = re.compile(r"(?:(?P<set>.+)_)?extraction_likelihood_(?P<n>[1-9]\d*)", re.DOTALL)


class LikelihoodLimit(NamedTuple):
    """A limit of Extraction Likelihood.

    Attributes:
        name: The name of the measure of the set.
        set: The name of the set, "" for one without a name.
        n: The length of the n-grams, in tokens.
    """

    name: str
    set: str
    n: int


def measure_name(set_name: str, measure: str) -> str:
    """Return the name of a measure of a set; a set without a name, "", adds nothing."""
    return "_".join(filter(None, (set_name, measure)))


def check_bounds(field: str, bounds: Any) -> dict[str, float] | None:
    """Check the limits or the floors of a config, and return them with names without "eval_".

    Args:
        field: The name of the field, for the message.
        bounds: A mapping of the names of measures to numbers, or None or an empty one for no bounds.

    Raises:
        ValueError: It is no such mapping, or a number is not in [0, 1]; a floor must be above 0.
    """
    if not bounds and (bounds is None or isinstance(bounds, Mapping)):
        return None
    least = 0 if field == "eval_limits" else math.ulp(0.0)
    wanted = "from 0 to 1" if field == "eval_limits" else "> 0 and <= 1"
    valid = isinstance(bounds, Mapping) and all(
        isinstance(name, str)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and least <= value <= 1
        for name, value in bounds.items()
    )
    if not valid:
        raise ValueError(
            f"{field} must map measures of evaluation sets to numbers {wanted}, such as "
            f"{{'forget_memorization_accuracy': 0.4}}, got {bounds!r}"
        )
    return {name.removeprefix("eval_"): float(value) for name, value in bounds.items()}


def likelihood_limits(limits: Iterable[str]) -> list[LikelihoodLimit]:
    """Return the limits of Extraction Likelihood among the names of limits."""
    found = [(name, _LIKELIHOOD.fullmatch(name)) for name in limits]
    return [LikelihoodLimit(name, match["set"] or "", int(match["n"])) for name, match in found if match]


def check_bound_names(sets: Collection[str], limits: Iterable[str], floors: Iterable[str]) -> None:
    """Check that each bound is one of a measure that the evaluation has.

    Args:
        sets: The names of the evaluation sets.
        limits: The names of the limits.
        floors: The names of the floors.

    Raises:
        ValueError: A name is none of a measure of a set. A loss has no bounds in [0, 1].
    """
    names = [measure_name(name, measure) for name in sets for measure in EVAL_MEASURES if measure != "loss"]
    generated = {limit.name for limit in likelihood_limits(limits) if limit.set in sets}
    for field, bounds in (("eval_limits", limits), ("eval_floors", floors)):
        for name in bounds:
            if name not in names and not (field == "eval_limits" and name in generated):
                further = ", and extraction_likelihood_<n> of a set" if field == "eval_limits" else ""
                raise ValueError(f"{field}: {name!r} must be one of {', '.join(names)}{further}")


def joint_measure(
    measured: Mapping[str, float], limits: Mapping[str, float], floors: Mapping[str, float]
) -> float:
    """Compute ``forgotten_with_utility``; see this module for the formula.

    Args:
        measured: The measures by their names, in [0, 1]. One that a limit names and that was not measured
            counts as 1.
        limits: The greatest value of each measure of what must be forgotten; at least one.
        floors: The least value of each measure of what must be kept, > 0; at least one.

    Returns:
        The value; 1 or more if all bounds hold, and negative otherwise.
    """
    shortfall = max((floor - measured[name]) / floor for name, floor in floors.items())
    if shortfall > 0:
        return -1 - shortfall
    excess = [max(0.0, measured.get(name, 1.0) - limit) for name, limit in limits.items()]
    if any(excess):
        return -math.fsum(excess) / len(excess)
    return min(measured[name] / floor for name, floor in floors.items())

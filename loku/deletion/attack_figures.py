"""The figures of the attacks that a reader sees first: as rows of a table, and as bars.

The attacks are those of ``loku.attacks``. A figure that a record does not have is None or left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AS_IT_IS = ("not rounded", "merged")  # the roundings that round nothing


def figure_at(value: Any, *keys: str) -> float | None:
    """Return the number that some keys lead to, or None if there is none.

    Args:
        value: Nested objects.
        keys: The keys.
    """
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def headlines(attacks: Mapping[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return the main figure of each attack: what it is, before, after, and that of the comparison.

    The comparison is the hold-out set, or the retrained control.

    Args:
        attacks: The attacks of a record, by "before" and "after".
    """
    before, after = attacks.get("before") or {}, attacks.get("after") or {}
    any_way = ("extract", "sets", "forget", "any way", "whole")
    found = [
        (
            "share of the rows that some way of asking brings back word by word",
            figure_at(before, *any_way),
            figure_at(after, *any_way),
            figure_at(after, "extract", "sets", "holdout", "any way", "whole"),
        ),
        (
            "how well the loss tells the rows from the hold-out (AUC; 0.5 is a guess)",
            figure_at(before, "mia", "scores", "loss", "auc"),
            figure_at(after, "mia", "scores", "loss", "auc"),
            None,
        ),
        (
            "greatest probability of a half of the rows while the other half was trained again",
            None,
            figure_at(after, "relearn", "unlearned", "best"),
            figure_at(after, "relearn", "control", "best"),
        ),
        (
            "greatest probability of the rows after rounding",
            _after_rounding(before),
            _after_rounding(after),
            None,
        ),
    ]
    return [row for row in found if row[1:] != (None, None, None)]


def _after_rounding(attacks: Mapping[str, Any]) -> float | None:
    roundings = (attacks.get("quantise") or {}).get("roundings")
    found = [
        figure_at(sets, "forget", "probability")
        for name, sets in (roundings.items() if isinstance(roundings, dict) else ())
        if name not in _AS_IT_IS
    ]
    return max((value for value in found if value is not None), default=None)


def bars(attacks: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, dict[str, float]]]]:
    """Return the figures of the attacks that have no curve, as bars.

    Args:
        attacks: The attacks of a record, by "before" and "after".

    Returns:
        The name of the vertical axis, and the bars by series and group, by the name of the attack.
    """
    before, after = attacks.get("before") or {}, attacks.get("after") or {}
    found = {
        "extract": (
            "share of rows brought back word by word",
            {
                "rows to forget, before": _column(before, ("extract", "sets", "forget"), "whole"),
                "rows to forget, after": _column(after, ("extract", "sets", "forget"), "whole"),
                "hold-out, after": _column(after, ("extract", "sets", "holdout"), "whole"),
            },
        ),
        "mia": (
            "AUC (0.5 is a guess)",
            {
                "before": _column(before, ("mia", "scores"), "auc"),
                "after": _column(after, ("mia", "scores"), "auc"),
            },
        ),
        "quantise": (
            "mean probability of the answers",
            {
                f"{name}, after": _column(after, ("quantise", "roundings"), name, "probability")
                for name in ("forget", "retain", "holdout")
            },
        ),
    }
    kept = {}
    for name, (axis, series) in found.items():
        drawn = {label: held for label, held in series.items() if held}
        if drawn:
            kept[name] = axis, drawn
    return kept


def _column(attacks: Mapping[str, Any], keys: tuple[str, ...], *inner: str) -> dict[str, float]:
    """The number behind some inner keys of each object that an object holds."""
    value: Any = attacks
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    held = value.items() if isinstance(value, dict) else ()
    found = {name: figure_at(item, *inner) for name, item in held}
    return {name: figure for name, figure in found.items() if figure is not None}

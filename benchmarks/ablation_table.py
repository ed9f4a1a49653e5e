"""The table of ``experiments/fila_ablation.py``."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from result_files import markdown_table

Line = Mapping[str, Any]
ABLATION_STEPS = 10  # step at which the forget answers' probability shows the speed of a run
ABLATION_MEASURES = ("rank_correlation", "shuffle_correlation", "deficit", "overlap")


def fila_ablation(lines: Sequence[Line]) -> str:
    """Return a table with a row for each setting, averaged over its seeds.

    Args:
        lines: The lines of the result file. Unlearning that was not run has dashes.
    """
    settings: dict[str, list[Line]] = {}
    for line in lines:
        name = [line["fisher"]] if line["fisher"] != "per-sample" else []
        if (line["damping_mode"], line["damping"]) != ("relative", 1.0):
            name.append(f"{line['damping_mode']} damping {line['damping']:g}")
        if line["svd"] != "row_scaled_svd":
            name.append("exact SVD" if line["svd"] == "exact" else f"`{line['svd']}`")
        settings.setdefault(", ".join(name) or "as shipped", []).append(line)

    def compared(group: list[Line], measure: str) -> str:
        """Return the median over modules and, in brackets, the worst."""
        if measure not in group[0]:
            return "-"
        values = (fmean(line[key] for line in group) for key in (measure, f"worst_{measure}"))
        return "{} ({})".format(*(format(v, ".0e" if measure == "deficit" else ".2f") for v in values))

    def unlearned(group: list[Line]) -> list[str]:
        curves = [line["curve"] for line in group if line["curve"]]
        if not curves:
            return ["-"] * 5
        steps = [next((p["step"] for p in curve if p["forget_quality"] >= 0.05), None) for curve in curves]
        early = [p["forget"]["probability"] for c in curves for p in c if p["step"] == ABLATION_STEPS]
        ends = [(curve[0], curve[-1]) for curve in curves]
        return [
            ", ".join("never" if step is None else str(step) for step in steps),
            f"{fmean(early):.2f}",
            ", ".join(f"{end['forget_quality']:.2g}" for _, end in ends),
            f"{fmean(end['retain']['probability'] for _, end in ends):.3f}",
            f"{fmean(end['model_utility'] / start['model_utility'] for start, end in ends):.3f}",
        ]

    return markdown_table(
        [
            "",
            "rank correlation of row scales with those shipped",
            "with another order of rows",
            "energy deficit",
            "overlap with the subspace shipped",
            "steps to forget quality 0.05, by seed",
            f"forget probability after {ABLATION_STEPS} steps",
            "forget quality at the end, by seed",
            "retain probability at the end",
            "utility kept at the end",
        ],
        [
            [name, *(compared(group, measure) for measure in ABLATION_MEASURES), *unlearned(group)]
            for name, group in settings.items()
        ],
    )

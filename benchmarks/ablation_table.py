"""The tables of ``experiments/fila_ablation.py`` and ``experiments/fila_balance.py``."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from result_files import markdown_table

Line = Mapping[str, Any]
ABLATION_STEPS = 10  # step at which the forget answers' probability shows the speed of a run
ABLATION_MEASURES = ("rank_correlation", "shuffle_correlation", "deficit", "overlap")
FORGOTTEN = 0.1  # probability of the forget answers at which a run of the balance counts as having forgotten
BALANCES = ("normalised", "0.1", "0.01", "paper", "-")
INITS = {"fila": "FILA", "official-fila": "official FILA", "pissa": "PiSSA", "default": "default LoRA"}


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


# --- the balance ----------------------------------------------------------------------------------


def arm(line: Line) -> tuple[str, str]:
    """Return the initialisation of a run in words, and its balance as text."""
    init, balance = line["init"], str(line["fila_balance"])
    fixed = {"official-fila": "paper", "default": "-"}
    return INITS[init], fixed.get(init, balance)


def crossing(curve: Sequence[Line], name: str = "retain_probability") -> tuple[float, float] | None:
    """Return the step at which a curve falls to ``FORGOTTEN``, and another measure at that step.

    Both are interpolated between two points. None stands for a curve that stays above.

    Args:
        curve: The points of a run.
        name: The other measure, the retain probability by default.
    """
    for before, after in pairwise(curve):
        high, low = before["forget_probability"], after["forget_probability"]
        if low <= FORGOTTEN < high:
            share = (high - FORGOTTEN) / (high - low)
            step, other = (before[key] + share * (after[key] - before[key]) for key in ("step", name))
            return step, other
    return None


def balance_groups(lines: Sequence[Line]) -> dict[tuple[str, str, float], list[Line]]:
    """Return (initialisation, balance, learning rate) -> the runs of its seeds, in the order of the names."""
    groups: dict[tuple[str, str, float], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        groups.setdefault((*arm(line), line["learning_rate"]), []).append(line)
    inits = list(INITS.values())
    return dict(
        sorted(
            groups.items(), key=lambda item: (inits.index(item[0][0]), BALANCES.index(item[0][1]), item[0][2])
        )
    )


def forgetting(lines: Sequence[Line], forget: str) -> list[Line]:
    """Return the runs that forget "authors", or every other of their "rows"."""
    return [line for line in lines if line.get("forget", "authors") == forget]


def fila_balance(lines: Sequence[Line]) -> str:
    """Return a table with a row for each initialisation, balance and learning rate, over its seeds."""

    def row(key: tuple[str, str, float], group: list[Line]) -> list[str]:
        found = [crossing(line["curve"]) for line in group]
        ends = [line["curve"][-1] for line in group]
        reached = [pair for pair in found if pair is not None]
        return [
            *key[:2],
            f"{key[2]:g}",
            f"{fmean(line['step_size'] * line['learning_rate'] for line in group):.2f}",
            ", ".join("-" if pair is None else f"{pair[0]:.1f}" for pair in found),
            f"{fmean(retain for _, retain in reached):.3f}" if len(reached) == len(found) else "-",
            ", ".join(f"{end['forget_quality']:.2g}" for end in ends),
            f"{fmean(end['retain_probability'] for end in ends):.3f}",
        ]

    return markdown_table(
        [
            "initialisation",
            "balance",
            "learning rate",
            "size of the first step",
            f"steps to a forget probability of {FORGOTTEN}, by seed",
            "retain probability then",
            "forget quality at the end, by seed",
            "retain probability at the end",
        ],
        [row(key, group) for key, group in balance_groups(forgetting(lines, "authors")).items()],
    )


def fila_overlap(lines: Sequence[Line]) -> str:
    """Return the table of the runs that forget every other row, with the rows between, by seed."""

    def row(key: tuple[str, str, float], group: list[Line]) -> list[str]:
        found = [
            [crossing(line["curve"], f"{name}_probability") for line in group]
            for name in ("neighbour", "retain")
        ]
        return [
            *key[:2],
            f"{key[2]:g}",
            ", ".join("-" if pair is None else f"{pair[0]:.1f}" for pair in found[0]),
            *(", ".join("-" if pair is None else f"{pair[1]:.2f}" for pair in pairs) for pairs in found),
            ", ".join(f"{line['curve'][-1]['neighbour_probability']:.2f}" for line in group),
        ]

    return markdown_table(
        [
            "initialisation",
            "balance",
            "learning rate",
            f"steps to a forget probability of {FORGOTTEN}, by seed",
            "probability of the rows between, then",
            "probability of other authors, then",
            "probability of the rows between, at the end",
        ],
        [row(key, group) for key, group in balance_groups(forgetting(lines, "rows")).items()],
    )

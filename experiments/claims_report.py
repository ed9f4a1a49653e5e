"""Tables and pictures of the results of ``experiments/claims.py``.

    python experiments/claims_report.py [experiments/results/claims.jsonl]

The files are written beside the result file, with its name: ``.md``, ``_tradeoff.png`` (forget quality
against the retain probability by epoch) and ``_equal_quality.png`` (the retain probability at equal forget
quality). For each forget set ``.md`` has these tables. Intervals are of 95%, by a bootstrap over seeds and
retained authors. All runs have the same authors, so a resample takes the same ones from each. With one seed
the interval is that of the authors alone. Forget rows are of too few authors for intervals.

- The table of ``tofu_report.py``: a row for each setting at its best learning rate, over seeds.
- Equal forget quality. The retain probabilities of a run are interpolated to the moment at which its forget
  quality first passes ``FORGOTTEN``, linearly between two measured epochs in the logarithm of the quality.
  The picture has each setting at the learning rate at which most seeds get there, and of these the one with
  the highest retain probability. That rate is bold in the table. The intervals know nothing of this choice.
  Many runs go through a dip and recover, so the last columns have the measured epoch of the highest retain
  probability whose quality is at least that.
- FILA against PiSSA, which is FILA without the Fisher information: the differences of runs of IHL of equal
  balance, learning rate and seeds, at each measured epoch.
- Collapse: the lowest shares of the retain probability and of utility that a setting keeps, at each rate.
- Robustness of the attacked epochs: relearning and rounding.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bootstrap import Values, interval, mean_of, shown_interval
from grid import RESULTS, Group, Run, grouped, report_command, varied_fields
from shared import result_files
from tofu_report import (
    FORGOTTEN,
    KEPT,
    MEASURED,
    PANEL_TITLES,
    Point,
    draw_tradeoff,
    quality,
    shown,
    table,
    utility_of,
)

from loku.data.files import read_rows

COMPARED = ("method", "init", "fila_balance")
BASELINE = ("ihl", "default")  # method and initialisation with which the others are compared
COLLAPSED = 0.5  # share of the retain probability before unlearning under which a run has collapsed

# What the tables of the written file show.
BEST_TEXT = (
    "A row has a setting at its best learning rate and its best epoch. That is the epoch of the highest "
    f"forget quality among those that keep {KEPT:.0%} of model utility. Where no later epoch keeps it, it is "
    'the epoch before unlearning. So "never" beside a high forget probability says that utility was lost '
    "first."
)
EQUAL_TEXT = (
    f"The middle columns are the moment at which a forget quality of {FORGOTTEN} is first passed, "
    "interpolated between two measured epochs. The last three are the measured epoch of the highest retain "
    "probability among those that pass. Bold: the rate at which most seeds pass, and of these the one with "
    "the highest retain probability at the first passing. Intervals are a bootstrap over seeds and retained "
    "authors. They do not cover the interpolation and the choice of the rate."
)
FISHER_TEXT = (
    "FILA and PiSSA have the same balance, learning rate and seeds. They differ in the Fisher information "
    "alone."
)
ROBUSTNESS_TEXT = (
    "The attacked epoch is that of the highest retain probability among those that pass. One half of the "
    "forget rows is taught again, and the other half is measured. The control never saw the forget rows."
)


# --- tables ---------------------------------------------------------------------------------------


def by_author(point: Point, name: str) -> Values:
    """Return the answer probabilities of a set at an epoch by author."""
    found: Values = {}
    for author, probability in point["rows"][name]:
        found.setdefault(author, []).append(probability)
    return found


def settings_cells(run: Run, names: Sequence[str]) -> list[str]:
    """Return the texts of some settings."""
    return [shown(run, name) for name in names]


def passing_point(run: Run) -> Point | None:
    """Return the epoch of the highest retain probability whose forget quality is ``FORGOTTEN``, or None."""
    found = [point for point in run["curve"][1:] if quality(point) >= FORGOTTEN]
    return max(found, key=retain_probability, default=None)


class Crossing(NamedTuple):
    """The moment at which a run first has the forget quality ``FORGOTTEN``, between two epochs.

    Attributes:
        epoch: The epoch, interpolated.
        forget: The forget probability then.
        retain: The probabilities of the retained rows then, by author.
        utility: The share of model utility kept at the later epoch.
    """

    epoch: float
    forget: float
    retain: Values
    utility: float


def crossing(run: Run) -> Crossing | None:
    """Return the ``Crossing`` of a run, or None if it never forgets."""
    for before, after in pairwise(run["curve"]):
        low, high = math.log(quality(before)), math.log(quality(after))
        if low < math.log(FORGOTTEN) <= high:
            share = (math.log(FORGOTTEN) - low) / (high - low)

            def between(x: float, y: float, share: float = share) -> float:
                return x + share * (y - x)

            starts, ends = by_author(before, "retain"), by_author(after, "retain")
            return Crossing(
                between(before["epoch"], after["epoch"]),
                between(before["forget"]["probability"], after["forget"]["probability"]),
                {author: [*map(between, starts[author], ends[author])] for author in starts},
                after["model_utility"] / run["curve"][0]["model_utility"],
            )
    return None


def passing_points(group: Group) -> list[Point]:
    """Return the ``passing_point`` of each run that has one."""
    return [point for run in group if (point := passing_point(run)) is not None]


def crossings(group: Group) -> list[Crossing]:
    """Return the ``crossing`` of each run that has one."""
    return [found for run in group if (found := crossing(run)) is not None]


def rates_by_setting(runs: Sequence[Run]) -> list[list[Group]]:
    """Return the runs of each learning rate of each setting."""
    settings = grouped(runs, MEASURED, "seed", "learning_rate").values()
    return [list(grouped(group, MEASURED, "seed").values()) for group in settings]


def rates_at_equal_quality(runs: Sequence[Run]) -> list[Group]:
    """Return the runs of each setting at the rate at which most seeds forget, and then retain most."""

    def rank(group: Group) -> tuple[int, float]:
        found = crossings(group)
        return len(found), mean_of([at.retain for at in found]) if found else 0.0

    return [max(rates, key=rank) for rates in rates_by_setting(runs)]


def is_baseline(group: Group) -> bool:
    """Whether runs are of ``BASELINE``."""
    return (group[0]["method"], group[0]["init"]) == BASELINE


def baseline_of(group: Group, groups: Sequence[Group]) -> list[Values] | None:
    """Return the retain probabilities of ``BASELINE`` with the other settings of a group, or None."""
    free = (*COMPARED, "method_args", "learning_rate", "seed")
    (others,) = grouped(group, MEASURED, *free)
    for candidate in groups:
        if is_baseline(candidate) and others in grouped(candidate, MEASURED, *free):
            return [at.retain for at in crossings(candidate)] or None
    return None


def equal_quality_table(runs: Sequence[Run]) -> str:
    """Return the Markdown table of the settings at equal forget quality, the best first.

    Args:
        runs: The runs of one forget set.
    """
    best_rates = rates_at_equal_quality(runs)
    settings = rates_by_setting(runs)
    groups = [(group, len(rates) > 1) for rates in settings for group in rates]
    varied = varied_fields([group for group, _ in groups], MEASURED, "seed", "learning_rate", *COMPARED)
    names = [*COMPARED, *varied]
    rows = []
    for group, has_others in groups:
        found = crossings(group)
        rate = f"{group[0]['learning_rate']:g}"
        chosen = has_others and bool(found) and group in best_rates
        cells = [*settings_cells(group[0], names), f"**{rate}**" if chosen else rate]
        cells.append(f"{len(found)} of {len(group)}")
        if not found:
            rows.append((0.0, [*cells, *["-"] * 8]))
            continue
        retained = [at.retain for at in found]
        best = passing_points(group)
        baseline = baseline_of(group, best_rates)
        own = is_baseline(group) and group in best_rates
        cells += [
            ", ".join(f"{at.epoch:.1f}" for at in found),
            f"{mean(at.forget for at in found):.3f}",
            shown_interval(retained),
            "-" if own or baseline is None else shown_interval(retained, baseline),
            f"{mean(at.utility for at in found):.3f}",
            ", ".join(str(point["epoch"]) for point in best),
            ", ".join(f"{quality(point):.2g}" for point in best),
            shown_interval([by_author(point, "retain") for point in best]),
        ]
        rows.append((mean_of(retained), cells))
    header = [
        *(name.replace("_", " ") for name in names),
        "learning rate",
        "seeds that forget",
        "epochs",
        "forget probability",
        "retain probability (95%)",
        f"minus that of {', '.join(BASELINE)} (95%)",
        "utility kept at the next measured epoch",
        "best epochs",
        "forget quality then",
        "retain probability then (95%)",
    ]
    return result_files.markdown_table(header, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])


def fisher_table(runs: Sequence[Run]) -> str | None:
    """Return the Markdown table of FILA minus PiSSA in runs of IHL, or None without such runs."""
    rows = []
    ihl = [run for run in runs if run["method"] == "ihl"]
    for group in grouped(ihl, MEASURED, "seed", "init").values():
        arms = {
            name: {run["seed"]: run for run in group if run["init"] == name} for name in ("fila", "pissa")
        }
        seeds = sorted(arms["fila"].keys() & arms["pissa"].keys())
        if not seeds:
            continue
        curves = [[arms[name][seed]["curve"] for seed in seeds] for name in ("fila", "pissa")]
        for at in range(1, len(curves[0][0])):
            fila, pissa = ([curve[at] for curve in of_arm] for of_arm in curves)
            rows.append(
                [
                    str(group[0]["fila_balance"]),
                    f"{group[0]['learning_rate']:g}",
                    str(len(seeds)),
                    str(fila[0]["epoch"]),
                    *(
                        ", ".join(f"{point['forget']['probability']:.3f}" for point in points)
                        for points in (fila, pissa)
                    ),
                    *(", ".join(f"{quality(point):.2g}" for point in points) for points in (fila, pissa)),
                    shown_interval(
                        *([by_author(point, "retain") for point in points] for points in (fila, pissa)),
                        paired=True,
                    ),
                ]
            )
    header = [
        "balance",
        "learning rate",
        "seeds",
        "epoch",
        "forget probability of FILA, by seed",
        "of PiSSA",
        "forget quality of FILA, by seed",
        "of PiSSA",
        "retain probability of FILA minus that of PiSSA (95%)",
    ]
    return result_files.markdown_table(header, rows) if rows else None


def collapse_table(runs: Sequence[Run]) -> str:
    """Return the Markdown table of the lowest shares kept over epochs and seeds, by learning rate."""
    rates = sorted({run["learning_rate"] for run in runs})
    rows = []
    for group in grouped(runs, MEASURED, "seed", "learning_rate").values():
        cells = settings_cells(group[0], COMPARED)
        for rate in rates:
            curves = [run["curve"] for run in group if run["learning_rate"] == rate]
            lowest = [
                min((measure(point) / measure(curve[0]) for curve in curves for point in curve), default=None)
                for measure in (retain_probability, utility_of)
            ]
            text = ", ".join(f"{share:.2f}" for share in lowest if share is not None)
            collapsed = lowest[0] is not None and lowest[0] < COLLAPSED
            cells.append(f"**{text}**" if collapsed else text)
        rows.append(cells)
    header = [*(name.replace("_", " ") for name in COMPARED), *(f"{rate:g}" for rate in rates)]
    return result_files.markdown_table(header, sorted(rows))


def figures_of(group: Group, *path: str) -> str:
    """Return the mean of a figure of robustness over the runs that have it, or "-"."""
    values = []
    for run in group:
        value: Any = run["robustness"]
        for name in path:
            value = None if value is None else value.get(name)
        if value is not None:
            values.append(value)
    return f"{mean(values):.3f}" if values else "-"


def robustness_table(groups: Sequence[Group]) -> str:
    """Return a Markdown table of the attacked epochs of settings: probabilities, relearning and rounding."""
    names = [*COMPARED, *varied_fields(groups, MEASURED, "seed", "learning_rate", *COMPARED)]
    rows = []
    for group in groups:
        points = passing_points(group)
        rows.append(
            [
                *settings_cells(group[0], names),
                f"{group[0]['learning_rate']:g}",
                ", ".join(str(point["epoch"]) for point in points),
                f"{mean(point['forget']['probability'] for point in points):.3f}",
                f"{mean(map(retain_probability, points)):.3f}",
                figures_of(group, "relearning", "before"),
                figures_of(group, "relearning", "best"),
                figures_of(group, "control", "best"),
                figures_of(group, "rounded", "4 bits", "forget"),
                figures_of(group, "rounded", "4 bits", "retain"),
            ]
        )
    header = [
        *(name.replace("_", " ") for name in names),
        "learning rate",
        "epochs",
        "forget probability",
        "retain probability",
        "the half that is not taught",
        "the same, relearned",
        "the same of the control",
        "4 bits: forget probability",
        "4 bits: retain probability",
    ]
    return result_files.markdown_table(header, rows)


# --- pictures and files ---------------------------------------------------------------------------


def retain_probability(point: Point) -> float:
    """Return the mean answer probability of the retained rows."""
    return point["retain"]["probability"]


def draw_equal_quality(path: Path, groups: Sequence[Group], panel_field: str) -> None:
    """Draw the retain probability at equal forget quality with its interval, a panel for each forget set."""
    from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process

    values = sorted({group[0][panel_field] for group in groups})
    figure = Figure(figsize=(4.8 * len(values) + 1.6, 4.4), layout="constrained")
    figure.suptitle(f"Retain probability at a forget quality of {FORGOTTEN}, with 95% intervals")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for panel, value in zip(panels, values, strict=True):
        drawn = sorted(
            (
                interval([at.retain for at in found]),
                label_of(group[0]),
                interval([by_author(point, "retain") for point in passing_points(group)]),
            )
            for group in groups
            if group[0][panel_field] == value and (found := crossings(group))
        )
        for number, (title, shape) in enumerate((("first passing", "o"), ("best epoch that passes", "s"))):
            for at, row in enumerate(drawn):
                center, low, high = row[2 * number]
                ends = [[max(center - low, 0.0)], [max(high - center, 0.0)]]  # rounding may exchange them
                look: dict[str, Any] = {"fmt": shape, "color": f"C{number}", "capsize": 3}
                label = None if at else title
                panel.errorbar(center, at - 0.2 * number, xerr=ends, label=label, **look)
        if drawn:
            panel.legend(fontsize="small")
        panel.set_yticks(range(len(drawn)), [label for _, label, _ in drawn])
        panel.set(title=PANEL_TITLES[panel_field].format(value), xlabel="retain probability")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def label_of(run: Run) -> str:
    """Return the settings of ``COMPARED`` and the learning rate as one text."""
    settings = [text for text in settings_cells(run, COMPARED) if text not in ("-", "normalised")]
    return ", ".join([*settings, f"{run['learning_rate']:g}"])


def description(facts: dict[str, Any]) -> str:
    """Return a text on the model of a result file."""
    template = f"question template `{facts['question_template']!r}`"
    if "epochs" not in facts:
        return f"{facts['base']}, {template}"
    return (
        f"{facts['base']}, fine-tuned on {facts['rows']} rows in {facts['epochs']:g} epochs at a learning "
        f"rate of {facts['learning_rate']:g}, {template}"
    )


def write_report(path: Path) -> None:
    """Write the tables and the pictures of the result file ``path`` beside it, and print the tables."""
    path = Path(path)
    runs = list(read_rows(path)) if path.exists() and path.stat().st_size else []
    if not runs:
        print(f"{path} has no runs: nothing to draw")
        return
    lines = [f"The model: {description(runs[0]['models'])}."]
    for size in sorted({run["forget_rows"] for run in runs}):
        chosen = [run for run in runs if run["forget_rows"] == size]
        lines += [f"## {size} rows forgotten", BEST_TEXT, table(chosen, ("fila_balance",))]
        equal = equal_quality_table(chosen)
        lines += ["### At equal forget quality", EQUAL_TEXT, equal]
        if (fisher := fisher_table(chosen)) is not None:
            lines += ["### FILA and PiSSA", FISHER_TEXT, fisher]
        lines += [
            "### Collapse",
            "The lowest shares of the retain probability and of utility that are kept over epochs and seeds, "
            f"by learning rate. Bold: a share of the retain probability under {COLLAPSED:.0%}.",
            collapse_table(chosen),
        ]
        attacked = [run for run in chosen if run["robustness"]]
        if attacked:
            attacked_groups = list(grouped(attacked, MEASURED, "seed").values())
            lines += ["### Robustness", ROBUSTNESS_TEXT, robustness_table(attacked_groups)]
    text = "\n\n".join(lines)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    groups = rates_at_equal_quality(runs)
    draw_tradeoff(
        path.with_name(f"{path.stem}_tradeoff.png"),
        groups,
        "forget_rows",
        (*COMPARED, "learning_rate"),
        retain_probability,
        "retain probability",
    )
    draw_equal_quality(path.with_name(f"{path.stem}_equal_quality.png"), groups, "forget_rows")


if __name__ == "__main__":
    report_command(__doc__, RESULTS / "claims.jsonl", write_report)

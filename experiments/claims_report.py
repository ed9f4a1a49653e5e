"""Tables and pictures of the results of ``experiments/claims.py``.

    python experiments/claims_report.py [experiments/results/claims.jsonl]

The files are written beside the result file, with its name: ``.md``, ``_tradeoff.png`` (forget quality
against the retain probability by epoch) and ``_equal_quality.png`` (the retain probability at equal forget
quality). For each forget set ``.md`` has these tables. Intervals are of 95%, by a bootstrap over seeds and
authors. All runs have the same authors, so a resample takes the same ones from each. With one seed the
interval is that of the authors alone.

- The table of ``tofu_report.py``: a row for each setting at its best learning rate, over seeds.
- Equal forget quality. A run counts at the epoch of the highest retain probability among those whose forget
  quality is at least ``FORGOTTEN``. A setting counts at its best learning rate: most of its seeds forget, and
  the mean of these epochs is highest.
- FILA against PiSSA, which is FILA without the Fisher information: the differences of runs of IHL of equal
  balance, learning rate and seeds.
- Collapse: the lowest share of the retain probability that a setting keeps, at each learning rate.
- Robustness of the epochs that count at equal forget quality: relearning and rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
from grid import RESULTS, Group, Run, grouped, report_command, varied_fields
from shared import result_files
from tofu_report import (
    FORGOTTEN,
    MEASURED,
    PANEL_TITLES,
    Point,
    draw_tradeoff,
    quality,
    table,
)

from loku.data.files import read_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPARED = ("method", "init", "fila_balance")
BASELINE = ("ihl", "default")  # method and initialisation with which the others are compared
COLLAPSED = 0.5  # share of the retain probability before unlearning under which a run has collapsed
RESAMPLES = 2000

Values = dict[int, list[float]]  # author -> the values of its rows


# --- intervals ------------------------------------------------------------------------------------


def resampled_means(
    groups: Sequence[Sequence[Values]], paired: bool = False, seed: int = 0
) -> "NDArray[np.float64]":
    """Return means of resamples, float64 (resamples, groups), by a bootstrap over runs and authors.

    Args:
        groups: For each group the values of its runs by author. All runs have the same authors.
        paired: Whether the runs of all groups are of the same seeds in the same order, so that a resample
            takes the same ones; False by default.
        seed: The seed of the resampling, 0 by default.
    """
    generator = np.random.default_rng(seed)
    authors = sorted(groups[0][0])
    # [run, author, (sum, count)] of each group
    tables = [
        np.array([[(sum(run[author]), len(run[author])) for author in authors] for run in group], np.float64)
        for group in groups
    ]
    means = np.empty((RESAMPLES, len(groups)))
    for resample in means:
        chosen = generator.integers(len(authors), size=len(authors))
        runs = generator.integers(len(tables[0]), size=len(tables[0]))
        for at, sums in enumerate(tables):
            if at and not paired:
                runs = generator.integers(len(sums), size=len(sums))
            total, count = sums[np.ix_(runs, chosen)].sum((0, 1))
            resample[at] = total / count
    return means


def mean_of(group: Sequence[Values]) -> float:
    """Return the mean over all values of some runs."""
    return mean(value for run in group for values in run.values() for value in values)


def interval(
    group: Sequence[Values], baseline: Sequence[Values] | None = None, paired: bool = False
) -> tuple[float, float, float]:
    """Return a mean and its 95% interval.

    Args:
        group: The values of runs by author.
        baseline: The runs whose mean is subtracted; None (default) for none.
        paired: As for ``resampled_means``.
    """
    if baseline is None:
        value, means = mean_of(group), resampled_means([group])[:, 0]
    else:
        value = mean_of(group) - mean_of(baseline)
        means = -np.diff(resampled_means([group, baseline], paired))[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return value, float(low), float(high)


def shown_interval(
    group: Sequence[Values], baseline: Sequence[Values] | None = None, paired: bool = False
) -> str:
    """Return ``interval`` as text."""
    sign = "" if baseline is None else "+"
    # Adding 0 leaves no "-0.000".
    value, low, high = (format(round(x, 3) + 0.0, f"{sign}.3f") for x in interval(group, baseline, paired))
    return f"{value} ({low} to {high})"


def by_author(point: Point, name: str) -> Values:
    """Return the answer probabilities of a set at an epoch by author."""
    found: Values = {}
    for author, probability in point["rows"][name]:
        found.setdefault(author, []).append(probability)
    return found


# --- tables ---------------------------------------------------------------------------------------


def settings_cells(run: Run, names: Sequence[str]) -> list[str]:
    """Return the texts of some settings. The balance is FILA's alone."""
    return [
        "-" if name == "fila_balance" and run["init"] in ("default", "official-fila") else str(run[name])
        for name in names
    ]


def forgotten_point(run: Run) -> Point | None:
    """Return the epoch of the highest retain probability whose forget quality is ``FORGOTTEN``, or None."""
    found = [point for point in run["curve"][1:] if quality(point) >= FORGOTTEN]
    return max(found, key=retain_probability, default=None)


def forgotten_points(group: Group) -> list[Point]:
    """Return the ``forgotten_point`` of each run that has one."""
    return [point for run in group if (point := forgotten_point(run)) is not None]


def rate_at_equal_quality(group: Group) -> Group:
    """Return the runs of the best rate: most seeds, most of them forget, the highest retain probability."""

    def rank(runs: Group) -> tuple[int, float, float]:
        points = forgotten_points(runs)
        retained = mean(map(retain_probability, points)) if points else 0.0
        return len(runs), len(points) / len(runs), retained

    return max(grouped(group, MEASURED, "seed").values(), key=rank)


def rates_at_equal_quality(runs: Sequence[Run]) -> list[Group]:
    """Return the runs of each setting at the rate of ``rate_at_equal_quality``."""
    return [
        rate_at_equal_quality(group) for group in grouped(runs, MEASURED, "seed", "learning_rate").values()
    ]


def equal_quality_table(runs: Sequence[Run]) -> str:
    """Return the Markdown table of the settings at equal forget quality, the best first."""
    groups = rates_at_equal_quality(runs)
    names = [*COMPARED, *varied_fields(groups, MEASURED, "seed", "learning_rate", *COMPARED)]
    points = [forgotten_points(group) for group in groups]
    baseline: list[Values] | None = None
    for group, found in zip(groups, points, strict=True):
        if (group[0]["method"], group[0]["init"]) == BASELINE and found:
            baseline = [by_author(point, "retain") for point in found]
    rows = []
    for group, found in zip(groups, points, strict=True):
        cells = [*settings_cells(group[0], names), f"{group[0]['learning_rate']:g}"]
        cells.append(f"{len(found)} of {len(group)}")
        if not found:
            rows.append((0.0, [*cells, *["-"] * 5]))
            continue
        retained = [by_author(point, "retain") for point in found]
        before = group[0]["curve"][0]["model_utility"]
        own = (group[0]["method"], group[0]["init"]) == BASELINE
        cells += [
            ", ".join(str(point["epoch"]) for point in found),
            f"{mean(point['forget']['probability'] for point in found):.3f}",
            shown_interval(retained),
            "-" if own or baseline is None else shown_interval(retained, baseline),
            f"{mean(point['model_utility'] for point in found) / before:.3f}",
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
        "utility kept",
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
        fila, pissa = ([arms[name][seed] for seed in seeds] for name in ("fila", "pissa"))
        middle = (len(fila[0]["curve"]) - 1) // 2

        def difference(name: str, at: int, fila: Group = fila, pissa: Group = pissa) -> str:
            return shown_interval(
                [by_author(run["curve"][at], name) for run in fila],
                [by_author(run["curve"][at], name) for run in pissa],
                paired=True,
            )

        cells = [str(group[0]["fila_balance"]), f"{group[0]['learning_rate']:g}", str(len(seeds))]
        cells += [difference(name, at) for name in ("forget", "retain") for at in (middle, -1)]
        cells.append(
            ", ".join(
                f"{run['curve'][-1]['forget_quality']:.2g} and {other['curve'][-1]['forget_quality']:.2g}"
                for run, other in zip(fila, pissa, strict=True)
            )
        )
        rows.append(cells)
    header = [
        "balance",
        "learning rate",
        "seeds",
        "forget probability, half-way",
        "forget probability, at the end",
        "retain probability, half-way",
        "retain probability, at the end",
        "forget quality at the end of FILA and of PiSSA, by seed",
    ]
    return result_files.markdown_table(header, rows) if rows else None


def collapse_table(runs: Sequence[Run]) -> str:
    """Return the Markdown table of the lowest and the last share of retain probability, by learning rate."""
    rates = sorted({run["learning_rate"] for run in runs})
    rows = []
    for group in grouped(runs, MEASURED, "seed", "learning_rate").values():
        cells = settings_cells(group[0], COMPARED)
        for rate in rates:
            chosen = [run for run in group if run["learning_rate"] == rate]
            if not chosen:
                cells.append("")
                continue
            shares = [
                [retain_probability(point) / retain_probability(run["curve"][0]) for point in run["curve"]]
                for run in chosen
            ]
            lowest = min(map(min, shares))
            text = f"{lowest:.2f}, {mean(share[-1] for share in shares):.2f}"
            cells.append(f"**{text}**" if lowest < COLLAPSED else text)
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


def robustness_row(group: Group, names: Sequence[str]) -> list[str]:
    """Return the cells of a setting: probabilities, relearning and rounding at the epochs that count."""
    points = forgotten_points(group)
    return [
        *settings_cells(group[0], names),
        f"{group[0]['learning_rate']:g}",
        ", ".join(str(point["epoch"]) for point in points),
        *(shown_interval([by_author(point, name) for point in points]) for name in ("forget", "retain")),
        figures_of(group, "relearning", "before"),
        figures_of(group, "relearning", "best"),
        figures_of(group, "control", "best"),
        figures_of(group, "rounded", "4 bits", "forget"),
        figures_of(group, "rounded", "4 bits", "retain"),
    ]


def robustness_table(groups: Sequence[Group]) -> str:
    """Return a Markdown table of ``robustness_row``."""
    names = [*COMPARED, *varied_fields(groups, MEASURED, "seed", "learning_rate", *COMPARED)]
    header = [
        *(name.replace("_", " ") for name in names),
        "learning rate",
        "epochs",
        "forget probability (95%)",
        "retain probability (95%)",
        "the half that is not taught",
        "the same, relearned",
        "the same of the control",
        "4 bits: forget probability",
        "4 bits: retain probability",
    ]
    return result_files.markdown_table(header, [robustness_row(group, names) for group in groups])


# --- pictures and files ---------------------------------------------------------------------------


def retain_probability(point: Point) -> float:
    """Return the mean answer probability of the retained rows."""
    return point["retain"]["probability"]


def draw_equal_quality(path: Path, groups: Sequence[Group], panel_field: str) -> None:
    """Draw the retain probability at equal forget quality with its interval, a panel for each forget set."""
    from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process

    values = sorted({group[0][panel_field] for group in groups})
    figure = Figure(figsize=(4.8 * len(values) + 1.6, 4.4), layout="constrained")
    figure.suptitle(f"Retain probability once forget quality is {FORGOTTEN}, with 95% intervals")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for panel, value in zip(panels, values, strict=True):
        drawn = []
        for group in groups:
            points = forgotten_points(group)
            if group[0][panel_field] == value and points:
                drawn.append((interval([by_author(point, "retain") for point in points]), label_of(group[0])))
        drawn.sort()
        for at, ((center, low, high), _) in enumerate(drawn):
            panel.errorbar(center, at, xerr=[[center - low], [high - center]], fmt="o", color="C0", capsize=3)
        panel.set_yticks(range(len(drawn)), [label for _, label in drawn])
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
        lines += [f"## {size} rows forgotten", table(chosen, ("fila_balance",))]
        lines += ["### At equal forget quality", equal_quality_table(chosen)]
        if (fisher := fisher_table(chosen)) is not None:
            lines += ["### FILA minus PiSSA", fisher]
        lines += [
            "### Collapse",
            "The lowest share of the retain probability kept over epochs and seeds, and the mean share at "
            f"the end, by learning rate. Bold: under {COLLAPSED:.0%}.",
            collapse_table(chosen),
        ]
        attacked = [run for run in chosen if run["robustness"]]
        if attacked:
            table_of_attacked = robustness_table(rates_at_equal_quality(attacked))
            lines += ["### Robustness at equal forget quality", table_of_attacked]
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

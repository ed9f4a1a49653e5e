"""Tables and pictures of the results of ``experiments/smollm2_tofu.py``.

    python experiments/smollm2_report.py [experiments/results/smollm2_tofu.jsonl]

The files are written beside the result file. ``smollm2_tofu.md`` has, for each forget set, the table of
``tofu_report.py``: a row for each setting at its best learning rate, over seeds, at the best epoch of each
run. The second table of a forget set has the robustness of these epochs, with 95% intervals by a bootstrap
over authors and seeds. ``smollm2_tofu_tradeoff.png`` draws forget quality against utility by epoch, and
``smollm2_tofu_rates.png`` the best forget quality by learning rate.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import numpy as np
from grid import RESULTS, Group, Run, grouped, report_command, varied_fields
from shared import result_files
from tofu_report import (
    MEASURED,
    add_legend,
    best_point,
    best_settings,
    draw_tradeoff,
    quality,
    quality_axes,
    table,
)

from loku.data.files import read_rows

COMPARED = ("method", "init", "fila_balance")
RESAMPLES = 2000


def interval(groups: Sequence[Mapping[Any, Sequence[float]]], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of values and its 95% interval, by a bootstrap over runs and over clusters in a run.

    Args:
        groups: For each run its values by cluster, such as those of each author.
        seed: The seed of the resampling, 0 by default.
    """
    generator = np.random.default_rng(seed)
    sums = [np.array([(sum(v), len(v)) for v in run.values()], dtype=np.float64) for run in groups]
    means = []
    for _ in range(RESAMPLES):
        chosen = [sums[i] for i in generator.integers(len(sums), size=len(sums))]
        total, count = np.sum(
            [run[generator.integers(len(run), size=len(run))].sum(0) for run in chosen], axis=0
        )
        means.append(total / count)
    whole, count = np.sum([run.sum(0) for run in sums], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(whole / count), float(low), float(high)


def by_author(run: Run, name: str) -> dict[Any, list[float]]:
    """Return the answer probabilities of a set at the best epoch of a run, by author."""
    found: dict[Any, list[float]] = {}
    for author, probability in run["rows"][name]:
        found.setdefault(author, []).append(probability)
    return found


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
    """Return the cells of a setting: intervals of its probabilities, relearning and rounding."""
    intervals = [interval([by_author(run, name) for run in group]) for name in ("forget", "retain")]
    return [
        *(str(group[0][name]) for name in names),
        f"{group[0]['learning_rate']:g}",
        ", ".join(str(run["best_epoch"]) for run in group),
        *(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in intervals),
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
        "best epochs",
        "forget probability (95%)",
        "retain probability (95%)",
        "relearned, the other half",
        "the same of the control",
        "4 bits: forget probability",
        "4 bits: retain probability",
    ]
    return result_files.markdown_table(header, [robustness_row(group, names) for group in groups])


def draw_rates(path: Path, runs: Sequence[Run]) -> None:
    """Draw the best forget quality that keeps utility by learning rate, with a panel for each forget set."""
    sizes = sorted({run["forget_rows"] for run in runs})
    figure, axes = quality_axes(
        len(sizes), "The best epoch that keeps 95% of utility", xlabel="learning rate", xscale="log"
    )
    labels = list(dict.fromkeys(label_of(run) for run in runs))
    for panel, size in zip(axes, sizes, strict=True):
        panel.set_title(f"{size} rows forgotten")
        for index, label in enumerate(labels):
            chosen = [run for run in runs if run["forget_rows"] == size and label_of(run) == label]
            points = sorted(
                (group[0]["learning_rate"], geometric_mean(quality(best_point(run)) for run in group))
                for group in grouped(chosen, MEASURED, "seed").values()
            )
            if points:
                rates, best = zip(*points, strict=True)
                panel.plot(rates, best, marker="o", ms=4, color=f"C{index}", label=label)
    add_legend(figure, axes)
    figure.savefig(path, dpi=130)


def label_of(run: Run) -> str:
    """Return the settings of ``COMPARED`` as one text."""
    return ", ".join(str(run[name]) for name in COMPARED)


def write_report(path: Path) -> None:
    """Write the tables and the pictures of the result file ``path`` beside it, and print the tables."""
    path = Path(path)
    runs = list(read_rows(path)) if path.exists() and path.stat().st_size else []
    if not runs:
        print(f"{path} has no runs: nothing to draw")
        return
    facts = runs[0]["models"]
    lines = [
        f"The models: {facts['base']}, fine-tuned on {facts['rows']} rows in {facts['epochs']:g} epochs at a "
        f"learning rate of {facts['learning_rate']:g}, question template "
        f"`{facts['question_template'] or 'the default'}`."
    ]
    for size in sorted({run["forget_rows"] for run in runs}):
        chosen = [run for run in runs if run["forget_rows"] == size]
        lines += [f"## {size} rows forgotten", table(chosen, ("fila_balance",))]
        lines += ["### Intervals and robustness", robustness_table(best_settings(chosen))]
    text = "\n\n".join(lines)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw_tradeoff(path.with_name(f"{path.stem}_tradeoff.png"), best_settings(runs), "forget_rows", COMPARED)
    draw_rates(path.with_name(f"{path.stem}_rates.png"), runs)


if __name__ == "__main__":
    report_command(__doc__, RESULTS / "smollm2_tofu.jsonl", write_report)

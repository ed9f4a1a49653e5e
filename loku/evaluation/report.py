"""Results as strict JSON, as a plain-text table and as a picture."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.saving.directories import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"forget": "tab:red", "retain": "tab:blue"}
BOUNDED = (
    "probability",
    "rouge",
    "truth_ratio",
    "truth_probability",
    "dialogue_f1",
    "memorization_accuracy",
    "extraction_likelihood",
    "extraction_strength",
    "knowledge_memorization",
    "verbatim_memorization",
    "repetition",
    "classifier_probability",
)


def write_report(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Write a dict as JSON that every parser accepts.

    NaN and infinities become null. Tensors and NumPy values become numbers and lists.

    Args:
        path: The file to write; its directory is made if it is missing.
        report: The dict.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def format_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a plain-text table.

    Rows come in the order in which they first appear. Numbers are shown to three significant digits or
    decimals. A missing, None or non-finite value is shown as "-".

    Args:
        columns: The table, ``{column title: {row title: value}}``.
    """
    titles = list(dict.fromkeys(title for column in columns.values() for title in column))
    cells: list[list[str]] = [["", *columns]]
    cells += [[title, *(_cell(column.get(title)) for column in columns.values())] for title in titles]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for title, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_probabilities(path: str | os.PathLike, history: Iterable[Mapping[str, Any]]) -> None:
    """Draw the mean probability of the forget and of the retain answers by optimiser step.

    Args:
        path: The PNG file to write; its directory is made if it is missing.
        history: Dicts with ``step`` and with ``forget_probability``, ``retain_probability`` or both, in
            [0, 1]. Other entries, such as the loss, are passed over.

    Raises:
        ValueError: The history has no such entry.
    """
    figure, axes = _figure(6, 3.8)
    for name, marker in [("forget", "o"), ("retain", "s")]:
        key = f"{name}_probability"
        points = {entry["step"]: entry[key] for entry in history if entry.get(key) is not None}
        if points:
            axes.plot(
                [*points], [*points.values()], color=COLORS[name], marker=marker, ms=4, label=f"{name} set"
            )
    if not axes.lines:
        raise ValueError("the history holds no 'forget_probability' or 'retain_probability' to plot")
    axes.set(
        title="What the model still knows while it unlearns",
        xlabel="optimiser step",
        ylabel="mean answer probability",
        ylim=(-0.02, 1.02),
    )
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_png(figure, path)


def plot_measures(path: str | os.PathLike, sets: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the measures that lie in [0, 1] as bars, one for each data set that has the measure.

    Args:
        path: The PNG file to write; its directory is made if it is missing.
        sets: The measures, ``{set: {measure: number}}``, as ``evaluate`` returns them. NaN and measures that
            are not bounded are passed over. The number above a bar is its value.

    Raises:
        ValueError: No measure is left to draw.
    """
    titles = dict.fromkeys(name for measures in sets.values() for name in measures)
    names = [name for name in titles if name.startswith(BOUNDED)]
    if not names:
        raise ValueError(f"there is no measure to plot; those that can be are {list(BOUNDED)}")
    figure, axes = _figure(2 + 1.5 * len(names), 4.4)
    width = 0.8 / len(sets)
    for index, (title, measures) in enumerate(sets.items()):
        at = [i + (index - (len(sets) - 1) / 2) * width for i in range(len(names))]
        heights = [float(measures.get(name, math.nan)) for name in names]
        bars = axes.bar(at, heights, width, label=f"{title} set")
        labels = ["" if math.isnan(height) else f"{height:.2f}" for height in heights]
        axes.bar_label(bars, labels, fontsize="xx-small")
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set(ylabel="value, from 0 to 1", ylim=(0, 1.08))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.suptitle("Measures of the model by data set")
    figure.legend(loc="outside lower center", ncols=min(6, len(sets)))
    _write_png(figure, path)


def plot_rank_errors(path: str | os.PathLike, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw what an adapter loses by its rank: the relative error, and the largest change of a logit.

    Args:
        path: The PNG file to write; its directory is made if it is missing.
        lines: A dict for each rank with ``rank`` and ``relative_error``, and perhaps ``sets``, the figures of
            ``loku.evaluation.answer_changes`` by data set.
    """
    ranks = [line["rank"] for line in lines]
    figure, axes = _figure(6, 3.8)
    errors = [line["relative_error"] for line in lines]
    axes.plot(ranks, errors, color="black", marker="o", ms=4, label="relative error of the adapter")
    axes.set(
        title="What an adapter loses at a smaller rank",
        xlabel="rank",
        ylabel="relative error (Frobenius norm)",
        ylim=(-0.02, max(1.02 * max(errors), 0.1)),
    )
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    names = dict.fromkeys(name for line in lines for name in line.get("sets", ()))
    if names:
        right = axes.twinx()
        for name, marker in zip(names, itertools.cycle("s^vD"), strict=False):
            changes = [line["sets"][name]["largest_logit_change"] for line in lines]
            color = COLORS.get(name)
            right.plot(ranks, changes, "--", color=color, marker=marker, ms=4, label=f"logits, {name} set")
        right.set(ylabel="largest change of a logit", ylim=(-0.02 * right.get_ylim()[1], right.get_ylim()[1]))
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    _write_png(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # pyplot would pick a backend
    return figure, figure.add_subplot()


def _write_png(figure: Figure, path: str | os.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # torch and NumPy, scalars included
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, (str, int)):
        return str(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"

"""Results as strict JSON, as a plain-text table and as a picture."""

import json
import math
from pathlib import Path

from loku.saving.directories import whole_file

BOUNDED = (
    "probability",
    "rouge",
    "truth_ratio",
    "dialogue_f1",
    "memorization_accuracy",
    "extraction_likelihood",
    "extraction_strength",
)


def write_report(path, report):
    """Write a dict as JSON that every parser accepts: NaN and infinities become null; tensors and NumPy
    values become numbers and lists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def format_table(columns):
    """A plain-text table of ``{column title: {row title: value}}``.

    Rows come in the order in which they first appear. Numbers are shown to three significant digits or
    decimals; a missing, None or non-finite value is shown as "-".
    """
    titles = list(dict.fromkeys(title for column in columns.values() for title in column))
    cells = [["", *columns]]
    cells += [[title, *(_cell(column.get(title)) for column in columns.values())] for title in titles]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for title, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_probabilities(path, history):
    """Draw the forget and the retain answers' mean probability by optimiser step, as a PNG.

    ``history``: dicts with ``step`` and ``forget_probability`` and/or ``retain_probability`` (in [0, 1]);
    entries with neither, such as loss logs, are passed over. Raises ``ValueError`` if nothing is left.
    """
    figure, axes = _figure(6, 3.8)
    for name, color, marker in [("forget", "tab:red", "o"), ("retain", "tab:blue", "s")]:
        key = f"{name}_probability"
        points = {entry["step"]: entry[key] for entry in history if entry.get(key) is not None}
        if points:
            axes.plot(points.keys(), points.values(), color=color, marker=marker, ms=4, label=f"{name} set")
    if not axes.lines:
        raise ValueError("the history holds no 'forget_probability' or 'retain_probability' to plot")
    axes.set(xlabel="optimiser step", ylabel="mean answer probability", ylim=(-0.02, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_png(figure, path)


def plot_measures(path, sets):
    """Draw the measures that lie in [0, 1] as bars, one for each data set, as a PNG.

    ``sets``: ``{set: {measure: number}}``, as ``evaluate`` returns; NaN and other measures are passed over.
    Raises ``ValueError`` if nothing is left.
    """
    names = dict.fromkeys(name for measures in sets.values() for name in measures)
    names = [name for name in names if name.startswith(BOUNDED)]
    if not names:
        raise ValueError(f"there is no measure to plot; those that can be are {list(BOUNDED)}")
    figure, axes = _figure(2 + 1.5 * len(names), 4)
    width = 0.8 / len(sets)
    for index, (title, measures) in enumerate(sets.items()):
        at = [i + (index - (len(sets) - 1) / 2) * width for i in range(len(names))]
        axes.bar(at, [measures.get(name, math.nan) for name in names], width, label=title)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set(ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(sets))
    _write_png(figure, path)


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: it picks a backend
    return figure, figure.add_subplot()


def _write_png(figure, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # torch and NumPy, scalars included
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _cell(value):
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, (str, int)):
        return str(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"

"""The pictures of a record: measures as bars, the training and the attacks as curves.

Equal facts give equal bytes with the same version of matplotlib.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.deletion.attack_figures import bars
from loku.deletion.markup import Picture, clean
from loku.deletion.statements import ATTACK_TITLES, measure_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "pictures"
_STATES = {"before": "before", "after": "after", "control": "retrained control"}
_COLORS = {"before": "tab:red", "after": "tab:blue", "control": "tab:gray"}
_NO_QUANTITY = ("step", "epoch", "seconds", "rows")
_MOST_PANELS = 9
_IN_A_ROW = 3


def draw_pictures(directory: Path, facts: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """Draw the pictures of a record.

    Args:
        directory: The folder of the record. The pictures go into its folder ``pictures``.
        facts: The facts, which ``validate_record`` has passed.

    Returns:
        The pictures by the part of the record: "measures", "training", "attacks.relearn" and so on. A part
        without numbers to draw has none.

    Raises:
        OSError: A picture cannot be written.
    """
    from matplotlib import style

    found: dict[str, list[Picture]] = {}
    with style.context(["default", {"text.parse_math": False}]):  # not a user's settings
        for part, name, caption, figure in _figures(facts):
            file = f"{FOLDER}/{name}.png"
            _write(figure, directory / file)
            found.setdefault(part, []).append(Picture(file, caption))
    return found


def _figures(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Figure]]:
    limits = {
        name: entry["limit"]
        for name, entry in (facts.get("limits") or {}).items()
        if entry and entry.get("limit") is not None
    }
    if figure := _bars(facts.get("measures") or {}, limits):
        caption = "Measures of the model by data set. A dashed line is the limit of the rows to forget."
        yield "measures", "measures", caption, figure
    training = facts.get("training") or {}
    floors = ((training.get("utility") or {}).get("floors")) or {}
    bounds = {f"forget_{name}": limit for name, limit in limits.items()}
    bounds |= {f"{name}_probability": floor for name, floor in floors.items() if floor is not None}
    if figure := _curves({"": training.get("history") or []}, bounds, training.get("chosen_step")):
        caption = (
            "Measures by step of the training. A dashed line is a limit of the rows to forget, or the floor "
            "of rows to keep. A dotted line is the step that was kept."
        )
        yield "training", "training", caption, figure
    attacks = facts.get("attacks") or {}
    groups = bars(attacks)
    for name, title in ATTACK_TITLES.items():
        curves = {
            f"{path} ({state})" if (attacks.get("before") or {}).get(name) else path: curve
            for state in ("before", "after")
            for path, curve in _found_curves((attacks.get(state) or {}).get(name), "")
        }
        if figure := _curves(curves, {}, None):
            yield f"attacks.{name}", f"attack_{name}", title, figure
        elif name in groups:
            yield f"attacks.{name}", f"attack_{name}", title, _grouped_bars(*groups[name])


def _found_curves(value: Any, path: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """The lists of dicts with a step, by the keys that lead to them."""
    if isinstance(value, dict):
        for key, item in value.items():
            own = "" if key == "curve" else key.replace("_", " ")
            yield from _found_curves(item, f"{path} {own}".strip())
    elif (
        isinstance(value, list) and value and all(isinstance(item, dict) and "step" in item for item in value)
    ):
        yield path, value


def _bars(measures: Mapping[str, Any], limits: Mapping[str, float]) -> Figure | None:
    """A panel for each measure, with groups of bars by data set and a bar for each model."""
    states = [state for state in _STATES if measures.get(state)]
    sets = list(dict.fromkeys(name for state in states for name in measures[state]))
    values = {
        (state, group, name): float(value)
        for state in states
        for group in sets
        for name, value in ((measures[state].get(group)) or {}).items()
        if value is not None and name not in _NO_QUANTITY
    }
    names = list(dict.fromkeys(name for _, _, name in values))[:_MOST_PANELS]
    if not names:
        return None
    figure, panels = _panels(len(names))
    width = 0.8 / len(states)
    for axes, name in zip(panels, names, strict=True):
        for index, state in enumerate(states):
            heights = [values.get((state, group, name), math.nan) for group in sets]
            at = [place + (index - (len(states) - 1) / 2) * width for place in range(len(sets))]
            _labelled_bars(axes, at, heights, width, color=_COLORS[state], label=_STATES[state])
        if name in limits:
            axes.axhline(limits[name], color="black", linestyle="--", linewidth=1, label="limit")
        drawn = [value for key, value in values.items() if key[2] == name]
        if not _is_share(drawn) and min(drawn) > 0 and max(drawn) > 100 * min(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(y=0.12)
        axes.set_xlim(-0.5, len(sets) - 0.5)
        axes.set_xticks(range(len(sets)), [_wrapped(group.replace("_", " "), 12) for group in sets])
        axes.set_title(_wrapped(measure_title(name)), fontsize="medium")
        _finish(axes, drawn)
    _legend(figure, panels)
    return figure


def _grouped_bars(axis: str, series: Mapping[str, Mapping[str, float]]) -> Figure:
    """One panel with the bars of each series, side by side in groups."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for held in series.values() for name in held))
    figure = Figure(figsize=(max(4.6, 2 + 1.3 * len(names)), 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, (label, held) in enumerate(series.items()):
        at = [place + (index - (len(series) - 1) / 2) * width for place in range(len(names))]
        _labelled_bars(axes, at, [held.get(name, math.nan) for name in names], width, label=clean(label))
    axes.set_xticks(range(len(names)), [_wrapped(name.replace("_", " "), 14) for name in names])
    axes.set_ylabel(axis, fontsize="small")
    _finish(axes, [value for held in series.values() for value in held.values()])
    _legend(figure, [axes])
    return figure


def _labelled_bars(axes: Axes, at: list[float], heights: list[float], width: float, **looks: Any) -> None:
    """Bars with their heights above them. NaN is no bar."""
    drawn = axes.bar(at, heights, width, **looks)
    axes.bar_label(drawn, list(map(_height, heights)), fontsize="x-small")


def _height(value: float) -> str:
    if math.isnan(value):
        return ""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], bounds: Mapping[str, float], mark: int | None
) -> Figure | None:
    """A panel for each quantity of some curves, with a line for each curve."""
    lines: dict[str, dict[str, dict[float, float]]] = {}
    for label, curve in curves.items():
        for entry in curve:
            for name, value in _numbers(entry):
                if isinstance(entry.get("step"), (int, float)):
                    lines.setdefault(name, {}).setdefault(label, {})[entry["step"]] = value
    names = sorted(lines, key=lambda name: name not in bounds)[:_MOST_PANELS]  # those that decide come first
    if not names:
        return None
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        for label, points in lines[name].items():
            axes.plot([*points], [*points.values()], marker="o", markersize=3, label=clean(label) or None)
        if name in bounds:
            axes.axhline(bounds[name], color="black", linestyle="--", linewidth=1, label="limit or floor")
        if mark is not None:
            axes.axvline(mark, color="black", linestyle=":", linewidth=1, label="step that was kept")
        axes.set_title(_wrapped(name.replace("_", " ").replace(".", ": ")), fontsize="medium")
        axes.set_xlabel("step", fontsize="small")
        axes.locator_params(axis="x", integer=True)
        _finish(axes, [value for points in lines[name].values() for value in points.values()])
    _legend(figure, panels)
    return figure


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in _NO_QUANTITY:
            yield f"{prefix}{key}", float(value)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, _IN_A_ROW)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.6, 3.6 * columns), 0.6 + 2.7 * rows), dpi=100, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _wrapped(title: str, width: int = 30) -> str:
    return textwrap.fill(clean(title), width, max_lines=3)


def _is_share(values: Sequence[float]) -> bool:
    return all(0 <= value <= 1 for value in values)


def _finish(axes: Axes, drawn: Sequence[float]) -> None:
    """The looks of a panel. Shares have the whole scale, so that a small change looks small."""
    if _is_share(drawn):
        axes.set_ylim(0, 1.1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize="small")


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend of all labels."""
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        lines, labels, columns = list(handles.values()), list(handles), min(3, len(handles))
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, fontsize="small")


def _write(figure: Figure, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from loku.saving.directories import whole_file

    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished, metadata={"Software": None})

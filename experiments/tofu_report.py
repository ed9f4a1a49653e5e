"""Tables and pictures of the results of ``experiments/tofu.py``.

    python experiments/tofu_report.py [experiments/results/tofu.jsonl]

The files are written beside the result file: ``tofu.md`` and three pictures of forget quality.
``tofu_tradeoff.png`` draws it against utility, with a mark for each epoch (the paper's Figure 5).
``tofu_forget_sets.png`` draws the same for each forget set. ``tofu_steps.png`` draws it by optimiser step for
each initialisation. ``tofu.md`` has these tables:

- The methods and initialisations, with a row for each setting, at its best learning rate, over seeds. A run
  counts at its best epoch: the one with the highest forget quality among those that keep ``KEPT`` of the
  utility before unlearning. The best learning rate has the best runs in this sense. The last two columns
  show the lowest mean utility of the seeds on the whole way, and the end.
- A table for each of ``ASPECTS``: the settings that differ from the first table in this aspect alone, beside
  their counterparts there.
- The steps of IHL, with a row for each initialisation, learning rate, retain weight and forget set. It shows
  the first step at which forget quality, the geometric mean over seeds, is at least ``FORGOTTEN``, at any
  utility, and the measures at that step.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import TYPE_CHECKING, Any

from grid import RESULTS, Group, Run, grouped, new_figure, report_command, usual, varied_fields
from shared import result_files

from loku.data.files import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT = 0.95  # share of the utility before unlearning that a counted epoch keeps
FORGOTTEN = 0.05  # p-value at which the test no longer tells the model from one that never saw the set
SMALLEST = 1e-30  # smaller p-values are drawn and averaged as this
MEASURED = {"curve", "seconds", "environment", "robustness", "models"}
# Settings that the first table compares.
COMPARED = ("seed", "learning_rate", "method", "init", "retain_weight")
ASPECTS = {  # heading -> the settings that a table of its own varies
    "Ranks": ("lora_rank",),
    "Target modules": ("target_modules",),
    "Full tuning": ("tuning",),
    "Forget sets": ("forget_authors", "num_train_epochs"),
}
PANEL_TITLES = {
    "init": "{} initialisation",
    "forget_authors": "{} authors forgotten",
    "forget_rows": "{} rows forgotten",
}
INIT_STYLES = {"fila": "C0-", "pissa": "C1--", "default": "C2:"}


Point = dict[str, Any]  # the measures of an epoch


def value_of(aspect: Sequence[str]) -> Callable[[Run], tuple[Any, ...]]:
    """Return a function from a run to its values of some settings."""
    return lambda run: tuple(run[name] for name in aspect)


def quality(point: Point) -> float:
    """Return the forget quality, at least ``SMALLEST``."""
    return max(point["forget_quality"], SMALLEST)


def kept(run: Run, point: Point) -> bool:
    """Whether a point has kept its utility."""
    return point["model_utility"] >= KEPT * run["curve"][0]["model_utility"]


def best_point(run: Run) -> Point:
    """Return the point that counts: the one before unlearning if no other keeps its utility."""
    return max((point for point in run["curve"] if kept(run, point)), key=quality)


def steps_to_forget(run: Run) -> int | None:
    """Return the steps until forget quality is ``FORGOTTEN`` at a kept utility, or None if it never is."""
    return next((p["step"] for p in run["curve"] if p["forget_quality"] >= FORGOTTEN and kept(run, p)), None)


def best_learning_rate(runs: Sequence[Run]) -> Group:
    """Return the runs of the best learning rate: with most seeds, then with the highest forget quality."""
    by_rate = grouped(runs, MEASURED, "seed").values()
    seeds = max(map(len, by_rate))
    return max(
        (group for group in by_rate if len(group) == seeds),
        key=lambda group: geometric_mean(quality(best_point(run)) for run in group),
    )


def best_settings(runs: Sequence[Run]) -> list[Group]:
    """Return the runs of each setting at its best learning rate."""
    return [best_learning_rate(group) for group in grouped(runs, MEASURED, "seed", "learning_rate").values()]


def alike_but(aspect: Sequence[str], runs: Sequence[Run], compared: Sequence[Run]) -> Group:
    """Return the runs that differ from the compared ones in ``COMPARED`` and some other settings alone.

    Args:
        aspect: The other settings.
        runs: The runs to choose from.
        compared: The runs of the first table.
    """
    (settings,) = grouped(compared, MEASURED, *COMPARED, *aspect)
    return grouped(runs, MEASURED, *COMPARED, *aspect)[settings]


def varying(aspect: Sequence[str], runs: Sequence[Run], compared: Sequence[Run]) -> Group:
    """Return the runs of ``alike_but`` whose method and init ran at several values of ``aspect``."""
    by_value = grouped(alike_but(aspect, runs, compared), MEASURED, "seed", "learning_rate", *aspect).values()
    return [run for group in by_value if len(set(map(value_of(aspect), group))) > 1 for run in group]


# --- tables ---------------------------------------------------------------------------------------


def shown(run: Run, name: str) -> str:
    """Return the text of a setting. Full tuning has no initialisation, and some have no balance of FILA."""
    no_init = name == "init" and run.get("tuning") == "full"
    no_balance = name == "fila_balance" and run["init"] in ("default", "official-fila")
    return "-" if no_init or no_balance else str(run[name])


def row(group: Group, varied: Sequence[str]) -> list[str]:
    """Return the cells of a setting at its best learning rate."""
    points = [best_point(run) for run in group]
    steps = [steps_to_forget(run) for run in group]
    before = group[0]["curve"][0]
    reached = [step for step in steps if step is not None]
    lasts = [run["curve"][-1] for run in group]

    def average(values: Sequence[float]) -> str:
        return f"{mean(values):.3f}"

    qualities = [quality(point) for point in points]
    spread = f" ({min(qualities):.1e} to {max(qualities):.1e})" if len(group) > 1 else ""
    return [
        *(shown(group[0], name) for name in varied),
        f"{group[0]['learning_rate']:g}",
        str(len(group)),
        f"{geometric_mean(qualities):.2e}{spread}",
        f"{mean(reached):.0f}" + (f" ({len(reached)} of {len(group)})" if len(reached) < len(group) else "")
        if reached
        else "never",
        average([point["model_utility"] / before["model_utility"] for point in points]),
        average([point["forget"]["probability"] for point in points]),
        average([point["forget"]["rouge"] for point in points]),
        average([point["retain"]["probability"] for point in points]),
        f"{min(utility for _, utility, _ in mean_curve(group)):.3f}",
        f"{geometric_mean(map(quality, lasts)):.1e}, "
        + average([last["model_utility"] / before["model_utility"] for last in lasts]),
    ]


def table(runs: Sequence[Run], aspect: tuple[str, ...] = ()) -> str:
    """Return a Markdown table with a row for each setting at its best learning rate.

    Rows are in the order of the values of ``aspect``, then of their forget quality, the best first.
    """
    groups = best_settings(runs)
    varied = [*aspect, "method", "init"]
    varied += varied_fields(groups, MEASURED, "seed", "learning_rate", *varied)
    header = [
        *(name.replace("_", " ") for name in varied),
        "learning rate",
        "seeds",
        "forget quality",
        f"steps to {FORGOTTEN} at a kept utility",
        "utility kept",
        "forget probability",
        "forget ROUGE-L",
        "retain probability",
        "lowest utility kept",
        "at the end: quality, utility kept",
    ]
    groups.sort(key=lambda group: -geometric_mean(quality(best_point(run)) for run in group))
    groups.sort(key=lambda group: value_of(aspect)(group[0]))
    return result_files.markdown_table(header, [row(group, varied) for group in groups])


def first_forgotten(group: Group) -> tuple[tuple[Point, ...], float] | None:
    """Return each run's point and the mean forget quality of the first step that reaches ``FORGOTTEN``."""
    for points in zip(*(run["curve"] for run in group), strict=False):
        if (forget := geometric_mean(map(quality, points))) >= FORGOTTEN:
            return points, forget
    return None


def steps_row(group: Group) -> list[str]:
    """Return the cells of a setting of IHL: its first forgotten step, or its last step."""
    first = group[0]
    cells = [str(first["forget_authors"]), f"{first['retain_weight']:g}"]
    cells += [f"{first['learning_rate']:g}", first["init"], str(len(group))]
    if (found := first_forgotten(group)) is None:
        points = tuple(run["curve"][-1] for run in group)
        cells += [f"not in {points[0]['step']}", "-"]
    else:
        points, forget = found
        cells += [str(points[0]["step"]), f"{forget:.2f}"]
    before = group[0]["curve"][0]["model_utility"]
    return [
        *cells,
        *(f"{mean(p[name]['probability'] for p in points):.3f}" for name in ("forget", "retain")),
        f"{mean(p['model_utility'] for p in points) / before:.3f}",
    ]


def steps_table(runs: Sequence[Run]) -> str:
    """Return a Markdown table of ``steps_row`` for all settings."""
    header = [
        "forget authors",
        "retain weight",
        "learning rate",
        "init",
        "seeds",
        f"steps to {FORGOTTEN}",
        "forget quality then",
        "forget probability then",
        "retain probability then",
        "utility kept then",
    ]
    groups = grouped(runs, MEASURED, "seed").values()
    order = value_of(("forget_authors", "retain_weight", "learning_rate"))
    return result_files.markdown_table(
        header, [steps_row(group) for group in sorted(groups, key=lambda g: order(g[0]))]
    )


# --- pictures -------------------------------------------------------------------------------------


def utility_of(point: Point) -> float:
    """Return the model utility."""
    return point["model_utility"]


def mean_curve(
    group: Group, kept_measure: Callable[[Point], float] = utility_of
) -> Iterator[tuple[int, float, float]]:
    """Yield (step, share of a measure kept, forget quality) of each epoch, averaged over seeds.

    Args:
        group: The runs of the seeds.
        kept_measure: The measure that should stay, model utility by default.
    """
    curves = [run["curve"] for run in group]
    for points in zip(*curves, strict=False):
        kept_shares = [
            kept_measure(point) / kept_measure(curve[0]) for point, curve in zip(points, curves, strict=True)
        ]
        yield points[0]["step"], mean(kept_shares), geometric_mean(map(quality, points))


def quality_axes(panels: int, title: str, **labels: Any) -> "tuple[Figure, list[Axes]]":
    """Return a figure of forget quality with a line at ``FORGOTTEN`` in each panel."""
    figure, axes = new_figure(panels, title, ylabel="forget quality (KS p-value)", yscale="log", **labels)
    for panel in axes:
        panel.axhline(FORGOTTEN, color="0.6", lw=0.8, label=f"forgotten: p = {FORGOTTEN}")
    return figure, axes


def marker_area(epoch: int) -> int:
    """Return the area of an epoch's mark, in points squared."""
    return 6 + 5 * epoch


def add_legend(figure: "Figure", axes: Sequence["Axes"], sizes: Sequence[int] = ()) -> None:
    """Add a legend beside the panels, with one entry for each label of a line and for each size of marks.

    Args:
        figure: The figure.
        axes: Its panels.
        sizes: The epochs whose size of marks is shown.
    """
    from matplotlib.lines import Line2D

    lines = {line.get_label(): line for panel in axes for line in panel.lines}
    handles = sorted(lines.values(), key=lambda line: ":" in str(line.get_label()))  # marks come last
    handles += [
        Line2D([], [], ls="", marker="o", color="0.5", ms=marker_area(epoch) ** 0.5, label=f"epoch {epoch}")
        for epoch in sizes
    ]
    figure.legend(handles=handles, fontsize="small", loc="outside right center")


def draw_tradeoff(
    path: Path,
    groups: Sequence[Group],
    panel_field: str,
    names: Sequence[str] | None = None,
    kept_measure: Callable[[Point], float] = utility_of,
    kept_name: str = "utility",
) -> None:
    """Draw forget quality against the share of a measure kept, with a panel for each value of a setting.

    Args:
        path: The picture.
        groups: The runs of each setting.
        panel_field: The setting with a panel for each value.
        names: The settings that the label of a line shows; None (default) for the method, and the
            initialisation unless it has the panels.
        kept_measure: The measure that should stay, model utility by default.
        kept_name: Its name, "utility" by default.
    """
    values = sorted({group[0][panel_field] for group in groups})
    names = names or (["method"] if panel_field == "init" else ["method", "init"])

    def label_of(group: Group) -> str:
        return ", ".join(text for name in names if (text := shown(group[0], name)) != "-")

    labels = list(dict.fromkeys(map(label_of, groups)))
    title = f"TOFU: forgetting against {kept_name}, by epoch; mean over seeds"
    figure, axes = quality_axes(len(values), title, xlabel=f"share of {kept_name} kept")
    longest = 0
    for panel, value in zip(axes, values, strict=True):
        panel.set(title=PANEL_TITLES[panel_field].format(value), xlim=(-0.05, 1.1))
        panel.axvline(KEPT, color="0.6", lw=0.8, ls=":", label=f"kept: {KEPT:.0%} of {kept_name}")
        for group in groups:
            if group[0][panel_field] != value:
                continue
            _, utility, forget = zip(*mean_curve(group, kept_measure), strict=True)
            label = label_of(group)
            color = f"C{labels.index(label)}"
            panel.plot(utility, forget, color=color, lw=1, label=label)
            epochs = [point["epoch"] for point in group[0]["curve"][: len(utility)]]
            panel.scatter(utility, forget, s=[*map(marker_area, epochs)], color=color)
            longest = max(longest, epochs[-1])
    add_legend(figure, axes, sizes=sorted({0, longest // 2, longest}))
    figure.savefig(path, dpi=130)


def draw_steps(path: Path, runs: Sequence[Run], method: str = "ihl") -> None:
    """Draw forget quality by optimiser step.

    Each learning rate has a panel, with a curve for each initialisation.
    """
    rates = sorted({run["learning_rate"] for run in runs})
    title = f"TOFU: forgetting by {method}, mean over seeds, for each initialisation of LoRA"
    figure, axes = quality_axes(len(rates), title, xlabel="optimiser step")
    for panel, rate in zip(axes, rates, strict=True):
        panel.set_title(f"learning rate {rate:g}")
        chosen = [run for run in runs if run["learning_rate"] == rate]
        for group in grouped(chosen, MEASURED, "seed").values():
            init = group[0]["init"]
            steps, _, forget = zip(*mean_curve(group), strict=True)
            panel.plot(steps, forget, INIT_STYLES[init], marker="o", ms=3, label=init)
    add_legend(figure, axes)
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """Write the table and the pictures of the result file ``path`` beside it, and print the table."""
    path = Path(path)
    runs = read_rows(path) if path.exists() else []
    runs = [run for run in runs if run["curve"][0]["forget_quality"] is not None]
    if not runs:
        print(f"{path} has no runs with a forget quality: nothing to draw")
        return
    compared = usual(runs, MEASURED, *COMPARED)
    sections = {"Methods and initialisations": table(compared)}
    for heading, aspect in ASPECTS.items():
        if section := varying(aspect, runs, compared):
            sections[heading] = table(section, aspect)
    ihl = [run for run in alike_but(ASPECTS["Forget sets"], runs, compared) if run["method"] == "ihl"]
    if ihl:
        sections["Steps of IHL"] = steps_table(ihl)
    text = "\n\n".join(f"## {heading}\n\n{section}" for heading, section in sections.items())
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)

    def picture(name: str) -> Path:
        return path.with_name(f"{path.stem}_{name}.png")

    of_one_weight = usual(compared, MEASURED, *(name for name in COMPARED if name != "retain_weight"))
    draw_tradeoff(picture("tradeoff"), best_settings(of_one_weight), "init")
    if sets := varying(ASPECTS["Forget sets"], runs, of_one_weight):
        draw_tradeoff(picture("forget_sets"), best_settings(sets), "forget_authors")
    ihl = [run for run in of_one_weight if run["method"] == "ihl"]
    if ihl:
        draw_steps(picture("steps"), ihl)


if __name__ == "__main__":
    report_command(__doc__, RESULTS / "tofu.jsonl", write_report)

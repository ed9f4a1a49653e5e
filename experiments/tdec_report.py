"""Tables and pictures of the results of ``experiments/tdec.py``.

    python experiments/tdec_report.py [experiments/results/tdec.jsonl]

The files are written beside the result file. ``tdec.md`` has a row for each setting, at its best learning
rate, over seeds. ``tdec_flops.png`` shows the perplexity of the retain set against the estimated training
FLOPs (the paper's Figure 2). ``tdec_epochs.png`` shows the epochs until the stopping rule is met, by rank and
by target modules (Figures 3 and 4). ``tdec_continual.png`` shows the Memorisation Accuracy of four forget
sets that are unlearned one after the other (Figure 6).

The best learning rate is chosen among the rates with the most seeds. It is the one at which most runs meet
the rule, and then the one with the lowest perplexity of the retain set.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from grid import RESULTS, Group, Run, grouped, new_figure, report_command, usual, varied_fields
from shared import result_files

from loku.data.files import read_rows

MEASURED = {"before", "steps", "environment"}


def forgotten(runs: Group) -> float:
    """Return the share of runs whose every forget set met the rule."""
    return mean(all(step["forgotten"] for step in run["steps"]) for run in runs)


def last(runs: Group, name: str) -> float:
    """Return the mean of a figure after the last forget set."""
    return mean(run["steps"][-1][name] for run in runs)


def total(runs: Group, name: str) -> float:
    """Return the mean of a figure's sum over forget sets."""
    return mean(sum(step[name] for step in run["steps"]) for run in runs)


def best_settings(runs: Sequence[Run]) -> list[Group]:
    """Return the runs of each setting at its best learning rate."""
    return [
        min(
            grouped(group, MEASURED, "seed").values(),
            key=lambda runs: (-len(runs), -forgotten(runs), last(runs, "retain_perplexity")),
        )
        for group in grouped(runs, MEASURED, "seed", "learning_rate").values()
    ]


def perplexity(value: float) -> str:
    """Return a perplexity as text."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"


def table(runs: Sequence[Run]) -> str:
    """Return a Markdown table with a row for each setting at its best learning rate.

    Methods are in the order of the file.
    """
    groups = best_settings(runs)
    varied = varied_fields(groups, MEASURED, "seed", "learning_rate")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    groups.sort(
        key=lambda group: (
            group[0]["tasks"],
            methods.index(group[0]["method"]),
            group[0]["target_modules"] != "qv+ffn",
            group[0]["target_modules"],
            group[0]["lora_rank"],
        )
    )
    header = [
        *(name.replace("_", " ") for name in varied),
        "learning rate",
        "seeds",
        "forgotten",
        "epochs",
        "EL10, %",
        "MA, %",
        "retain perplexity",
        "retain accuracy, %",
        "unseen perplexity",
        "training TFLOPs",
    ]
    before = runs[0]["before"]
    start = ["before", *[""] * (len(varied) + 3)]
    start += [
        f"{100 * before['extraction_likelihood'][0]:.1f}",
        f"{100 * before['memorization_accuracy'][0]:.1f}",
        perplexity(before["retain_perplexity"]),
        f"{100 * before['retain_accuracy']:.1f}",
        perplexity(before["unseen_perplexity"]),
        "",
    ]
    rows = [
        [
            *(str(group[0][name]) for name in varied),
            f"{group[0]['learning_rate']:g}",
            str(len(group)),
            f"{100 * forgotten(group):.0f}%",
            f"{total(group, 'epochs'):.1f}",
            f"{100 * mean(mean(run['steps'][-1]['extraction_likelihood']) for run in group):.1f}",
            f"{100 * mean(mean(run['steps'][-1]['memorization_accuracy']) for run in group):.1f}",
            perplexity(last(group, "retain_perplexity")),
            f"{100 * last(group, 'retain_accuracy'):.1f}",
            perplexity(last(group, "unseen_perplexity")),
            f"{total(group, 'training_flops') / 1e12:.2f}",
        ]
        for group in groups
    ]
    return result_files.markdown_table(header, [start, *rows])


# --- pictures -------------------------------------------------------------------------------------


INIT_MARKERS = {"fila": "o", "pissa": "s", "default": "^"}


def draw_flops(path: Path, groups: Sequence[Group]) -> None:
    """Draw perplexity against training FLOPs.

    A method has a colour and an initialisation has a marker, which is empty if not all runs met the rule.
    """
    figure, (axes,) = new_figure(
        1,
        "TDEC: utility against cost, mean over seeds",
        xlabel="training, TFLOPs (estimate)",
        ylabel="perplexity of the retain set",
    )
    figure.set_figwidth(6.2)
    axes.set(yscale="log")
    methods = list(dict.fromkeys(group[0]["method"] for group in groups))
    for group in sorted(groups, key=lambda group: methods.index(group[0]["method"])):
        method, init = group[0]["method"], group[0]["init"]
        color = f"C{methods.index(method)}"
        axes.scatter(
            total(group, "training_flops") / 1e12,
            last(group, "retain_perplexity"),
            marker=INIT_MARKERS.get(init, "D"),
            edgecolors=color,
            facecolors=color if forgotten(group) == 1 else "none",
            label=f"{method}, {init}" + ("" if forgotten(group) == 1 else " (not all runs forget)"),
        )
    axes.axhline(groups[0][0]["before"]["retain_perplexity"], color="0.6", lw=0.8, label="before")
    figure.legend(fontsize="x-small", loc="outside right center")
    figure.savefig(path, dpi=130)


def draw_epochs(path: Path, runs: Sequence[Run]) -> None:
    """Draw the epochs until the rule is met, by rank as lines and by target modules as bars.

    A rank is a number, so a line connects ranks. Target modules have no order. A point or a bar has a cross
    if not all runs met the rule.
    """
    names = [n for n in ("lora_rank", "target_modules") if len({run[n] for run in runs}) > 1] or ["lora_rank"]
    title = "TDEC: epochs until the stopping rule is met, mean over seeds"
    figure, panels = new_figure(len(names), title, ylabel="epochs until forgotten")
    panels[0].set_ylim(0, 1 + max(total([run], "epochs") for run in runs))
    for axes, name in zip(panels, names, strict=True):
        values = sorted({run[name] for run in runs})
        axes.set(xlabel=name.replace("_", " "), xticks=range(len(values)), xticklabels=values)
        series = {}
        for key, group in grouped(runs, MEASURED, "seed", "learning_rate", name).items():
            best_of = {best[0][name]: best for best in best_settings(group)}
            if len(best_of) > 1:
                series[f"{dict(key)['method']}, {dict(key)['init']}"] = best_of
        width = 0.8 / max(1, len(series))
        for index, (label, best_of) in enumerate(series.items()):
            points = [(values.index(value), best_of[value]) for value in values if value in best_of]
            x, y = [at for at, _ in points], [total(best, "epochs") for _, best in points]
            if name == "target_modules":
                x = [at + (index - (len(series) - 1) / 2) * width for at in x]
                axes.bar(x, y, width, color=f"C{index}", label=label)
            else:
                axes.plot(x, y, lw=1, marker="o", color=f"C{index}", label=label)
            crosses = [
                (at, top) for at, top, (_, best) in zip(x, y, points, strict=True) if forgotten(best) < 1
            ]
            if crosses:
                axes.plot(*zip(*crosses, strict=True), "kx", label="not all runs met the rule")
        if series:
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            axes.legend(handles.values(), handles, fontsize="small")
    figure.savefig(path, dpi=130)


def draw_continual(path: Path, groups: Sequence[Group]) -> None:
    """Draw a panel for each method: MA of each forget set after each step of unlearning."""
    title = "TDEC: four forget sets, unlearned one after the other; mean over seeds"
    figure, panels = new_figure(
        len(groups), title, xlabel="forget sets unlearned", ylabel="Memorisation Accuracy (share of tokens)"
    )
    for axes, group in zip(panels, groups, strict=True):
        axes.set_title(f"{group[0]['method']}, {group[0]['init']}")
        for task in range(group[0]["tasks"]):
            stages = [
                mean(stage["memorization_accuracy"][task] for stage in stages)
                for stages in zip(*([run["before"], *run["steps"]] for run in group), strict=True)
            ]
            axes.plot(stages, marker="o", ms=3, label=f"set {task + 1}")
        axes.locator_params(axis="x", integer=True)
    panels[-1].legend(fontsize="small", title="measured on")
    figure.savefig(path, dpi=130)


def write_report(path: Path) -> None:
    """Write the table and the pictures of the result file ``path`` beside it, and print the table."""
    path = Path(path)
    runs = read_rows(path) if path.exists() else []
    if not runs:
        print(f"{path} has no runs: nothing to draw")
        return
    text = table(runs)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)

    def picture(name: str) -> Path:
        return path.with_name(f"{path.stem}_{name}.png")

    single, continual = ([run for run in runs if (run["tasks"] > 1) == many] for many in (False, True))
    if single:
        compared = usual(single, MEASURED, "seed", "learning_rate", "method", "init")
        draw_flops(picture("flops"), best_settings(compared))
        draw_epochs(picture("epochs"), single)
    if continual:
        draw_continual(picture("continual"), best_settings(continual))


if __name__ == "__main__":
    report_command(__doc__, RESULTS / "tdec.jsonl", write_report)

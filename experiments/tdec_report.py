"""Tables and pictures of what ``experiments/tdec.py`` measured.

    python experiments/tdec_report.py [results/tdec.jsonl]

Writes beside the result file ``tdec.md`` (a row for each setting, at its best learning rate, over seeds)
and three pictures: ``tdec_flops.png``, perplexity of the retain set against the estimated training FLOPs
(the paper's Figure 2), ``tdec_epochs.png``, epochs until the stopping rule is met, by rank and by target
modules (Figures 3 and 4), and ``tdec_continual.png``, Memorisation Accuracy of four forget sets that are
unlearned one after the other (Figure 6).

The best learning rate is, of those that most seeds were run with, the one at which most runs meet the rule
and then the retain set's perplexity is lowest.
"""

from pathlib import Path
from statistics import mean

from grid import RESULTS, grouped, markdown_table, new_figure, report_command, usual, varied_fields

from loku.data.files import read_rows

MEASURED = {"before", "steps", "environment"}


def forgotten(runs):
    """The share of runs whose every forget set met the rule."""
    return mean(all(step["forgotten"] for step in run["steps"]) for run in runs)


def last(runs, name):
    return mean(run["steps"][-1][name] for run in runs)


def total(runs, name):
    return mean(sum(step[name] for step in run["steps"]) for run in runs)


def best_settings(runs):
    """Runs of each setting at its best learning rate."""
    return [
        min(
            grouped(group, MEASURED, "seed").values(),
            key=lambda runs: (-len(runs), -forgotten(runs), last(runs, "retain_perplexity")),
        )
        for group in grouped(runs, MEASURED, "seed", "learning_rate").values()
    ]


def perplexity(value):
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"


def table(runs):
    """Markdown: a row for each setting at its best learning rate, methods in the order of the file."""
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
    return markdown_table(header, [start, *rows])


# --- pictures -------------------------------------------------------------------------------------


INIT_MARKERS = {"fila": "o", "pissa": "s", "default": "^"}


def draw_flops(path, groups):
    """A colour for each method, a marker for each initialisation; empty where not all runs met the rule."""
    figure, (axes,) = new_figure(1, xlabel="training TFLOPs (estimate)", ylabel="retain perplexity")
    axes.set(yscale="log")
    methods = list(dict.fromkeys(group[0]["method"] for group in groups))
    for group in groups:
        method, init = group[0]["method"], group[0]["init"]
        color = f"C{methods.index(method)}"
        axes.scatter(
            total(group, "training_flops") / 1e12,
            last(group, "retain_perplexity"),
            marker=INIT_MARKERS.get(init, "D"),
            edgecolors=color,
            facecolors=color if forgotten(group) == 1 else "none",
            label=f"{method}, {init}",
        )
    axes.axhline(groups[0][0]["before"]["retain_perplexity"], color="0.6", lw=0.8, label="before")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=130)


def draw_epochs(path, runs):
    """Epochs until the rule is met by rank and by target modules; a cross where not all runs met it."""
    names = [n for n in ("lora_rank", "target_modules") if len({run[n] for run in runs}) > 1] or ["lora_rank"]
    figure, panels = new_figure(len(names), ylabel="epochs until forgotten")
    panels[0].set_ylim(0, 1 + max(total([run], "epochs") for run in runs))
    for axes, name in zip(panels, names, strict=True):
        values = sorted({run[name] for run in runs})
        axes.set(xlabel=name.replace("_", " "), xticks=range(len(values)), xticklabels=values)
        for key, group in grouped(runs, MEASURED, "seed", "learning_rate", name).items():
            points = {best[0][name]: best for best in best_settings(group)}
            if len(points) == 1:
                continue
            points = [(values.index(value), points[value]) for value in values if value in points]
            x, y = zip(*((x, total(best, "epochs")) for x, best in points), strict=True)
            (line,) = axes.plot(x, y, lw=1, label=f"{dict(key)['method']}, {dict(key)['init']}")
            for x, best in points:
                marker = "o" if forgotten(best) == 1 else "x"
                axes.plot(x, total(best, "epochs"), marker, color=line.get_color())
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def draw_continual(path, groups):
    """A panel for each method: MA of each forget set after each of them was unlearned."""
    figure, panels = new_figure(len(groups), xlabel="forget sets unlearned", ylabel="Memorisation Accuracy")
    for axes, group in zip(panels, groups, strict=True):
        axes.set_title(f"{group[0]['method']}, {group[0]['init']}")
        for task in range(group[0]["tasks"]):
            stages = [
                mean(stage["memorization_accuracy"][task] for stage in stages)
                for stages in zip(*([run["before"], *run["steps"]] for run in group), strict=True)
            ]
            axes.plot(stages, marker="o", ms=3, label=f"set {task + 1}")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def write_report(path):
    """Write the table and the pictures of the result file ``path`` beside it, and print the table."""
    path = Path(path)
    runs = read_rows(path) if path.exists() else []
    if not runs:
        print(f"{path} has no runs: nothing to draw")
        return
    text = table(runs)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)

    def picture(name):
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

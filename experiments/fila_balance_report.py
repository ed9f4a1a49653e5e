"""The picture of the results of ``experiments/fila_balance.py``.

    python experiments/fila_balance_report.py [experiments/results/fila_balance.jsonl]

``fila_balance.png`` is written beside the result file. On the left it draws the steps until the forget
answers have the probability ``FORGOTTEN`` against the size of the first step, ``step_size`` times the
learning rate. On the right it draws the retain probability at that moment against the same steps. A mark is
a run that forgets authors. The tables are in ``docs/experiments.md``.
"""

from pathlib import Path

from grid import RESULTS, report_command
from shared import ablation_table

from loku.data.files import read_rows

COLORS = {"FILA": "C0", "official FILA": "C3", "PiSSA": "C1", "default LoRA": "C2"}
MARKERS = {"normalised": "o", "0.1": "s", "0.01": "^", "paper": "D", "-": "x"}


def write_report(path: Path) -> None:
    """Draw the picture of the result file ``path`` beside it, and print the tables."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    path = Path(path)
    runs = read_rows(path) if path.exists() else []
    if not runs:
        print(f"{path} has no runs: nothing to draw")
        return
    print(ablation_table.fila_balance(runs), ablation_table.fila_overlap(runs), sep="\n\n")
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    figure.suptitle(
        f"Steps until the forget answers have a probability of {ablation_table.FORGOTTEN}; IHL, rank 8"
    )
    left, right = figure.subplots(1, 2)
    shown: dict[tuple[str, str], None] = {}
    for run in ablation_table.forgetting(runs, "authors"):
        found = ablation_table.crossing(run["curve"])
        if found is None:
            continue
        init, balance = ablation_table.arm(run)
        shown[init, balance] = None
        look = {"color": COLORS[init], "marker": MARKERS[balance], "alpha": 0.7, "s": 26}
        left.scatter(run["step_size"] * run["learning_rate"], found[0], **look)
        right.scatter(*found, **look)
    left.set(xscale="log", yscale="log", xlabel="size of the first step", ylabel="steps")
    right.set(xscale="log", xlabel="steps", ylabel="retain probability then")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20]))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    handles = [
        Line2D(
            [],
            [],
            ls="",
            color=COLORS[init],
            marker=MARKERS[balance],
            label=f"{init}, {balance}".removesuffix(", -"),
        )
        for init, balance in shown
    ]
    figure.legend(handles=handles, fontsize="small", loc="outside right center")
    figure.savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    report_command(__doc__, RESULTS / "fila_balance.jsonl", write_report)

"""The picture of ``scaling.py``: time and peak extra memory against the vocabulary."""

from collections.abc import Callable
from pathlib import Path

from result_files import Row
from tables import Result, groups

COLORS = {
    "ihl_loss in place": "#c1272d",
    "official formula": "#1f4e79",
    "lean eager": "#3b8ea5",
    "cross_entropy": "#8a6d3b",
    "copy": "#777777",
}
RESOLUTION_MIB = 1  # resolution of the measurement; smaller values are drawn there


def draw(result: Result, path: Path) -> None:
    """Draw time and peak extra memory against V, with a labelled line for each function.

    Args:
        result: The content of the result file of ``scaling.py``.
        path: The file of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep = groups(result, part="logits")
    sweep = sorted(
        (g for g in sweep if g.case["dtype"] == sweep[0].case["dtype"]), key=lambda g: g.case["vocab"]
    )
    vocab = [g.case["vocab"] for g in sweep]
    panels: dict[str, Callable[[Row], float]] = {
        "time (ms)": lambda row: row["milliseconds"],
        "peak extra memory (MiB, at least 1)": lambda row: max(
            RESOLUTION_MIB, (row["peak_extra_bytes"] or 0) / 2**20
        ),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        ends = []
        for name, color in COLORS.items():
            if name == "copy" and "memory" in title:
                continue
            values = [value(g[name]) for g in sweep]
            width = 2.4 if name == "ihl_loss in place" else 1.4
            axis.loglog(vocab, values, color=color, linewidth=width, marker="o", markersize=3)
            ends.append((values[-1], name, color))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high := 2 * high)
        gap, position = (high / low) ** 0.055, 0.0  # keeps labels apart
        for end, name, color in sorted(ends):
            position = max(end, position * gap)
            label = "ihl_loss in place (ours)" if name == "ihl_loss in place" else name
            axis.annotate(
                label,
                (vocab[-1], position),
                (6, 0),
                textcoords="offset points",
                color=color,
                va="center",
                annotation_clip=False,
            )
        axis.set_title(title.split(" (")[0], loc="left")
        axis.set(xlabel="vocabulary V (words)", ylabel=title, xlim=(vocab[0] / 1.2, vocab[-1] * 1.2))
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    case = sweep[0].case
    figure.suptitle(
        f"IHL forward and backward of {case['n']} rows of logits, {case['dtype']}, {case['threads']} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
    pyplot.close(figure)

"""README's tables under 'Measured', and the picture of growth, from the result files: no figure by hand.

    python benchmarks/report.py [--results DIR] [--readme FILE]

A table goes between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in README, where NAME is one of ``TABLES``.
The figures are those of the most threads that were measured; ``tests/test_readme.py`` makes them again.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

from harness import RESULTS, mebibytes

ABLATION = Path(__file__).parents[1] / "experiments" / "results" / "fila_ablation.jsonl"
README = Path(__file__).parents[1] / "README.md"


# --- rows -----------------------------------------------------------------------------------------


class Group(dict):
    """The rows of one comparison by name, with what they share as attributes of ``case``."""

    def __init__(self, rows):
        super().__init__((row["name"], row) for row in rows)
        self.case = rows[0]

    def time(self, name, digits=1):
        return f"{self[name]['milliseconds']:.{digits}f} ({mebibytes(self[name]['peak_extra_bytes'])})"

    def over(self, name, peer):
        """How many times faster than a peer, and the peer's memory; a dash where it was not measured."""
        if peer not in self:
            return "-"
        return f"{digits(self[name]['over'][peer])}x ({mebibytes(self[peer]['peak_extra_bytes'])})"

    def times(self, name, floor):
        return f"{self[name]['times'][floor]:.2f}"


def digits(ratio):
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def groups(result, *keys, **wanted):
    """The comparisons on the most threads whose rows have the wanted values, told apart by ``keys``."""
    rows = [row for row in result["rows"] if "milliseconds" in row]
    rows = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    parts = {}
    for row in rows:
        if row["threads"] == max(row["threads"] for row in rows):
            parts.setdefault(tuple(row.get(key) for key in ("what", "dtype", *keys)), []).append(row)
    return [Group(part) for part in parts.values()]


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case(group):
    return f"{group.case['what'].replace('x', ' x ')} {group.case['dtype']}"


# --- tables: result -> text -----------------------------------------------------------------------


def machine(result):
    environment = result["environment"]
    versions = environment["versions"]
    return (
        f"On {environment['cores']} cores of an {environment['device']} ({environment['instructions']}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}, no GPU; medians of at least 3 "
        "runs, on all cores, with our figures and the peers' taken in turn. A figure in brackets is peak "
        "extra memory in MiB; `12x (345)` is: 12 times faster than this peer, which took 345 MiB. The result "
        "files in `benchmarks/results/` have one thread, further peers and versions as well."
    )


def ihl_kernel(result):
    ours = "ihl_loss in place"
    forward = {(g.case["what"], g.case["dtype"]): g for g in groups(result, computes="forward")}
    return table(
        [
            "N x V",
            "`ihl_loss(inplace=True)`, ms",
            "over the official formula",
            "over lean eager torch",
            "over `torch.compile`",
            "over `cross_entropy`",
            "times a copy of the logits",
            "`softmax_triplet` alone, times a read",
        ],
        [
            [
                case(g),
                g.time(ours),
                g.over(ours, "official formula"),
                g.over(ours, "lean eager"),
                g.over(ours, "lean torch.compile"),
                g.over(ours, "cross_entropy"),
                g.times(ours, "copy"),
                forward[g.case["what"], g.case["dtype"]].times("softmax_triplet", "read"),
            ]
            for g in groups(result, computes="forward and backward")
        ],
    )


def linear(result):
    ours, plain = "linear_ihl_loss", "linear_cross_entropy_loss"
    return table(
        [
            "N x D x V",
            "`linear_ihl_loss`, ms",
            "times its two GEMMs alone",
            "over eager IHL",
            "`linear_cross_entropy_loss` over eager",
            "over cut-cross-entropy (torch.compile)",
            "trainable head, times frozen",
        ],
        [
            [
                case(g),
                g.time(ours, 0),
                g.times(ours, "two GEMMs"),
                g.over(ours, "eager IHL"),
                g.over(plain, "eager cross_entropy"),
                g.over(plain, "cut-cross-entropy"),
                g.times(f"{ours}, trainable", "frozen"),
            ]
            for g in groups(result)
        ],
    )


def fisher(result):
    def line(g, ours, floor, *peers):
        return [case(g), f"`{ours}`", g.time(ours), g.times(ours, floor), *(g.over(ours, p) for p in peers)]

    layers = [g for g in groups(result) if "einsum" in g]
    models = [g for g in groups(result) if "loop" in g]
    return table(
        [
            "samples x tokens x d x k",
            "",
            "ms",
            "times its floor",
            "over `einsum`, or a loop",
            "over `torch.func`",
        ],
        [line(g, "accumulate_squared_grad_", "weight-gradient GEMM", "einsum", "torch.func") for g in layers]
        + [line(g, "fisher_row_scales", "floor", "loop") + ["-"] for g in models],
    )


def fisher_memory(result):
    plain, *budgets = result["rows"]

    def beside(row):
        return "-" if row is plain else mebibytes(row["peak_extra_bytes"] - plain["peak_extra_bytes"])

    return table(
        [
            "memory budget",
            "passes over the data",
            "planned, MiB",
            "peak, MiB",
            "beside a forward and backward, MiB",
        ],
        [
            [
                row["name"],
                str(row["passes"] or "-"),
                mebibytes(row["planned_bytes"]) if row["passes"] else "-",
                mebibytes(row["peak_extra_bytes"]),
                beside(row),
            ]
            for row in (plain, *budgets)
        ],
    )


def fila(result):
    ours = "row_scaled_svd"
    quality = [row for row in result["rows"] if "deficit" in row]
    timed = groups(result, "rank")
    peers = [name for name in ("svd_lowrank", "sklearn", "scipy", "full SVD") if name in timed[0]]
    rows = []
    for rank, dtype in dict.fromkeys((g.case["rank"], g.case["dtype"]) for g in timed):
        shapes = [g for g in timed if (g.case["rank"], g.case["dtype"]) == (rank, dtype)]
        total = {name: sum(g[name]["milliseconds"] for g in shapes) for name in (ours, *peers)}
        for name in (ours, *peers):

            def worst(kind, name=name, rank=rank):
                deficits = [
                    row["deficit"]
                    for row in quality
                    if row["name"] == name and row["rank"] == rank and kind in row["what"]
                ]
                return f"{max(deficits):.0e}" if deficits else "-"

            label = f"`{name}`" if "_" in name else name
            rows.append(
                [
                    str(rank),
                    label,
                    f"{total[name] / 1e3:.2f}",
                    f"{total[name] / total['svd_lowrank']:.2f}",
                    worst("log-normal"),
                    worst("uniform"),
                    worst("embedded"),
                ]
            )
    return table(
        [
            "rank",
            "",
            "seconds for all weights",
            "times `svd_lowrank`",
            "worst deficit, log-normal scales",
            "uniform scales",
            "the embedded model's",
        ],
        rows,
    )


def unlearn(result):
    def memory(g):
        ours, official = (g[name]["peak_extra_bytes"] for name in ("loku", "official"))
        return f"{ours / official:.2f}" if ours is not None and official else "?"

    return table(
        [
            "a step on GPT-Neo-125M",
            "`UnlearnTrainer`, ms",
            "official formula on logits, ms",
            "speed",
            "memory",
        ],
        [
            [
                g.case["part"],
                g.time("loku", 0),
                g.time("official", 0),
                f"{digits(g['loku']['over']['official'])}x",
                f"{memory(g)}x",
            ]
            for g in groups(result, "part")
        ],
    )


def scaling(result):
    large = table(
        [
            "N x V, bfloat16",
            "entries",
            "`ihl_loss(inplace=True)`, ms",
            "picoseconds an entry",
            "times a read",
        ],
        [
            [
                g.case["what"].replace("x", " x "),
                f"2^{(g.case['n'] * g.case['vocab']).bit_length() - 1}",
                g.time("ihl_loss in place", 0) + (" by blocks" if g.case["calls"] > 1 else ""),
                f"{g['ihl_loss in place']['milliseconds'] * 1e9 / (g.case['n'] * g.case['vocab']):.0f}",
                g.times("ihl_loss in place", "read"),
            ]
            for g in groups(result, part="large")
        ],
    )
    from_hidden = table(
        ["N x V from hidden states", "`linear_ihl_loss`, ms", "nanoseconds a logit", "over eager IHL"],
        [
            [
                g.case["what"].replace("x", " x "),
                g.time("linear_ihl_loss"),
                f"{g['linear_ihl_loss']['milliseconds'] * 1e6 / (g.case['n'] * g.case['vocab']):.1f}",
                g.over("linear_ihl_loss", "eager IHL"),
            ]
            for g in groups(result, part="linear")[-5:]  # below, overheads count
        ],
    )
    return f"{large}\n\n{from_hidden}"


DEMO_METRICS = {
    "forget_probability": ("forget answers, probability", ".3f"),
    "retain_probability": ("retain answers, probability", ".3f"),
    "forget_rouge_l": ("forget answers, ROUGE-L", ".2f"),
    "retain_rouge_l": ("retain answers, ROUGE-L", ".2f"),
    "extraction_likelihood_10": ("Extraction Likelihood, EL10", ".4f"),
    "memorization_accuracy": ("Memorisation Accuracy", ".2f"),
    "forget_quality": ("forget quality, KS p-value", ".2f"),
    "retain_perplexity": ("retain perplexity", ".2f"),
}


def demo(result):
    runs = result["rows"]

    def cell(values, metric):
        return "-" if values[metric] is None else format(values[metric], DEMO_METRICS[metric][1])

    before = runs[0]["before"]
    lines = [
        [name, *(cell(run["after"], metric) for run in runs), cell(runs[0]["retain_only"], metric)]
        for metric, (name, _) in DEMO_METRICS.items()
    ]
    lines.append(["seconds in all", *(f"{run['seconds']['total']:.0f}" for run in runs), ""])
    return (
        f"Before, the forget answers' probability is {before['forget_probability']:.2f}, the retain answers' "
        f"{before['retain_probability']:.2f} and the forget quality {before['forget_quality']:.4f}.\n\n"
        + table(["after", *(f"seed {run['seed']}" for run in runs), "twin that never saw them"], lines)
    )


ABLATION_STEPS = 10  # after which the forget answers' probability tells how fast a run is
ABLATION_MEASURES = ("rank_correlation", "shuffle_correlation", "deficit", "overlap")


def fila_ablation(lines):
    """A row for each setting, averaged over its seeds; the unlearning that was not run is a dash."""
    settings = {}
    for line in lines:
        name = [line["fisher"]] if line["fisher"] != "per-sample" else []
        if (line["damping_mode"], line["damping"]) != ("relative", 1.0):
            name.append(f"{line['damping_mode']} damping {line['damping']:g}")
        if line["svd"] != "row_scaled_svd":
            name.append("exact SVD" if line["svd"] == "exact" else f"`{line['svd']}`")
        settings.setdefault(", ".join(name) or "as shipped", []).append(line)

    def compared(group, measure):
        """The median over modules and, in brackets, the worst."""
        if measure not in group[0]:
            return "-"
        values = (fmean(line[key] for line in group) for key in (measure, f"worst_{measure}"))
        return "{} ({})".format(*(format(v, ".0e" if measure == "deficit" else ".2f") for v in values))

    def unlearned(group):
        curves = [line["curve"] for line in group if line["curve"]]
        if not curves:
            return ["-"] * 5
        steps = [next((p["step"] for p in curve if p["forget_quality"] >= 0.05), None) for curve in curves]
        early = [p["forget"]["probability"] for c in curves for p in c if p["step"] == ABLATION_STEPS]
        ends = [(curve[0], curve[-1]) for curve in curves]
        return [
            ", ".join("never" if step is None else str(step) for step in steps),
            f"{fmean(early):.2f}",
            ", ".join(f"{end['forget_quality']:.2g}" for _, end in ends),
            f"{fmean(end['retain']['probability'] for _, end in ends):.3f}",
            f"{fmean(end['model_utility'] / start['model_utility'] for start, end in ends):.3f}",
        ]

    return table(
        [
            "",
            "rank correlation of row scales with those shipped",
            "with another order of rows",
            "energy deficit",
            "overlap with the subspace shipped",
            "steps to forget quality 0.05, by seed",
            f"forget probability after {ABLATION_STEPS} steps",
            "forget quality at the end, by seed",
            "retain probability at the end",
            "utility kept at the end",
        ],
        [
            [name, *(compared(group, measure) for measure in ABLATION_MEASURES), *unlearned(group)]
            for name, group in settings.items()
        ],
    )


TABLES = {
    "machine": ("ihl_kernel_cpu.json", machine),
    "ihl_kernel": ("ihl_kernel_cpu.json", ihl_kernel),
    "linear": ("linear_cpu.json", linear),
    "unlearn": ("unlearn_cpu.json", unlearn),
    "fisher": ("fisher_cpu.json", fisher),
    "fisher_memory": ("fisher_memory_cpu.json", fisher_memory),
    "fila": ("fila_cpu.json", fila),
    "scaling": ("scaling_cpu.json", scaling),
    "demo": ("demo.json", demo),
    "fila_ablation": (ABLATION, fila_ablation),
}


def read_result(path):
    """A result file of ``harness.write_result``, or the lines of a grid's."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def render(readme, results=RESULTS):
    """The text of README with its tables made anew."""
    for name, (file, make) in TABLES.items():
        text = make(read_result(Path(results) / file))
        readme, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, text=text: f"{match[1]}{text}\n{match[2]}",
            readme,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"README needs <!-- {name} --> and <!-- /{name} --> once, and has {count}")
    return readme


# --- picture --------------------------------------------------------------------------------------

COLORS = {
    "ihl_loss in place": "#c1272d",
    "official formula": "#1f4e79",
    "lean eager": "#3b8ea5",
    "cross_entropy": "#8a6d3b",
    "copy": "#777777",
}
RESOLUTION_MIB = 1  # of the measurement: what is less is drawn there


def draw(result, path):
    """Time and peak extra memory against V, one line for each of ours and the peers, labelled at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep = groups(result, part="logits")
    sweep = sorted(
        (g for g in sweep if g.case["dtype"] == sweep[0].case["dtype"]), key=lambda g: g.case["vocab"]
    )
    vocab = [g.case["vocab"] for g in sweep]
    panels = {
        "milliseconds": lambda row: row["milliseconds"],
        "peak extra memory, MiB (under 1: drawn at 1)": lambda row: max(
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
        gap, position = (high / low) ** 0.055, 0.0  # labels keep apart
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
        axis.set_title(title, loc="left")
        axis.set(xlabel="vocabulary V", xlim=(vocab[0] / 1.2, vocab[-1] * 1.2))
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    case = sweep[0].case
    figure.suptitle(
        f"IHL forward and backward of {case['n']} rows of logits, {case['dtype']}, {case['threads']} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    options.readme.write_text(
        render(options.readme.read_text(encoding="utf-8"), options.results), encoding="utf-8"
    )
    picture = options.results / "scaling_cpu.png"
    draw(json.loads((options.results / "scaling_cpu.json").read_text()), picture)
    print("written:", options.readme, picture)


if __name__ == "__main__":
    main()

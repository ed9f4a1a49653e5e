"""Tables of the CPU benchmarks: each function turns the content of a result file into Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from result_files import Row, markdown_table, mebibytes

Result = Mapping[str, Any]


class Group(dict[str, Row]):
    """name -> row of one comparison. ``case`` is one of the rows, for the columns that all share.

    Args:
        rows: The rows of the comparison.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__((row["name"], row) for row in rows)
        self.case = rows[0]

    def time(self, name: str, digits: int = 1) -> str:
        """Return the milliseconds of a function and its peak extra memory in MiB."""
        return f"{self[name]['milliseconds']:.{digits}f} ({mebibytes(self[name]['peak_extra_bytes'])})"

    def over(self, name: str, peer: str) -> str:
        """Return the speed over a peer and the peer's memory in MiB, or a dash if it was not measured."""
        if peer not in self:
            return "-"
        return f"{digits(self[name]['over'][peer])}x ({mebibytes(self[peer]['peak_extra_bytes'])})"

    def times(self, name: str, floor: str) -> str:
        """Return the time over the time of a floor."""
        return f"{self[name]['times'][floor]:.2f}"


def digits(ratio: float) -> str:
    """Return a ratio with two or three significant digits."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def groups(result: Result, *keys: str, **wanted: Any) -> list[Group]:
    """Return the comparisons on the largest measured number of threads.

    Args:
        result: The content of a result file.
        *keys: The columns that tell comparisons apart, besides ``what`` and ``dtype``.
        **wanted: column -> the value that rows must have.
    """
    rows = [row for row in result["rows"] if "milliseconds" in row]
    rows = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["threads"] == max(row["threads"] for row in rows):
            parts.setdefault(tuple(row.get(key) for key in ("what", "dtype", *keys)), []).append(row)
    return [Group(part) for part in parts.values()]


def case(group: Group) -> str:
    """Return the shape and the dtype of a comparison."""
    return f"{group.case['what'].replace('x', ' x ')} {group.case['dtype']}"


# --- tables --------------------------------------------------------------------------------------


def machine(result: Result) -> str:
    """Return the paragraph on the machine and on the meaning of the cells."""
    environment = result["environment"]
    versions = environment["versions"]
    return (
        f"On {environment['cores']} cores of an {environment['device']} ({environment['instructions']}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}, no GPU. Each time is the "
        "median of at least 3 runs on all cores; ours and the peers' were taken in turn. A number in "
        "brackets is peak extra memory in MiB: `12x (345)` means 12 times faster than this peer, which took "
        "345 MiB. The result files in `benchmarks/results/` also have the figures of one thread and "
        "of further peers."
    )


def ihl_kernel(result: Result) -> str:
    """Return the table of ``ihl_kernel.py``."""
    ours = "ihl_loss in place"
    forward = {(g.case["what"], g.case["dtype"]): g for g in groups(result, computes="forward")}
    return markdown_table(
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


def linear(result: Result) -> str:
    """Return the table of ``linear.py``."""
    ours, plain = "linear_ihl_loss", "linear_cross_entropy_loss"
    return markdown_table(
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


def fisher(result: Result) -> str:
    """Return the table of ``fisher.py``."""

    def line(g: Group, ours: str, floor: str, *peers: str) -> list[str]:
        return [case(g), f"`{ours}`", g.time(ours), g.times(ours, floor), *(g.over(ours, p) for p in peers)]

    layers = [g for g in groups(result) if "einsum" in g]
    models = [g for g in groups(result) if "loop" in g]
    return markdown_table(
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


def fisher_memory(result: Result) -> str:
    """Return the table of ``fisher_memory.py``."""
    plain, *budgets = result["rows"]

    def beside(row: Row) -> str:
        return "-" if row is plain else mebibytes(row["peak_extra_bytes"] - plain["peak_extra_bytes"])

    return markdown_table(
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


def fila(result: Result) -> str:
    """Return the table of ``fila.py``: time of all weights, worst deficit of each kind of scales."""
    ours = "row_scaled_svd"
    quality = [row for row in result["rows"] if "deficit" in row]
    timed = groups(result, "rank")
    peers = [name for name in ("svd_lowrank", "sklearn", "scipy", "full SVD") if name in timed[0]]
    rows = []
    for rank, dtype in dict.fromkeys((g.case["rank"], g.case["dtype"]) for g in timed):
        shapes = [g for g in timed if (g.case["rank"], g.case["dtype"]) == (rank, dtype)]
        total = {name: sum(g[name]["milliseconds"] for g in shapes) for name in (ours, *peers)}
        for name in (ours, *peers):

            def worst(kind: str, name: str = name, rank: int = rank) -> str:
                deficits = [
                    row["deficit"]
                    for row in quality
                    if row["name"] == name and row["rank"] == rank and kind in row["what"]
                ]
                return f"{max(deficits):.0e}" if deficits else "-"

            label = _code(name)
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
    return markdown_table(
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


def unlearn(result: Result) -> str:
    """Return the table of ``unlearn.py``."""

    def memory(g: Group) -> str:
        ours, official = (g[name]["peak_extra_bytes"] for name in ("loku", "official"))
        return f"{ours / official:.2f}" if ours is not None and official else "?"

    return markdown_table(
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


def host_time(result: Result) -> str:
    """Return the table of ``host_time.py``: microseconds of processor time, and times the yardstick."""
    yardstick = "eager cross_entropy"
    found = groups(result)
    ours = [name for name in found[0] if name != yardstick]

    def cell(g: Group, name: str) -> str:
        return f"{g[name]['milliseconds'] * 1e3:.0f} ({g.times(name, yardstick)})"

    return markdown_table(
        ["N x D x V", "`cross_entropy`, us", *(_code(name) for name in ours)],
        [
            [case(g), f"{g[yardstick]['milliseconds'] * 1e3:.0f}", *(cell(g, name) for name in ours)]
            for g in found
        ],
    )


def _code(name: str) -> str:
    """Return the heading of a function: its code if the name is one, with ``inplace`` as an argument."""
    name = name.replace(" in place", "(inplace=True)")
    return f"`{name}`" if "_" in name else name


def scaling(result: Result) -> str:
    """Return the two tables of ``scaling.py``: of N x V, and of V from hidden states."""
    large = markdown_table(
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
    from_hidden = markdown_table(
        ["N x V from hidden states", "`linear_ihl_loss`, ms", "nanoseconds a logit", "over eager IHL"],
        [
            [
                g.case["what"].replace("x", " x "),
                g.time("linear_ihl_loss"),
                f"{g['linear_ihl_loss']['milliseconds'] * 1e6 / (g.case['n'] * g.case['vocab']):.1f}",
                g.over("linear_ihl_loss", "eager IHL"),
            ]
            for g in groups(result, part="linear")[-5:]  # fixed costs dominate the smaller ones
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


def demo(result: Result) -> str:
    """Return the table of ``demo.py``, with a sentence on the model before unlearning."""
    runs = result["rows"]

    def cell(values: Mapping[str, float | None], metric: str) -> str:
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
        + markdown_table(
            ["after", *(f"seed {run['seed']}" for run in runs), "twin that never saw them"], lines
        )
    )

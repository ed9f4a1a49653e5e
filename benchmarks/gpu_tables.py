"""The tables of ``gpu.py``: Markdown from its result file."""

from collections.abc import Sequence
from typing import NamedTuple

from result_files import Row, markdown_table
from tables import Result, digits


class Step(NamedTuple):
    """The table of one step.

    Attributes:
        name: The name of the step in the result file.
        text: The sentence above the table.
        shape: The heading of the first column.
        ours: heading -> name of our function in the result file.
        peers: heading -> name of a peer.
        figures: heading -> (name of a function, another column of its row).
    """

    name: str
    text: str
    shape: str
    ours: dict[str, str]
    peers: dict[str, str]
    figures: dict[str, tuple[str, str]] = {}  # noqa: RUF012 - never changed


def on_backends(name: str, code: str | None = None) -> dict[str, str]:
    """Return heading -> name of a function on both GPU backends; ``code`` is the heading if not its name."""
    return {
        f"`{code or name}`, {b}": f"{name} [{key}]"
        for b, key in (("CUDA C++", "native"), ("Triton", "triton"))
    }


STEPS = [
    Step(
        "forward",
        "Forward alone on logits. The floor is a read of the logits: half the time of a copy.",
        "N x V",
        on_backends("softmax_triplet"),
        {
            "`cross_entropy`": "eager cross_entropy",
            "`cross_entropy` under `torch.compile`": "torch.compile cross_entropy",
            "quack": "quack cross_entropy",
        },
    ),
    Step(
        "fused",
        "IHL forward and backward on logits. The floor is a copy of the logits. `cross_entropy` and Liger "
        "compute another loss.",
        "N x V",
        on_backends("ihl_loss in place", "ihl_loss(inplace=True)"),
        {
            "`cross_entropy`": "eager cross_entropy",
            "Liger cross entropy": "Liger cross entropy",
            "quack": "quack cross_entropy",
            "lean eager IHL": "lean eager IHL",
            "lean IHL under `torch.compile`": "torch.compile IHL",
            "official formula": "official formula",
        },
    ),
    Step(
        "linear",
        "Losses from hidden states with a frozen head, forward and backward. The floor is the two bare "
        "GEMMs. The peers compute cross entropy.",
        "N x D x V",
        on_backends("linear_ihl_loss"),
        {
            "eager": "eager cross_entropy",
            "`torch.compile`": "torch.compile cross_entropy",
            "Liger": "Liger fused linear cross entropy",
            "Cut Cross Entropy": "Cut Cross Entropy",
        },
    ),
    Step(
        "fisher",
        "Squared per-sample gradients of a layer. The floor is the weight-gradient GEMM or a copy of the "
        "Fisher, whichever is slower.",
        "samples x tokens x d x k",
        on_backends("accumulate_squared_grad_"),
        {"`bmm`, square, sum": "bmm, square, sum"},
    ),
    Step(
        "fila",
        "Row-scaled SVD of the 224 adapted matrices of Llama-2-7B, at rank 32. The floor is the thin "
        "products alone. `torch.svd_lowrank` ran on 4 matrices of each shape, and its time is scaled to all.",
        "outputs x inputs x matrices",
        {"`row_scaled_svd`": "row_scaled_svd"},
        {"`torch.svd_lowrank`": "torch.svd_lowrank"},
        {"deficit of `row_scaled_svd`": ("row_scaled_svd", "deficit")},
    ),
]


def cell(row: Row | None) -> str:
    """Return the milliseconds of a row and, in brackets, its time over the floor."""
    if row is None:
        return "-"
    floor = "?" if row["times_floor"] is None else f"{row['times_floor']:.2f}"
    return f"{row['milliseconds']:#.3g} ({floor})".replace(". (", " (")


def fastest(case: dict[str, Row], names: Sequence[str]) -> float | None:
    """Return the shortest time of the functions that were measured, in milliseconds."""
    return min((case[name]["milliseconds"] for name in names if name in case), default=None)


def speed(case: dict[str, Row], step: Step) -> str:
    """Return the time of the fastest peer over the time of our fastest backend."""
    ours, peer = (fastest(case, list(names.values())) for names in (step.ours, step.peers))
    return "-" if ours is None or peer is None else f"{digits(peer / ours)}x"


def step_table(step: Step, rows: Sequence[Row]) -> str:
    """Return the table of one step, without columns of functions that were never measured."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["shape"], {})[row["name"]] = row
    columns = {
        heading: name
        for heading, name in (step.ours | step.peers).items()
        if any(name in case for case in cases.values())
    }
    lines = [
        [
            shape.replace("x", " x "),
            *(cell(case.get(name)) for name in columns.values()),
            speed(case, step),
            *(f"{case[name][key]:.0e}" if name in case else "-" for name, key in step.figures.values()),
        ]
        for shape, case in cases.items()
    ]
    return markdown_table([step.shape, *columns, "over the fastest peer", *step.figures], lines)


def gpu(result: Result) -> str:
    """Return the paragraph on the GPU and a table for each measured step."""
    environment, versions = result["environment"], result["environment"]["versions"]
    parts = [
        f"On one {environment['device']}, torch {versions['torch']}, Triton {versions.get('triton', '-')}, "
        "in bfloat16. A cell has the median device time in milliseconds and, in brackets, that time over the "
        f"floor. {len(result['failed'])} functions failed and {len(result['left_out'])} cases were left out. "
        f"Measured at commit {environment['commit']}."
    ]
    for step in STEPS:
        if rows := [row for row in result["rows"] if row["step"] == step.name]:
            parts += [step.text, step_table(step, rows)]
    return "\n\n".join(parts)

"""The tables of ``gpu.py``: Markdown from its result file."""

from collections.abc import Sequence
from typing import NamedTuple

from gpu_plan import data_sheet_share
from result_files import Row, markdown_table, mebibytes
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
        memory: Whether a cell has the peak extra memory.
        raced: Whether our functions do the same work, so that the fastest of them races the peers.
    """

    name: str
    text: str
    shape: str
    ours: dict[str, str]
    peers: dict[str, str]
    figures: dict[str, tuple[str, str]] = {}  # noqa: RUF012 - never changed
    memory: bool = False
    raced: bool = True


def on_backends(name: str, code: str | None = None) -> dict[str, str]:
    """Return heading -> name of a function on both GPU backends; ``code`` is the heading if not its name."""
    return {
        f"`{code or name}`, {b}": f"{name} [{key}]"
        for b, key in (("CUDA C++", "native"), ("Triton", "triton"))
    }


STEPS = [
    Step(
        "host",
        "Processor time of the host for a forward and backward of small inputs. The floor is eager "
        "`cross_entropy`.",
        "N x D x V",
        {
            f"`{name}`": name.replace("(inplace=True)", " in place")
            for name in (
                "ihl_loss",
                "ihl_loss(inplace=True)",
                "cross_entropy_loss",
                "linear_ihl_loss",
                "linear_cross_entropy_loss",
            )
        },
        {"`cross_entropy`": "eager cross_entropy"},
        raced=False,
    ),
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
        "GEMMs. The peers compute cross entropy. A cell ends with the peak extra memory in MiB.",
        "N x D x V",
        on_backends("linear_ihl_loss"),
        {
            "eager": "eager cross_entropy",
            "`torch.compile`": "torch.compile cross_entropy",
            "Liger": "Liger fused linear cross entropy",
            "Cut Cross Entropy": "Cut Cross Entropy",
            "torch's chunked `linear_cross_entropy`": "torch chunked linear_cross_entropy",
            "quack": "quack chunked linear cross entropy",
        },
        memory=True,
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
    Step(
        "step",
        "A training step of Llama-2-7B's shape with random weights, rank 32 on all linear layers. The floor "
        "is the forward and backward of the same model and loss without adapters, down to the input of the "
        "first layer. The rate counts its products alone. A cell ends with the peak extra memory in MiB.",
        "layers x width x MLP x V x forget rows x tokens",
        {"whole step": "whole step", "its forward and backward": "forward and backward"},
        {"without adapters": "without adapters"},
        memory=True,
        raced=False,
    ),
]
# The steps that are measured once, by the clock on the wall.
RUNS = {
    "initialise": "FILA initialisation of the same model: `initialize_from_row_scales`, twice in one "
    "process.",
    "run": "`loku.unlearn` of the same model, and saving. The shape ends with the rows of each set, their "
    "tokens, and the epochs.",
}


def time_of(milliseconds: float) -> str:
    """Return a time in milliseconds with three significant digits."""
    return f"{milliseconds:#.3g}".removesuffix(".")


def cell(row: Row | None, device: str, memory: bool = False) -> str:
    """Return the figures of a row.

    They are the milliseconds, their 20th and 80th percentile if they were recorded, and in brackets the time
    over the floor, the rate and its share of the data sheet, and the peak extra memory.

    Args:
        row: The row, or None.
        device: The name of the device.
        memory: Whether the memory is wanted.
    """
    if row is None:
        return "-"
    text = time_of(row["milliseconds"])
    if "milliseconds_p20" in row:
        text += f" [{time_of(row['milliseconds_p20'])}, {time_of(row['milliseconds_p80'])}]"
    parts = ["?" if row["times_floor"] is None else f"{row['times_floor']:.2f}"]
    for key, unit in (("gigabytes_per_second", "GB/s"), ("teraflops", "TFLOP/s")):
        if key in row:
            share = data_sheet_share(row, device)
            parts.append(f"{row[key]:.0f} {unit}" + ("" if share is None else f", {share:.0%}"))
    if memory:
        parts.append(f"{mebibytes(row['peak_extra_bytes'])} MiB")
    return f"{text} ({'; '.join(parts)})"


def fastest(case: dict[str, Row], names: Sequence[str]) -> float | None:
    """Return the shortest time of the functions that were measured, in milliseconds."""
    return min((case[name]["milliseconds"] for name in names if name in case), default=None)


def speed(case: dict[str, Row], step: Step) -> str:
    """Return the time of the fastest peer over the time of our fastest backend."""
    ours, peer = (fastest(case, list(names.values())) for names in (step.ours, step.peers))
    return "-" if ours is None or peer is None else f"{digits(peer / ours)}x"


def step_table(step: Step, rows: Sequence[Row], device: str) -> str:
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
            *(cell(case.get(name), device, step.memory) for name in columns.values()),
            *([speed(case, step)] if step.raced else []),
            *(f"{case[name][key]:.0e}" if name in case else "-" for name, key in step.figures.values()),
        ]
        for shape, case in cases.items()
    ]
    raced = ["over the fastest peer"] if step.raced else []
    return markdown_table([step.shape, *columns, *raced, *step.figures], lines)


def run_table(rows: Sequence[Row]) -> str:
    """Return the table of a step that is measured once: seconds and peak memory of its parts."""
    return markdown_table(
        ["shape", "", "seconds", "peak memory, GiB"],
        [
            [
                row["shape"].replace("x", " x "),
                row["name"],
                f"{row['milliseconds'] / 1e3:.2f}",
                f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else "",
            ]
            for row in rows
        ],
    )


def gpu(result: Result) -> str:
    """Return the paragraph on the GPU and a table for each measured step."""
    environment, versions = result["environment"], result["environment"]["versions"]
    device = environment["device"]
    date = f" on {environment['date']}" if "date" in environment else ""
    percentiles = any("milliseconds_p20" in row for row in result["rows"])
    parts = [
        f"On one {device}, torch {versions['torch']}, Triton {versions.get('triton', '-')}, in bfloat16. A "
        "cell has the median device time in milliseconds"
        + (", its 20th and 80th percentile in square brackets," if percentiles else "")
        + " and, in brackets, that time over the floor, then the rate and its share of the card's data "
        "sheet. The rate counts the bytes or operations of the floor alone: one read for the forward, a read "
        "and a write for forward and backward, the products. "
        f"{len(result['failed'])} functions failed and {len(result['left_out'])} cases were left out. "
        f"Measured{date} at commit {environment['commit']}."
    ]
    of_step: dict[str, list[Row]] = {}
    for row in result["rows"]:
        of_step.setdefault(row["step"], []).append(row)
    for step in STEPS:
        if rows := of_step.get(step.name):
            parts += [step.text, step_table(step, rows, device)]
    for name, text in RUNS.items():
        if rows := of_step.get(name):
            parts += [text, run_table(rows)]
    return "\n\n".join(parts)

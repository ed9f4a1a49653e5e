"""The short table of README: each kernel or stage on the CPU, beside the fastest peer in plain torch."""

from collections.abc import Sequence

from result_files import Row, markdown_table
from tables import Group, Result, case, digits, groups


def line(name: str, shape: str, group: Group, ours: str, peers: dict[str, str]) -> list[str]:
    """Return a row of the table.

    Args:
        name: The name of the kernel or stage.
        shape: The names of the sizes of the case, such as "N x V"; "" for a case that is a model.
        group: The comparison.
        ours: The name of our function.
        peers: name -> heading of the peers, of which the fastest counts.
    """
    peer = min((name for name in peers if name in group), key=lambda name: group[name]["milliseconds"])
    sizes = f"{shape} = " if shape else ""
    return [name, sizes + case(group), group.time(ours), peers[peer], group.over(ours, peer)]


def svd_line(result: Result) -> list[str]:
    """Return the row of the row-scaled SVD: all weights at the smallest rank, and the missed energy."""
    ours, peer = "row_scaled_svd", "svd_lowrank"
    timed = groups(result, "rank")
    rank, dtype = timed[0].case["rank"], timed[0].case["dtype"]
    timed = [group for group in timed if (group.case["rank"], group.case["dtype"]) == (rank, dtype)]
    total = {name: sum(group[name]["milliseconds"] for group in timed) for name in (ours, peer)}

    def missed(name: str, rows: Sequence[Row]) -> str:
        return f"{max(row['deficit'] for row in rows if (row['name'], row['rank']) == (name, rank)):.0e}"

    quality = [row for row in result["rows"] if "deficit" in row]
    return [
        "row-scaled SVD",
        f"GPT-Neo-125M, rank {rank} {dtype}; on test matrices it misses at most {missed(ours, quality)} of "
        f"the energy, the peer {missed(peer, quality)}",
        f"{total[ours]:.0f}",
        "`torch.svd_lowrank`",
        f"{digits(total[peer] / total[ours])}x",
    ]


def summary(ihl_kernel: Result, linear: Result, unlearn: Result, fisher: Result, fila: Result) -> str:
    """Return the table, and the line on the machine, from the contents of five result files."""
    logits = groups(ihl_kernel, computes="forward and backward")[0]
    layer = next(group for group in groups(fisher) if "einsum" in group)
    models = [group for group in groups(fisher) if "loop" in group]
    step = groups(unlearn, "part", part="whole step")[0]
    rows = [
        line(
            "IHL on logits, in place",
            "N x V",
            logits,
            "ihl_loss in place",
            {"official formula": "official formula", "lean eager": "lean formula"},
        ),
        line(
            "IHL from hidden states",
            "N x D x V",
            groups(linear)[0],
            "linear_ihl_loss",
            {"eager IHL": "lean formula on whole logits"},
        ),
        line(
            "training step of GPT-Neo-125M",
            "forget rows x tokens",
            step,
            "loku",
            {"official": "official formula on whole logits"},
        ),
        line(
            "Fisher of a layer",
            "samples x tokens x d x k",
            layer,
            "accumulate_squared_grad_",
            {"einsum": "`einsum`, square, sum", "torch.func": "`torch.func`"},
        ),
        *(
            line(
                "Fisher row scales of a model",
                "",
                group,
                "fisher_row_scales",
                {"loop": "sample by sample"},
            )
            for group in models[-1:]
        ),
        svd_line(fila),
    ]
    environment = ihl_kernel["environment"]
    table = markdown_table(
        ["kernel or stage", "case", "ours, ms (MiB)", "fastest in plain torch", "times as fast (its MiB)"],
        rows,
    )
    return (
        f"On {environment['cores']} cores of an {environment['device']} CPU without a GPU. Times are "
        f"medians. Brackets have the peak extra memory in MiB.\n\n{table}"
    )

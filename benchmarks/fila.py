"""FILA's decomposition: the top singular values and right singular vectors of diag(s) W, beside its peers.

    python benchmarks/fila.py [--quick] [--shape 768x768x24 ...] [--rank 16 32] [--threads N] [--output FILE]

Quality first, against a full SVD in float64: the captured-energy deficit, 1 - ||diag(s) W V||^2 over the
energy of the best subspace, and the largest relative error of S; on four spectra, and on the embedded model's
weights with their real Fisher scales. Then time, on all the weights of a shape. ``svd_lowrank`` is what the
authors' code calls. The floor is the time of the thin products alone: those of three blocks, and one with V.
"""

import argparse

import torch
from harness import interleaved_times, write_result

from loku_kernels import row_scaled_svd
from loku_kernels.lowrank import OVERSAMPLING

SHAPES = ["768x768x24", "3072x768x12", "768x3072x12"]  # GPT-Neo-125M: query and value, c_fc, c_proj
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECTRA = {
    "i^-0.5": lambda i: i**-0.5,
    "i^-0.25": lambda i: i**-0.25,
    "spikes": lambda i: torch.where(i <= 12, 3.0, 1.0),
}


def svd_lowrank(weights, scales, rank):
    """As the authors' code computes it, for a list of weights."""
    results = [
        torch.svd_lowrank(s[:, None] * w.float(), q=rank) for w, s in zip(weights, scales, strict=True)
    ]
    return torch.stack([s for _, s, _ in results]), torch.stack([v for _, _, v in results])


def full_svd(weights, scales, rank):
    results = [
        torch.linalg.svd(s[:, None] * w.float(), full_matrices=False)
        for w, s in zip(weights, scales, strict=True)
    ]
    return torch.stack([s[:rank] for _, s, _ in results]), torch.stack([v[:rank].T for *_, v in results])


def thin_products(weights, rank):
    """The products that three Krylov blocks and the values of V need, and nothing else."""
    d, k = weights[0].shape
    x, y = (torch.randn(rank + OVERSAMPLING, n, device=weights[0].device) for n in (k, d))
    for w in map(torch.Tensor.float, weights):
        for _ in range(3):
            x @ w.T
            y @ w
        y @ w
        x[:rank] @ w.T


def random_weight(d, k, spectrum):
    if spectrum == "gaussian":
        return torch.randn(d, k)
    rank = min(d, k)
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (d, k))
    return (left * SPECTRA[spectrum](torch.arange(1, rank + 1, dtype=torch.float64)) @ right.T).float()


def embedded_weights():
    """(name, weight, row scales) of the embedded model's targets, from 40 forget and 120 retain rows."""
    from torch.utils.data import DataLoader

    from loku.data import collate, padding_id, tokenize_dataset
    from loku.demo import load_model, load_rows
    from loku.importance import fisher_row_scales
    from loku.targets import default_target_modules

    model, tokenizer = load_model()
    targets = tuple(default_target_modules(model))
    modules = {
        name: m for name, m in model.named_modules() if name.endswith(targets) and hasattr(m, "weight")
    }
    loaders = [
        DataLoader(
            tokenize_dataset(rows, tokenizer),
            batch_size=8,
            collate_fn=lambda batch: collate(batch, padding_id(tokenizer)),
        )
        for rows in (load_rows()[0], load_rows()[1][:120])
    ]
    scales = fisher_row_scales(model, modules, *loaders, progress=False)
    return [(name, module.weight.detach(), scales[name]) for name, module in modules.items()]


def quality(name, weight, scales, ranks):
    """One row for each rank and method."""
    scaled = scales.double()[:, None] * weight.double()
    exact = torch.linalg.svdvals(scaled)
    for rank in ranks:
        for method in (row_scaled_svd, svd_lowrank):
            s, v = (x[0].double() for x in method([weight], scales[None], rank))
            best = exact[:rank]
            yield {
                "matrix": name,
                "rank": rank,
                "name": method.__name__,
                "deficit": (1 - (scaled @ v).square().sum() / best.square().sum()).item(),
                "value_error": ((s - best).abs() / best).max().item(),
            }


def print_quality(rows):
    print(f"  {rows[0]['matrix']:44}", end="")
    for row in rows:
        print(f"  r={row['rank']} {row['deficit']:.0e}/{row['value_error']:.0e}", end="")
    print(flush=True)


def measure(shape, rank, dtype, device, runs):
    d, k, count = map(int, shape.split("x"))
    torch.manual_seed(0)
    weights = list(torch.randn(count, d, k, device=device).to(dtype))
    scales = torch.randn(count, d, device=device).exp()
    peers = {
        "row_scaled_svd": lambda: row_scaled_svd(weights, scales, rank),
        "svd_lowrank": lambda: svd_lowrank(weights, scales, rank),
        "thin products": lambda: thin_products(weights, rank),
    }
    times = {name: t / count for name, t in interleaved_times(peers, device, runs).items()}
    one = {"full SVD": lambda: full_svd(weights[:1], scales[:1], rank)}  # of all it would take minutes
    times |= interleaved_times(one, device, min(runs, 3))
    return [
        {
            "shape": shape,
            "rank": rank,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "name": name,
            "milliseconds_per_matrix": seconds * 1e3,
            "times_svd_lowrank": seconds / times["svd_lowrank"],
            "times_thin_products": seconds / times["thin products"],
        }
        for name, seconds in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="outputs x inputs x count")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--runs", type=int, default=7, help="timed rounds, of which the median is taken")
    parser.add_argument(
        "--quick", action="store_true", help="two matrices a shape, three rounds, less quality"
    )
    parser.add_argument("--output", help="result file (default: benchmarks/results/fila_DEVICE.json)")
    options = parser.parse_args()
    shapes, runs = options.shape, options.runs
    if options.quick:
        shapes, runs = ["x".join([*shape.split("x")[:2], "2"]) for shape in shapes], min(runs, 3)

    rows = []
    torch.set_num_threads(options.threads[0])
    print("captured-energy deficit / largest relative error of S: row_scaled_svd, svd_lowrank, for each rank")
    torch.manual_seed(0)
    for shape in shapes:
        d, k, _ = map(int, shape.split("x"))
        for spectrum in ["gaussian", *SPECTRA]:
            weight = random_weight(d, k, spectrum)
            for kind, scales in (("log-normal", torch.randn(d).exp()), ("uniform", torch.ones(d))):
                new = list(quality(f"{d} x {k} {spectrum}, {kind} scales", weight, scales, options.rank))
                print_quality(new)
                rows += new
    if not options.quick:
        worst = {}
        for name, weight, scales in embedded_weights():
            for row in quality(f"embedded model, {name}", weight, scales, options.rank):
                rows.append(row)
                key = row["rank"], row["name"]
                worst[key] = max(worst.get(key, row), row, key=lambda r: r["deficit"])
        print("  the worst of the embedded model's weights, real scales:")
        for row in worst.values():
            print(f"    {row['name']:16} r={row['rank']}: {row['deficit']:.0e} ({row['matrix']})")

    for threads in options.threads:
        torch.set_num_threads(threads)
        for rank in options.rank:
            print(f"\nrank {rank}, {options.dtype}, {threads} threads")
            print(f"  {'':16}{'':16}{'ms a matrix':>12}{'x svd_lowrank':>15}{'x products':>12}")
            totals = {}
            for shape in shapes:
                new = measure(shape, rank, DTYPES[options.dtype], options.device, runs)
                rows += new
                for row in new:
                    count = int(shape.split("x")[2])
                    seconds = row["milliseconds_per_matrix"] * count
                    totals[row["name"]] = totals.get(row["name"], 0) + seconds
                    print(
                        f"  {row['shape']:16}{row['name']:16}{row['milliseconds_per_matrix']:12.2f}"
                        f"{row['times_svd_lowrank']:15.2f}{row['times_thin_products']:12.2f}",
                        flush=True,
                    )
            print("  all weights, x svd_lowrank: ", end="")
            print(", ".join(f"{name} {t / totals['svd_lowrank']:.2f}" for name, t in totals.items()))
    print("\nwritten:", write_result(f"fila_{options.device}", rows, options.device, options.output))


if __name__ == "__main__":
    main()

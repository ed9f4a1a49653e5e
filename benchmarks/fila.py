"""FILA's decomposition: the top singular values and right singular vectors of diag(s) W, beside its peers.

    python benchmarks/fila.py [--shape 768x768x24 ...] [--rank 16 32] [--dtype D ...] [--threads N ...]

A shape is outputs x inputs x number of weights. Quality is measured against a full SVD in float64, on four
spectra and on the embedded model's weights with their real Fisher scales. It is the captured-energy deficit,
1 - ||diag(s) W V||^2 over the energy of the best subspace, and the largest relative error of S. Time is
measured on all weights of a shape. The authors' code calls ``svd_lowrank``. sklearn and scipy have randomised
methods too. The floor is the time of the thin products alone: the products of three blocks, and one with V.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from harness import DTYPES, Benchmark, Call, arguments, sizes
from peers import importable
from result_files import Row
from subjects import target_linears
from torch import Tensor

from loku_kernels import row_scaled_svd
from loku_kernels.lowrank import OVERSAMPLING

SHAPES = ["768x768x24", "3072x768x12", "768x3072x12"]  # GPT-Neo-125M: query and value, c_fc, c_proj
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "i^-0.5": lambda i: i**-0.5,
    "i^-0.25": lambda i: i**-0.25,
    "spikes": lambda i: torch.where(i <= 12, 3.0, 1.0),
}


Subspaces = tuple[Tensor, Tensor]  # S and V of one weight, or of all weights, stacked
Decomposition = Callable[[Tensor, int], Subspaces]  # arguments: scaled weight, rank
Method = Callable[[Sequence[Tensor], Tensor, int], Subspaces]  # arguments: weights, scales, rank


# --- peers ----------------------------------------------------------------------------------------


def one_by_one(decompose: Decomposition, weights: Sequence[Tensor], scales: Tensor, rank: int) -> Subspaces:
    """Decompose each scaled weight by itself.

    Args:
        decompose: The decomposition of one scaled weight (d, k).
        weights: The weights, each (d, k).
        scales: The row scales (count, d).
        rank: The number of singular values.

    Returns:
        The singular values (count, rank) and right singular vectors (count, k, rank).
    """
    results = [decompose(s[:, None] * w.float(), rank) for w, s in zip(weights, scales, strict=True)]
    return torch.stack([s for s, _ in results]), torch.stack([v for _, v in results])


def svd_lowrank(scaled: Tensor, rank: int) -> Subspaces:
    """Return S and V as the authors' code computes them."""
    return torch.svd_lowrank(scaled, q=rank)[1:]


def full_svd(scaled: Tensor, rank: int) -> Subspaces:
    """Return S and V of a full SVD."""
    _, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    return s[:rank], vh[:rank].T


def sklearn_randomized_svd(scaled: Tensor, rank: int) -> Subspaces:
    """Return S and V of sklearn's randomised SVD."""
    from sklearn.utils.extmath import randomized_svd

    with blas_threads():
        _, s, vh = randomized_svd(scaled.cpu().numpy(), rank, random_state=0)
    return torch.from_numpy(s.copy()), torch.from_numpy(vh.T.copy())


def scipy_interpolative_svd(scaled: Tensor, rank: int) -> Subspaces:
    """Return S and V of scipy's interpolative decomposition."""
    from scipy.linalg import interpolative

    with blas_threads():
        _, s, v = interpolative.svd(scaled.double().cpu().numpy(), rank)
    return torch.from_numpy(s.copy()), torch.from_numpy(v.copy())


def blas_threads() -> AbstractContextManager[object]:
    """Give the BLAS of numpy and scipy, which is not torch's, torch's number of threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(torch.get_num_threads(), user_api="blas")


def methods() -> dict[str, Method]:
    """Return name -> method, ours first."""
    peers: dict[str, Decomposition] = {"svd_lowrank": svd_lowrank, "full SVD": full_svd}
    if importable("sklearn"):
        peers["sklearn"] = sklearn_randomized_svd
        peers["scipy"] = scipy_interpolative_svd  # needs threadpoolctl, which comes with sklearn
    return {
        "row_scaled_svd": row_scaled_svd,
        **{name: partial(one_by_one, decompose) for name, decompose in peers.items()},
    }


def thin_products(weights: Sequence[Tensor], rank: int) -> None:
    """Compute the products of three Krylov blocks and of the values of V, and nothing else."""
    d, k = weights[0].shape
    x, y = (torch.randn(rank + OVERSAMPLING, n, device=weights[0].device) for n in (k, d))
    for w in map(torch.Tensor.float, weights):
        for _ in range(3):
            x @ w.T
            y @ w
        y @ w
        x[:rank] @ w.T


def random_weight(d: int, k: int, spectrum: str) -> Tensor:
    """Return a random weight (d, k), float32, "gaussian" or with a spectrum of ``SPECTRA``."""
    if spectrum == "gaussian":
        return torch.randn(d, k)
    rank = min(d, k)
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (d, k))
    return (left * SPECTRA[spectrum](torch.arange(1, rank + 1, dtype=torch.float64)) @ right.T).float()


def embedded_weights() -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, weight (d, k), row scales (d,)) of the targets of the embedded model.

    The row scales come from 40 forget and 120 retain rows.
    """
    from torch.utils.data import DataLoader

    from loku.data import collate, padding_id, tokenize_dataset
    from loku.demo import load_model, load_rows
    from loku.fila.row_scales import fisher_row_scales

    model, tokenizer = load_model()
    modules = target_linears(model)
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


def quality(what: str, weight: Tensor, scales: Tensor, ranks: Sequence[int]) -> Iterator[Row]:
    """Yield a row with the quality of each method at each rank.

    Args:
        what: The name of the case.
        weight: The weight (d, k).
        scales: The row scales (d,).
        ranks: The ranks.
    """
    scaled = scales.double()[:, None] * weight.double()
    exact = torch.linalg.svdvals(scaled)
    for rank in ranks:
        best = exact[:rank]
        for name, method in methods().items():
            if name == "full SVD":
                continue
            s, v = (x[0].double() for x in method([weight], scales[None], rank))
            yield {
                "what": what,
                "rank": rank,
                "name": name,
                "deficit": (1 - (scaled @ v).square().sum() / best.square().sum()).item(),
                "value_error": ((s - best).abs() / best).max().item(),
            }


def measure_quality(bench: Benchmark, shape: str) -> None:
    """Add the quality on random weights of a shape, for each spectrum and kind of scales."""
    d, k, _ = sizes(shape)
    torch.manual_seed(0)
    for spectrum in ["gaussian", *SPECTRA]:
        weight = random_weight(d, k, spectrum)
        for kind, scales in (("log-normal", torch.randn(d).exp()), ("uniform", torch.ones(d))):
            what = f"{d}x{k} {spectrum}, {kind} scales"
            rows = list(quality(what, weight, scales, bench.options.rank))
            for rank in bench.options.rank:
                bench.add(row for row in rows if row["rank"] == rank)


def measure_embedded_quality(bench: Benchmark) -> None:
    """Add the quality on the worst weight of the embedded model, for each rank and method."""
    rows = [
        row
        for name, weight, scales in embedded_weights()
        for row in quality(name, weight, scales, bench.options.rank)
    ]
    for rank in bench.options.rank:
        worst: dict[str, Row] = {}
        for row in rows:
            if row["rank"] == rank:
                worst[row["name"]] = max(worst.get(row["name"], row), row, key=lambda row: row["deficit"])
        bench.add(
            {**row, "what": "the worst of the embedded model's weights", "matrix": row["what"]}
            for row in worst.values()
        )


def measure_time(bench: Benchmark, shape: str, rank: int, dtype: str) -> None:
    """Measure the time for all weights of a shape."""
    d, k, count = sizes(shape)
    torch.manual_seed(0)
    weights = list(torch.randn(count, d, k, device=bench.device).to(DTYPES[dtype]))
    scales = torch.randn(count, d, device=bench.device).exp()
    slow = {"full SVD", "scipy"}  # timed on one matrix and scaled, since all would take minutes
    functions: dict[str, Call] = {
        name: partial(method, weights[:1], scales[:1], rank)
        if name in slow
        else partial(method, weights, scales, rank)
        for name, method in methods().items()
    }
    functions["thin products"] = partial(thin_products, weights, rank)
    bench.compare(
        shape,
        functions,
        dtype=dtype,
        over=["svd_lowrank", "full SVD", "sklearn", "scipy"],
        floors={"svd_lowrank": ["svd_lowrank"], "thin products": ["thin products"]},
        repeats={name: count for name in slow & functions.keys()},
        rank=rank,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__, SHAPES, ("float32",), "outputs x inputs x number of weights")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 32], help="default: 16 32")
    parser.add_argument("--no-embedded", action="store_true", help="leave out the embedded model's weights")
    bench = Benchmark("fila", parser, argv)
    options = bench.options
    for shape in options.shape:
        measure_quality(bench, shape)
    if not options.no_embedded:
        measure_embedded_quality(bench)
    for rank, dtype, shape in bench.cases(options.rank, options.dtype, options.shape):
        measure_time(bench, shape, rank, dtype)
    bench.close()


if __name__ == "__main__":
    main()

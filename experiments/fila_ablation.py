"""FILA's choices one by one: Fisher per sample or per batch, its damping, the decomposition.

    python experiments/fila_ablation.py --grid experiments/fila_ablation.yaml [--jobs N]

A cell is a way to initialise the embedded model's adapters for forgetting its last two authors. It is
compared with the shipped way (``Cell``'s defaults) by the rank correlation of its row scales, by the share of
the best subspace's energy that it captures, and by the overlap of its subspace with the shipped one. Then it
is compared by unlearning, as in ``experiments/tofu.py`` (IHL, rank 8, learning rate 2e-3), unless
``num_train_epochs`` is 0. The row scales are normalised in every cell. ``experiments/fila_balance.py``
compares their balances, and runs FILA as the authors' code has it.

Finished cells are lines of ``--out``, by default ``experiments/results/fila_ablation.jsonl``, and are not run
again. ``benchmarks/report.py`` makes the table in ``docs/experiments.md`` from them.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from statistics import median
from typing import Any
from unittest import mock

import grid
import tofu
import torch
from shared import fila_peers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loku import initialize_lora_fila_weights
from loku.data import collate, padding_id, tokenize_dataset
from loku.data.files import read_rows
from loku.demo import load_model
from loku.fila.row_scales import balanced, fisher_row_scales
from loku.target_modules import default_target_modules
from loku_kernels import row_scaled_svd

RANK, LEARNING_RATE, FORGET_AUTHORS = 8, 2e-3, 2
BATCH_SIZE = 8  # rows in a batch of a Fisher pass; the per-sample Fisher does not depend on it


@dataclass(frozen=True)
class Cell:
    """One way to initialise adapters. The defaults are the shipped way.

    Args:
        fisher: The kind of Fisher, "per-sample" or "per-batch".
        damping: The damping of the retain Fisher.
        damping_mode: "relative" to the mean of the retain Fisher, or "absolute".
        svd: The decomposition, a key of ``DECOMPOSITIONS``.
        seed: The seed of the order of rows, of ``torch.svd_lowrank`` and of unlearning.
        num_train_epochs: The epochs of unlearning.
    """

    fisher: str = "per-sample"
    damping: float = 1.0
    damping_mode: str = "relative"
    svd: str = "row_scaled_svd"
    seed: int = 0
    num_train_epochs: int = 8


# --- row scales -----------------------------------------------------------------------------------


def batches(rows: Sequence[Any], tokenizer: Any, shuffle_seed: int | None = None) -> DataLoader[Any]:
    """Return batches of tokenised rows, shuffled if there is a seed."""
    order: Iterable[int] = range(len(rows))
    if shuffle_seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(shuffle_seed)).tolist()
    return DataLoader(
        tokenize_dataset([rows[i] for i in order], tokenizer),
        batch_size=BATCH_SIZE,
        collate_fn=partial(collate, pad_token_id=padding_id(tokenizer)),
    )


class Subject:
    """The embedded model, its target modules and their row scales. No Fisher is measured twice."""

    def __init__(self) -> None:
        self.base = tofu.embedded_base(FORGET_AUTHORS)
        self.model, self.tokenizer = load_model(self.base.model)
        targets = tuple(f".{name}" for name in default_target_modules(self.model))
        modules = self.model.named_modules()
        self.modules: dict[str, nn.Linear] = {
            name: module for name, module in modules if name.endswith(targets)
        }
        self.sets: tuple[Sequence[Any], Sequence[Any]] = (self.base.forget, self.base.retain)
        self.scales: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def row_scales(
        self, damping: float, damping_mode: Any, shuffle_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return name -> normalised row scales (d,).

        They are those of the per-batch Fisher of shuffled rows if there is a seed of the order, and those of
        the per-sample Fisher otherwise.
        """
        key = damping, damping_mode, shuffle_seed
        if key not in self.scales:
            measured = fisher_row_scales(
                self.model,
                self.modules,
                *(batches(rows, self.tokenizer, shuffle_seed) for rows in self.sets),
                damping=damping,
                damping_mode=damping_mode,
                fisher="per-sample" if shuffle_seed is None else "per-batch",
                progress=False,
            )
            self.scales[key] = balanced(measured, "normalised")
        return self.scales[key]


@lru_cache
def the_subject() -> Subject:
    """Return the subject of this process."""
    return Subject()


# --- decompositions -------------------------------------------------------------------------------

# (weights, scales (count, d), rank) -> S (count, rank), V (count, k, rank)
Method = Callable[[Sequence[Tensor], Tensor, int], tuple[Tensor, Tensor]]


def lowrank_of_seed(seed: int, weights: Sequence[Tensor], scales: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return S and V from ``torch.svd_lowrank`` with a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fila_peers.one_by_one(fila_peers.svd_lowrank, weights, scales, rank)


def exact(scaled: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return S and V of one scaled weight from a full SVD in float64."""
    return fila_peers.full_svd(scaled.double(), rank)


DECOMPOSITIONS: dict[str, Callable[[int], Method]] = {  # name -> (seed -> method)
    "row_scaled_svd": lambda seed: row_scaled_svd,
    "svd_lowrank": lambda seed: partial(lowrank_of_seed, seed),
    "exact": lambda seed: partial(fila_peers.one_by_one, exact),
}


# --- one cell -------------------------------------------------------------------------------------


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median over modules and the worst: the highest deficit, the lowest of other measures."""
    worst = max(values) if name == "deficit" else min(values)
    return {name: median(values), f"worst_{name}": worst}


def compare(cell: Cell, subject: Subject) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compare the row scales and subspaces of a cell with the shipped ones.

    Returns:
        name -> row scales (d,) of the cell, and the median and the worst of each measure (see ``run_cell``).
    """
    from scipy.stats import spearmanr

    damping = cell.damping, cell.damping_mode
    shipped = subject.row_scales(Cell.damping, Cell.damping_mode)
    values: dict[str, list[float]] = {"rank_correlation": [], "deficit": [], "overlap": []}
    if cell.fisher == "per-batch":
        ours, shuffled = (subject.row_scales(*damping, cell.seed + other) for other in (0, 1))
        values["shuffle_correlation"] = []
    else:  # its order of rows changes nothing
        ours = subject.row_scales(*damping)
    decompose = DECOMPOSITIONS[cell.svd](cell.seed)
    for name, module in subject.modules.items():
        weight, scale = module.weight.detach(), ours[name]
        values["rank_correlation"].append(float(spearmanr(scale, shipped[name]).statistic))
        if cell.fisher == "per-batch":
            values["shuffle_correlation"].append(float(spearmanr(scale, shuffled[name]).statistic))
        _, v = decompose([weight], scale[None], RANK)
        _, shipped_v = row_scaled_svd([weight], shipped[name][None], RANK)
        v, shipped_v = v[0].double(), shipped_v[0].double()
        scaled = scale.double()[:, None] * weight.double()
        best = torch.linalg.svdvals(scaled)[:RANK].square().sum()
        values["deficit"].append((1 - (scaled @ v).square().sum() / best).item())
        values["overlap"].append(((shipped_v.T @ v).square().sum() / RANK).item())
    return ours, {key: value for name in values for key, value in spread(name, values[name]).items()}


def known_curve(settings: tofu.Cell) -> list[Any] | None:
    """Return the curve of the same cell in the result file of ``tofu.py``, if it is there."""
    for line in read_rows(grid.RESULTS / "tofu.jsonl"):
        if all(line[name] == value for name, value in asdict(settings).items()):
            return line["curve"]
    return None


def unlearning_curve(cell: Cell, base: tofu.Base, scales: dict[str, Tensor]) -> list[Any]:
    """Return the curve of unlearning with adapters from these row scales and the cell's decomposition."""
    settings = tofu.Cell(
        lora_rank=RANK,
        learning_rate=LEARNING_RATE,
        fisher_damping=cell.damping,
        fisher_damping_mode=cell.damping_mode,
        forget_authors=FORGET_AUTHORS,
        seed=cell.seed,
        num_train_epochs=cell.num_train_epochs,
    )
    plain = (cell.fisher, cell.svd) == (Cell.fisher, Cell.svd)
    if plain and (curve := known_curve(settings)):
        return curve

    def initialize(peft_model: Any, *loaders: Any, **options: Any) -> None:
        initialize_lora_fila_weights(peft_model, fila_state_dict=scales)

    with (
        mock.patch("loku.unlearning.initialize_lora_fila_weights", initialize),
        mock.patch("loku.fila.initialize.row_scaled_svd", DECOMPOSITIONS[cell.svd](cell.seed)),
    ):
        return tofu.run_cell(settings, base)["curve"]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Return the figures of a cell.

    Returns:
        Each measure is the median over modules, and ``worst_...`` the worst module:
        ``rank_correlation`` of the row scales with the shipped ones;
        ``shuffle_correlation`` with the row scales of another order of rows (per-batch Fisher alone);
        ``deficit``, the share of the best subspace's energy that is missed;
        ``overlap`` with the shipped subspace.
        ``curve`` is the curve of ``tofu.run_cell``.
    """
    subject = the_subject()
    scales, compared = compare(cell, subject)
    return {
        **compared,
        "curve": unlearning_curve(cell, subject.base, scales) if cell.num_train_epochs else [],
    }


def summary(line: Mapping[str, Any]) -> str:
    """Return the text of a finished cell for the progress bar."""
    return f"correlation {line['rank_correlation']:.2f}, overlap {line['overlap']:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "fila_ablation.jsonl")
    options = grid.parse_arguments(parser, argv)
    cells = grid.chosen_cells(options, Cell)
    if grid.run(cells, run_cell, lambda cell: (), options.out, options.jobs, summary, options.minutes):
        raise SystemExit("not all cells ran")


if __name__ == "__main__":
    main()

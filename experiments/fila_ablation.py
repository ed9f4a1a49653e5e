"""FILA's choices one by one: Fisher per sample or per batch, its damping, the decomposition.

    python experiments/fila_ablation.py --grid experiments/fila_ablation.yaml [--jobs N]

A cell is a way to initialise the embedded model's adapters for forgetting its last two authors. It is
compared with what ships (``Cell``'s defaults) by the rank correlation of its row scales, by how much of the
energy of the best subspace it captures, and by how much its subspace overlaps the shipped one; then, unless
``num_train_epochs`` is 0, by unlearning with it, as ``experiments/tofu.py`` does (IHL, rank 8, learning rate
2e-3). The authors' code squares the gradient of a batch's mean loss, adds 1e-5 to the retain Fisher and calls
``torch.svd_lowrank``.

Finished cells are lines of ``--out``, by default results/fila_ablation.jsonl, and are not run again;
``report.py`` makes README's table of them.
"""

import argparse
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from statistics import median
from unittest import mock

import grid
import tofu
import torch
from fila import full_svd, one_by_one, svd_lowrank
from torch.utils.data import DataLoader

from loku import initialize_lora_fila_weights
from loku.data import collate, padding_id, tokenize_dataset
from loku.data.files import read_rows
from loku.demo import load_model
from loku.fila.row_scales import fisher_row_scales
from loku.fila.targets import default_target_modules
from loku_kernels import row_scaled_svd

RANK, LEARNING_RATE, FORGET_AUTHORS = 8, 2e-3, 2
BATCH_SIZE = 8  # of a Fisher pass, which only the per-batch Fisher depends on


@dataclass(frozen=True)
class Cell:
    """``fisher`` is "per-sample" or "per-batch", ``svd`` a key of ``DECOMPOSITIONS``."""

    fisher: str = "per-sample"
    damping: float = 1.0
    damping_mode: str = "relative"
    svd: str = "row_scaled_svd"
    seed: int = 0
    num_train_epochs: int = 8


# --- row scales -----------------------------------------------------------------------------------


def batches(rows, tokenizer, shuffle_seed=None):
    order = range(len(rows))
    if shuffle_seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(shuffle_seed)).tolist()
    return DataLoader(
        tokenize_dataset([rows[i] for i in order], tokenizer),
        batch_size=BATCH_SIZE,
        collate_fn=partial(collate, pad_token_id=padding_id(tokenizer)),
    )


def per_batch_fisher(model, modules, loader):
    """name -> (d, k), the mean over batches of the squared gradient of a batch's mean loss."""
    fisher = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    weights = [module.weight for module in modules.values()]
    for batch in loader:
        gradients = torch.autograd.grad(model(**batch).loss, weights)
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            total += gradient.square() / len(loader)
    return fisher


class Subject:
    """The embedded model, its target modules and their row scales; no Fisher is measured twice."""

    def __init__(self):
        self.base = tofu.embedded_base(FORGET_AUTHORS)
        self.model, self.tokenizer = load_model(self.base.model)
        targets = tuple(f".{name}" for name in default_target_modules(self.model))
        modules = self.model.named_modules()
        self.modules = {name: module for name, module in modules if name.endswith(targets)}
        self.sets = self.base.forget, self.base.retain
        self.scales, self.fishers = {}, {}

    def per_sample(self, damping, damping_mode):
        key = damping, damping_mode
        if key not in self.scales:
            self.scales[key] = fisher_row_scales(
                self.model,
                self.modules,
                *(batches(rows, self.tokenizer) for rows in self.sets),
                damping=damping,
                damping_mode=damping_mode,
                progress=False,
            )
        return self.scales[key]

    def per_batch(self, damping, damping_mode, shuffle_seed):
        if shuffle_seed not in self.fishers:
            self.fishers[shuffle_seed] = [
                per_batch_fisher(self.model, self.modules, batches(rows, self.tokenizer, shuffle_seed))
                for rows in self.sets
            ]
        forget, retain = self.fishers[shuffle_seed]
        scales = {}
        for name in self.modules:
            added = damping * (retain[name].mean() if damping_mode == "relative" else 1.0)
            score = (forget[name] / (retain[name] + added)).sum(1)
            scales[name] = (score / score.mean()).sqrt()
        return scales


@lru_cache
def the_subject():
    return Subject()


# --- decompositions: (weights, scales, rank) -> S (count, rank), V (count, k, rank) -----------------


def lowrank_of_seed(seed, weights, scales, rank):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return one_by_one(svd_lowrank, weights, scales, rank)


def exact(scaled, rank):
    return full_svd(scaled.double(), rank)


DECOMPOSITIONS = {
    "row_scaled_svd": lambda seed: row_scaled_svd,
    "svd_lowrank": lambda seed: partial(lowrank_of_seed, seed),
    "exact": lambda seed: partial(one_by_one, exact),
}


# --- one cell -------------------------------------------------------------------------------------


def spread(name, values):
    """The median over modules and the worst, which is the lowest but for a deficit."""
    worst = max if name == "deficit" else min
    return {name: median(values), f"worst_{name}": worst(values)}


def compare(cell, subject):
    """(the cell's row scales, how they and their subspaces compare with the shipped ones)"""
    from scipy.stats import spearmanr

    damping = cell.damping, cell.damping_mode
    shipped = subject.per_sample(Cell.damping, Cell.damping_mode)
    values = {"rank_correlation": [], "deficit": [], "overlap": []}
    if cell.fisher == "per-batch":
        ours, shuffled = (subject.per_batch(*damping, cell.seed + other) for other in (0, 1))
        values["shuffle_correlation"] = []
    else:  # whose order changes nothing
        ours = subject.per_sample(*damping)
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


def known_curve(settings):
    """That of the same cell in the result file of ``tofu.py``, if it is there."""
    for line in read_rows(grid.RESULTS / "tofu.jsonl"):
        if all(line[name] == value for name, value in asdict(settings).items()):
            return line["curve"]
    return None


def unlearning_curve(cell, base, scales):
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

    def initialize(peft_model, *loaders, **options):
        initialize_lora_fila_weights(peft_model, fila_state_dict=scales)

    with (
        mock.patch("loku.unlearning.initialize_lora_fila_weights", initialize),
        mock.patch("loku.fila.initialize.row_scaled_svd", DECOMPOSITIONS[cell.svd](cell.seed)),
    ):
        return tofu.run_cell(settings, base)["curve"]


def run_cell(cell):
    """``rank_correlation`` of the row scales with the shipped ones, for the per-batch Fisher
    ``shuffle_correlation`` with those of another order of the rows, the captured-energy ``deficit`` and the
    ``overlap`` with the shipped subspace, each the median over modules and its ``worst_...``; ``curve``: see
    ``tofu.run_cell``."""
    subject = the_subject()
    scales, compared = compare(cell, subject)
    return {
        **compared,
        "curve": unlearning_curve(cell, subject.base, scales) if cell.num_train_epochs else [],
    }


def summary(line):
    return f"correlation {line['rank_correlation']:.2f}, overlap {line['overlap']:.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "fila_ablation.jsonl")
    options = grid.parse_arguments(parser, argv)
    cells = grid.chosen_cells(options, Cell)
    if grid.run(cells, run_cell, lambda cell: (), options.out, options.jobs, summary):
        raise SystemExit("not all cells ran")


if __name__ == "__main__":
    main()

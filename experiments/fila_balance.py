"""The balance of FILA's factors against the learning rate: is FILA's speed anything but a larger step?

    python experiments/fila_balance.py --grid experiments/fila_balance.yaml [--jobs N]

Row scales of c * s leave B A as it is. They multiply A by sqrt(c) and divide B by sqrt(c). Adam moves each
entry of A and B by about the learning rate, so a balance far from 1 makes the step of B A larger. A cell is
one way to initialise the embedded model's adapters (rank 8), in one balance, at one learning rate. IHL then
forgets the model's last two authors in ``STEPS`` steps of 8 + 8 rows, at a constant learning rate and a
retain weight of 1. The figures are the probabilities of the forget answers and of 40 retained answers after
every second step, and TOFU's forget quality at the end.

FILA's row scales could help where the sets overlap. A cell of ``forget="rows"`` forgets every other row of
these authors. The rows between are retained, and measured as "neighbour". No model never saw the forget rows
alone, so there is no forget quality.

Finished cells are lines of ``--out``, by default ``experiments/results/fila_balance.jsonl``, and are not run
again. ``fila_balance_report.py`` draws them, and ``benchmarks/report.py`` makes the tables in
``docs/experiments.md``.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import fila_balance_report
import grid
import tofu
from transformers import TrainerCallback

from loku import UnlearnConfig, unlearn
from loku.adapters import adapter_factors, adapter_layers
from loku.data import tokenize_dataset
from loku.demo import load_model
from loku.evaluation import evaluate_tofu_rows, forget_quality
from loku.evaluation.scores import mean_answer_probability, token_scores
from loku.evaluation.tofu import SECTIONS

FORGET_AUTHORS, RANK = 2, 8
STEPS = 20
EVERY = 2  # steps between two measurements of probabilities
RETAINED = 40  # retained rows whose probability is measured


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        init: The initialisation, as for ``loku.UnlearnConfig``.
        fila_balance: The balance, as for ``loku.UnlearnConfig``. "official-fila" has the balance "paper", and
            "default" has none.
        learning_rate: The learning rate.
        seed: The seed.
        forget: "authors" forgets the last two authors, "rows" every other row of them.
    """

    init: str = "fila"
    fila_balance: str = "normalised"
    learning_rate: float = 2e-3
    seed: int = 0
    forget: str = "authors"


def base_of(cell: Cell) -> tuple[tofu.Base, list[Any]]:
    """Return the model and the rows of a cell, and the retained rows of the authors to forget.

    Raises:
        ValueError: ``forget`` is neither "authors" nor "rows".
    """
    base = tofu.embedded_base(FORGET_AUTHORS)
    if cell.forget == "authors":
        return base, []
    if cell.forget != "rows":
        raise ValueError(f'forget must be "authors" or "rows", got {cell.forget!r}')
    neighbours = base.forget[1::2]
    rows = {"forget": base.forget[::2], "retain": [*base.retain, *neighbours]}
    return replace(base, **rows, retain_log=None), neighbours


@lru_cache
def cache_folder() -> tempfile.TemporaryDirectory:
    """Return a folder of row scales for this process: they are measured once for all balances."""
    return tempfile.TemporaryDirectory()


def step_size(model: Any) -> float:
    """Return the size of Adam's first step in the adapted weights, for each unit of the learning rate.

    It is the Frobenius norm of scaling * (dB A + B dA) over all modules, if each entry of dA and dB is 1 or
    -1 and their signs are independent. Then |dB A|^2 = d |A|^2 and |B dA|^2 = k |B|^2 on average.
    """
    total = 0.0
    for layer in adapter_layers(model, "default").values():
        B, A = (factor.detach().double() for factor in adapter_factors(layer, "default"))
        squares = len(B) * A.square().sum() + A.shape[1] * B.square().sum()
        total += layer.scaling["default"] ** 2 * squares.item()
    return total**0.5


class Curve(TrainerCallback):
    """Measures the model before training and after every second step, and forget quality at the end.

    ``points`` are the measures, and ``step_size`` is that of the initial adapter.
    """

    def __init__(self, tokenizer: Any, base: tofu.Base, neighbours: Sequence[Any] = ()) -> None:
        self.tokenizer, self.base = tokenizer, base
        others = base.retain[: len(base.retain) - len(neighbours)]
        sets = {"forget": base.forget, "retain": tofu.spread(others, RETAINED), "neighbour": neighbours}
        self.rows = {name: tokenize_dataset(rows, tokenizer) for name, rows in sets.items() if rows}
        self.points: list[dict[str, Any]] = []
        self.step_size = 0.0

    def measure(self, state: Any, model: Any) -> None:
        """Add a point."""
        point: dict[str, Any] = {"step": state.global_step}
        for name, rows in self.rows.items():
            scores = token_scores(model, rows, batch_size=32, progress=False)
            point[f"{name}_probability"] = mean_answer_probability(scores)
        self.points.append(point)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the initial model."""
        self.step_size = step_size(model)
        self.measure(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the probabilities."""
        if state.global_step % EVERY == 0:
            self.measure(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure forget quality, if there is the log that it needs."""
        if self.base.retain_log is None:
            return
        rows = self.base.forget  # the test needs the losses of answers, and no generated ones
        section = evaluate_tofu_rows(model, self.tokenizer, rows, 32, progress=False, max_new_tokens=1)
        self.points[-1]["forget_quality"] = forget_quality(
            {SECTIONS["forget"]: section}, self.base.retain_log
        )


def run_cell(cell: Cell) -> dict[str, Any]:
    """Return ``step_size`` and ``curve``, the points of a cell."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base, neighbours = base_of(cell)
    model, tokenizer = load_model(base.model)
    curve = Curve(tokenizer, base, neighbours)
    settings = {name: value for name, value in asdict(cell).items() if name != "forget"}
    with tempfile.TemporaryDirectory() as directory:
        config = UnlearnConfig(
            **settings,
            output_dir=directory,
            lora_rank=RANK,
            lora_alpha=2 * RANK,
            retain_weight=1.0,
            max_steps=STEPS,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
            fisher_cache_dir=str(Path(cache_folder().name)),
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        unlearn(model, base.forget, base.retain, config=config, tokenizer=tokenizer, callbacks=[curve])
    assert curve.points[-1]["step"] == STEPS
    return {"step_size": curve.step_size, "curve": curve.points}


def summary(line: Mapping[str, Any]) -> str:
    """Return the text of a finished cell for the progress bar."""
    last = line["curve"][-1]
    return f"forget {last['forget_probability']:.2f}, retain {last['retain_probability']:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "fila_balance.jsonl")
    options = grid.parse_arguments(parser, argv)
    cells = grid.chosen_cells(options, Cell)
    write_report = fila_balance_report.write_report
    grid.run_and_report(cells, run_cell, lambda cell: (), options, summary, write_report)


if __name__ == "__main__":
    main()

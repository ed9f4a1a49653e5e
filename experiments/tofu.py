"""Unlearning methods on TOFU's authors: the quality of forgetting, and the cost to the rest.

    python experiments/tofu.py [--grid experiments/tofu.yaml] [--method ihl gd ...] ... [--jobs N]

A cell is one unlearning run: method x init x rank x learning rate x forget authors x seed x ... (``Cell``).
Grids are YAML or flags, see ``grid.py``. The model is measured before unlearning and after each epoch. The
measures are forget quality (the p-value of TOFU's Kolmogorov-Smirnov test against a model that never saw the
forget authors), model utility (TOFU's harmonic mean) and their components.

Finished cells are lines of ``--out``, by default ``experiments/results/tofu.jsonl``, and are not run again.
At the end ``tofu_report.py`` draws and tabulates the file.

The default model is the embedded one, which knows 40 authors and no real ones. Its utility is the harmonic
mean over retained authors alone, and is not comparable with published figures. ``--model PATH`` needs the
sets too: ``--forget``, ``--retain``, ``--retain-perturbed``, ``--real-authors``, ``--world-facts`` (TOFU's
files, JSON lines) and ``--retain-log``, TOFU's log of the retain-only model. ``scripts/finetune_tofu.py``
makes both models from any base.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grid
import tofu_report

from loku.data import TOFU_TEMPLATE, QuestionTemplate
from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model

ROWS_PER_AUTHOR = 20
UTILITY_ROWS = 60  # retained rows of the embedded model that are measured after each epoch
TWIN_LOGS = grid.RESULTS / "tofu_twins"


@dataclass(frozen=True)
class Cell:
    """One run. Every field but ``forget_authors`` is a setting of ``loku.UnlearnConfig``."""

    method: str = "ihl"
    init: str = "fila"
    tuning: str = "lora"
    lora_rank: int = 8
    learning_rate: float = 1e-3
    retain_weight: float = 1.0
    target_modules: str = "qv+ffn"
    fisher_damping: float = 1.0
    fisher_damping_mode: str = "relative"
    num_train_epochs: int = 8
    seed: int = 0
    forget_authors: int = 2


@dataclass(frozen=True)
class Base:
    """The model and the rows that all cells share.

    Args:
        model: The path of the model.
        forget: The rows to forget.
        retain: The rows to retain.
        utility_rows: section of a TOFU log -> the rows that are measured for it.
        retain_log: TOFU's log of the retain-only model, if there is one.
        template: The template of all questions; TOFU's by default.
        dtype: The dtype of the model's weights, "float32" by default. Adapters are float32 in any case.
        batch_size: The number of rows that are measured at a time, 32 by default.
    """

    model: str
    forget: list[Any]
    retain: list[Any]
    utility_rows: dict[str, list[Any]]
    retain_log: dict[str, Any] | None
    template: QuestionTemplate = TOFU_TEMPLATE
    dtype: str = "float32"
    batch_size: int = 32


# --- the sets -------------------------------------------------------------------------------------


def spread(rows: list[Any], count: int) -> list[Any]:
    """Return at most ``count`` rows at even distances."""
    return rows[:: max(1, -(-len(rows) // count))]


def twin_log(forget_authors: int) -> dict[str, Any]:
    """Return TOFU's log of the embedded model's twin that never saw the last authors.

    The log for two authors is part of the package.

    Raises:
        SystemExit: There is no log for so many authors.
    """
    path = EMBEDDED / "retain_only.json" if forget_authors == 2 else TWIN_LOGS / f"{forget_authors}.json"
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: python scripts/build_embedded_model.py --twin-authors {forget_authors}"
        )
    return json.loads(path.read_text(encoding="utf-8"))["log"]


def embedded_base(forget_authors: int) -> Base:
    """Return the embedded model and its sets for a number of forget authors."""
    rows = read_rows(EMBEDDED / "tofu.jsonl")
    count = ROWS_PER_AUTHOR * forget_authors
    forget, retain = rows[-count:], rows[:-count]
    perturbed = [row for row in retain if row.get("perturbed_answer")]
    if not perturbed:
        raise SystemExit("of so many forget authors none with perturbed answers is left for model utility")
    return Base(
        str(EMBEDDED), forget, retain, {"retain": spread(perturbed, UTILITY_ROWS)}, twin_log(forget_authors)
    )


def given_base(options: argparse.Namespace) -> Base:
    """Return the model and the sets that the options name."""
    sections = {
        "retain": options.retain_perturbed,
        "real_authors": options.real_authors,
        "world_facts": options.world_facts,
    }
    missing = [name for name in ("forget", "retain", *sections) if not (vars(options) | sections)[name]]
    if missing:
        raise SystemExit(f"--model needs the files of its sets too; missing: {', '.join(missing)}")
    log = json.loads(Path(options.retain_log).read_text(encoding="utf-8")) if options.retain_log else None
    return Base(
        options.model,
        read_rows(options.forget),
        read_rows(options.retain),
        {name: read_rows(path) for name, path in sections.items()},
        log,
    )


# --- one cell -------------------------------------------------------------------------------------


def measured_log(model: Any, tokenizer: Any, base: Base) -> dict[str, Any]:
    """Return the TOFU log of the forget rows and of the rows of utility."""
    from loku.evaluation import evaluate_tofu_rows
    from loku.evaluation.tofu import SECTIONS

    sets = {"forget": base.forget, **base.utility_rows}
    options: dict[str, Any] = {"batch_size": base.batch_size, "progress": False, "template": base.template}
    return {
        SECTIONS[name]: evaluate_tofu_rows(model, tokenizer, rows, **options) for name, rows in sets.items()
    }


def measures_of(log: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """Return forget quality, model utility and TOFU's numbers of each section of a log.

    Forget quality is None without a retain-only log.
    """
    from loku.evaluation import forget_quality, model_utility, utility_table

    return {
        "forget_quality": forget_quality(log, base.retain_log) if base.retain_log else None,
        "model_utility": model_utility(log, tuple(base.utility_rows)),
        **utility_table(log),
    }


def curve_callback(
    tokenizer: Any, base: Base, measured: Callable[[Any], Mapping[str, Any]] | None = None, every: int = 1
) -> Any:
    """Return a callback whose ``points`` are the measures before training and after epochs.

    Args:
        tokenizer: The tokenizer.
        base: The rows.
        measured: model -> TOFU's log of the sets of ``base``; None (default) for ``measured_log``.
        every: The number of epochs between two points, 1 by default.
    """
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        """Measures the model before training and after epochs."""

        def __init__(self) -> None:
            self.points: list[dict[str, Any]] = []

        def measure(self, state: Any, model: Any) -> None:
            point = {"epoch": round(state.epoch or 0), "step": state.global_step}
            log = measured(model) if measured is not None else measured_log(model, tokenizer, base)
            self.points.append({**point, **measures_of(log, base)})

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            self.measure(state, model)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if round(state.epoch) % every == 0 or state.epoch >= args.num_train_epochs:
                self.measure(state, model)

    return Curve()


def config_of(settings: Mapping[str, Any], output_dir: str) -> Any:
    """Return the ``UnlearnConfig`` of a cell's settings."""
    from loku import UnlearnConfig

    return UnlearnConfig(
        **grid.used_settings(settings),
        lora_alpha=2 * settings["lora_rank"],
        output_dir=output_dir,
        per_device_train_batch_size=8,
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def unlearned(settings: Mapping[str, Any], base: Base, curve_of: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Unlearn the rows of a base.

    Args:
        settings: The fields of ``UnlearnConfig`` beside those that all cells share.
        base: The model and the rows.
        curve_of: tokenizer -> the callback that measures, by ``curve_callback``.

    Returns:
        The unlearned model, its tokenizer, the callback, and the seconds that it took.
    """
    import transformers

    from loku import unlearn

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(base.model, base.dtype)
    curve = curve_of(tokenizer)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(settings, directory)
        result = unlearn(
            model, base.forget, base.retain, config=config, tokenizer=tokenizer, callbacks=[curve]
        )
    return result.model, tokenizer, curve, time.perf_counter() - start


def run_cell(cell: Cell, base: Base) -> dict[str, Any]:
    """Return ``curve``, a point before unlearning and one for each epoch, and ``seconds`` of a cell."""
    settings = {name: value for name, value in asdict(cell).items() if name != "forget_authors"}
    *_, curve, seconds = unlearned(settings, base, lambda tokenizer: curve_callback(tokenizer, base))
    return {"curve": curve.points, "seconds": seconds}


def summary(line: Mapping[str, Any]) -> str:
    """Return the text of a finished cell for the progress bar."""
    last = line["curve"][-1]
    quality = last["forget_quality"]
    return f"quality {'-' if quality is None else f'{quality:.2g}'}, utility {last['model_utility']:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "tofu.jsonl")
    parser.add_argument("--model", metavar="PATH", help="the model (default: the embedded one)")
    for name in ("forget", "retain", "retain-perturbed", "real-authors", "world-facts", "retain-log"):
        parser.add_argument(f"--{name}", metavar="FILE", help="with --model: TOFU's file")
    options = grid.parse_arguments(parser, argv)

    def base_of(cell: Cell) -> tuple[Base]:
        return (given_base(options) if options.model else embedded_base(cell.forget_authors),)

    cells = grid.chosen_cells(options, Cell)
    grid.run_and_report(cells, run_cell, base_of, options, summary, tofu_report.write_report)


if __name__ == "__main__":
    main()

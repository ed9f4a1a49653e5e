"""Unlearning methods on TOFU's authors: how well each forgets, and what it costs the rest.

    python experiments/tofu.py [--grid experiments/tofu.yaml] [--method ihl gd ...] ... [--jobs N]

A cell is one unlearning run: method x init x rank x learning rate x forget authors x seed x ... (``Cell``).
Grids are YAML or flags, see ``grid.py``. Before unlearning and after each epoch the model is measured:
forget quality (the p-value of TOFU's Kolmogorov-Smirnov test against a model that never saw the forget
authors), model utility (TOFU's harmonic mean) and the numbers that they are made of.

Finished cells are lines of ``--out``, by default results/tofu.jsonl, and are not run again. At the end
``tofu_report.py`` draws and tabulates what the file holds.

By default the model is the embedded one, which knows 40 authors and no real ones: its utility is the
harmonic mean over retained authors alone, not comparable with published figures. With ``--model PATH`` give
the sets too: ``--forget``, ``--retain``, ``--retain-perturbed``, ``--real-authors``, ``--world-facts``
(TOFU's files, JSON lines) and ``--retain-log``, TOFU's log of the retain-only model;
``scripts/finetune_tofu.py`` makes both models from any base.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grid
import tofu_report

from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model

ROWS_PER_AUTHOR = 20
UTILITY_ROWS = 60  # of the embedded model's retained rows, measured after each epoch
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
    """What all cells share: the model and what is measured on it."""

    model: str
    forget: list
    retain: list
    utility_rows: dict  # section of a TOFU log -> its rows
    retain_log: dict | None


# --- the sets -------------------------------------------------------------------------------------


def spread(rows, count):
    """At most ``count`` rows at even distances."""
    return rows[:: max(1, -(-len(rows) // count))]


def twin_log(forget_authors):
    """TOFU's log of the embedded model's twin that never saw the last authors: shipped for two of them."""
    path = EMBEDDED / "retain_only.json" if forget_authors == 2 else TWIN_LOGS / f"{forget_authors}.json"
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: python scripts/build_embedded_model.py --twin-authors {forget_authors}"
        )
    return json.loads(path.read_text(encoding="utf-8"))["log"]


def embedded_base(forget_authors):
    rows = read_rows(EMBEDDED / "tofu.jsonl")
    count = ROWS_PER_AUTHOR * forget_authors
    forget, retain = rows[-count:], rows[:-count]
    perturbed = [row for row in retain if row.get("perturbed_answer")]
    if not perturbed:
        raise SystemExit("of so many forget authors none with perturbed answers is left for model utility")
    return Base(
        str(EMBEDDED), forget, retain, {"retain": spread(perturbed, UTILITY_ROWS)}, twin_log(forget_authors)
    )


def given_base(options):
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


def measure(model, tokenizer, base):
    """Forget quality (None without a retain-only log), model utility and TOFU's numbers of each section."""
    from loku.evaluation import evaluate_tofu_rows, forget_quality, model_utility, utility_table
    from loku.evaluation.tofu import SECTIONS

    log = {
        SECTIONS[name]: evaluate_tofu_rows(model, tokenizer, rows, batch_size=32, progress=False)
        for name, rows in {"forget": base.forget, **base.utility_rows}.items()
    }
    return {
        "forget_quality": forget_quality(log, base.retain_log) if base.retain_log else None,
        "model_utility": model_utility(log, tuple(base.utility_rows)),
        **utility_table(log),
    }


def curve_callback(tokenizer, base):
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        """Measures the model before training and after each epoch."""

        def __init__(self):
            self.points = []

        def measure(self, state, model):
            point = {"epoch": round(state.epoch or 0), "step": state.global_step}
            self.points.append({**point, **measure(model, tokenizer, base)})

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.measure(state, model)

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            self.measure(state, model)

    return Curve()


def run_cell(cell, base):
    """``curve`` (a point before unlearning and one an epoch) and ``seconds`` of a cell."""
    import transformers

    from loku import UnlearnConfig, unlearn

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(base.model)
    settings = {name: value for name, value in asdict(cell).items() if name != "forget_authors"}
    curve = curve_callback(tokenizer, base)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        config = UnlearnConfig(
            **settings,
            lora_alpha=2 * cell.lora_rank,
            output_dir=directory,
            per_device_train_batch_size=8,
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        unlearn(model, base.forget, base.retain, config=config, tokenizer=tokenizer, callbacks=[curve])
    return {"curve": curve.points, "seconds": time.perf_counter() - start}


def summary(line):
    last = line["curve"][-1]
    quality = last["forget_quality"]
    return f"quality {'-' if quality is None else f'{quality:.2g}'}, utility {last['model_utility']:.3f}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "tofu.jsonl")
    parser.add_argument("--model", help="default: the embedded one")
    for name in ("forget", "retain", "retain-perturbed", "real-authors", "world-facts", "retain-log"):
        parser.add_argument(f"--{name}", metavar="FILE")
    options = grid.parse_arguments(parser, argv)

    def base_of(cell):
        return (given_base(options) if options.model else embedded_base(cell.forget_authors),)

    cells = grid.chosen_cells(options, Cell)
    grid.run_and_report(cells, run_cell, base_of, options, summary, tofu_report.write_report)


if __name__ == "__main__":
    main()

"""The claims of the paper again: methods and initialisations on TOFU, with the figures of each author.

    python experiments/claims.py --grid experiments/claims_embedded.yaml --out RECORD/cells.jsonl

runs on the embedded model. A real pretrained model, SmolLM2-135M-Instruct in its chat template, runs so:

    python scripts/build_smollm2.py build/smollm2
    python scripts/finetune_tofu.py build/smollm2 --full locuslab/TOFU:forget10_perturbed --last 40 200 \
        --question-template chat --epochs 5 --learning-rate 3e-4 --rows-per-step 8 --bf16 \
        --out build/smollm2_tofu
    python experiments/claims.py --models build/smollm2_tofu --grid experiments/claims_smollm2.yaml \
        --out RECORD/cells.jsonl

Its rows are TOFU's last 400, of 20 authors. ``--models`` is what ``finetune_tofu.py`` made: the model that
knows all of them, and for each forget set (the last 40 or 200 rows) a model that never saw it. Any other base
and rows go as well. A cell is one unlearning run (``Cell``). The model is measured before unlearning and
after epochs, as in ``tofu.py``: forget quality, and model utility over retained rows, real authors and world
facts, which a real model partly knows. A line also has the answer probability of each row at each epoch.
Then the epoch of the highest retain probability among those whose forget quality is at least 0.05 is
attacked, if there is one (``claims_report.passing_point``):

- half of the forget rows are taught again, and the others measured; the model that never saw them is taught
  the same, as the control, where there is one;
- its weights are rounded to 4 bits.

Finished cells are lines of ``--out``, by default ``experiments/results/claims.jsonl``, and are not run again.
``--minutes`` ends a part of the grid; the same command goes on. The fields ``utility_rows``,
``measure_every`` and ``relearning_steps`` of a cell make it cheaper, and stand in its line. Methods
that loku lacks and settings that cannot be are refused by name before any cell runs. At the end
``claims_report.py`` draws and tabulates the file.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import claims_report
import grid
import tofu

from loku.data import TOFU_TEMPLATE, QuestionTemplate
from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model
from loku.saving.directories import whole_file

# UnlearnConfig has none of these fields.
OURS = ("forget_rows", "utility_rows", "measure_every", "relearning_steps", "dtype")
BITS = 4
DIGITS = 6  # of the probabilities in a line
BATCH = 16  # rows of a real model that are measured at a time
EMBEDDED_CACHE = Path(__file__).parents[1] / "build" / "claims_embedded"


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        method: The method; this and the next fields are those of ``loku.UnlearnConfig``.
        init: The initialisation.
        fila_balance: The size of FILA's row scales.
        method_args: The further arguments of the method, a JSON object; "" for its defaults.
        lora_rank: The rank; alpha is twice as much.
        learning_rate: The peak learning rate, which falls linearly.
        retain_weight: The factor of the retain loss.
        target_modules: The modules to adapt.
        num_train_epochs: The passes over the forget rows, 8 at a time with 8 retained ones.
        seed: The seed.
        forget_rows: The number of forget rows, the last ones.
        utility_rows: The greatest number of rows of each set of utility.
        measure_every: The epochs between two measurements.
        relearning_steps: The steps of relearning, with 8 rows each; 0 leaves the attacks out.
        dtype: The dtype of the weights. Adapters are float32 in any case.
    """

    method: str = "ihl"
    init: str = "fila"
    fila_balance: str = "normalised"
    method_args: str = ""
    lora_rank: int = 8
    learning_rate: float = 1e-3
    retain_weight: float = 1.0
    target_modules: str = "qv+ffn"
    num_train_epochs: int = 5
    seed: int = 0
    forget_rows: int = 40
    utility_rows: int = 30
    measure_every: int = 1
    relearning_steps: int = 10
    dtype: str = "float32"


@dataclass(frozen=True)
class Models:
    """What ``scripts/finetune_tofu.py`` made, or the embedded model; and the sets of utility.

    Args:
        full: The path of the model that knows all rows.
        folder: The folder of the models that never saw the forget rows, and of what cells share.
        rows: All rows.
        facts: The settings of the fine-tuning.
        others: The rows of real authors and world facts by the names of their sections.
    """

    full: Path
    folder: Path
    rows: list[Any]
    facts: dict[str, Any]
    others: dict[str, list[Any]]

    @property
    def template(self) -> QuestionTemplate:
        """The template in which the models were fine-tuned."""
        return QuestionTemplate(self.facts["question_template"], self.facts["answer_template"])

    def retain_log(self, forget_rows: int) -> dict[str, Any]:
        """Return TOFU's log of the model that never saw the last rows.

        Raises:
            SystemExit: There is no log for so many rows.
        """
        if self.full == EMBEDDED:
            authors, rest = divmod(forget_rows, tofu.ROWS_PER_AUTHOR)
            if rest:
                raise SystemExit(f"an author has {tofu.ROWS_PER_AUTHOR} rows, got forget_rows {forget_rows}")
            return tofu.twin_log(authors)
        log = self.folder / f"retain{forget_rows}_log.json"
        if not log.is_file():
            raise SystemExit(f"{log} is missing: scripts/finetune_tofu.py --last {forget_rows}")
        return json.loads(log.read_text(encoding="utf-8"))


def models_of(options: argparse.Namespace) -> Models:
    """Return the models and sets that the options name."""
    folder = options.models
    if folder is None:
        template = {
            "question_template": TOFU_TEMPLATE.question,
            "answer_template": TOFU_TEMPLATE.answer,
        }
        weights = hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()[:16]
        facts = {"base": "the embedded model", "weights": weights, **template}
        return Models(EMBEDDED, EMBEDDED_CACHE, list(read_rows(EMBEDDED / "tofu.jsonl")), facts, {})
    missing = [name for name in ("full.jsonl", "full/finetuning.json") if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {missing[0]}: scripts/finetune_tofu.py --out makes it")
    others = {"real_authors": options.real_authors, "world_facts": options.world_facts}
    return Models(
        folder / "full",
        folder,
        list(read_rows(folder / "full.jsonl")),
        json.loads((folder / "full" / "finetuning.json").read_text(encoding="utf-8")),
        {name: list(read_rows(source)) for name, source in others.items()},
    )


def base_of(cell: Cell, models: Models) -> tofu.Base:
    """Return the model and the rows of a cell."""
    forget, retain = models.rows[-cell.forget_rows :], models.rows[: -cell.forget_rows]
    perturbed = [row for row in retain if row.get("perturbed_answer")]
    sets = {"retain": perturbed, **models.others}
    return tofu.Base(
        str(models.full),
        forget,
        retain,
        {name: tofu.spread(rows, cell.utility_rows) for name, rows in sets.items()},
        models.retain_log(cell.forget_rows),
        models.template,
        cell.dtype,
        tofu.Base.batch_size if models.full == EMBEDDED else BATCH,
    )


def settings_of(cell: Cell, models: Models) -> dict[str, Any]:
    """Return the fields of ``UnlearnConfig`` of a cell.

    Raises:
        ValueError: ``method_args`` is no JSON.
    """
    settings = {name: value for name, value in asdict(cell).items() if name not in OURS}
    settings["method_args"] = json.loads(cell.method_args) if cell.method_args else None
    templates = {name: models.facts[name] for name in ("question_template", "answer_template")}
    cache = str(models.folder / "fisher")  # the row scales of one forget set serve all of its cells
    return {**settings, **templates, "fisher_cache_dir": cache}


def check_cells(cells: Sequence[Cell], models: Models) -> None:
    """Refuse cells that cannot run, before any cell runs.

    Raises:
        SystemExit: A method or a file is missing, or a setting cannot be. The message names each.
    """
    problems: dict[str, None] = {}
    for cell in cells:
        try:
            tofu.config_of(settings_of(cell, models), "unused")
            base_of(cell, models)
        except (ValueError, SystemExit) as error:
            problems[str(error)] = None
    if problems:
        raise SystemExit(
            "the grid has cells that cannot run:\n" + "\n".join(f"- {text}" for text in problems)
        )


def check_results(path: Path, models: Models) -> None:
    """Refuse a result file of other models: their lines would be compared."""
    for line in read_rows(path) if path.exists() and path.stat().st_size else ():
        if line["models"] != models.facts:
            raise SystemExit(f"{path} has the cells of other models than {models.folder}; pass another --out")


# --- one cell -------------------------------------------------------------------------------------


class Measured:
    """A function of a model that returns its TOFU log, and keeps it with the trained parameters.

    The first model is the one before unlearning, whose log is measured once for all cells.

    Args:
        tokenizer: The tokenizer.
        base: The rows.
        models: The models, in whose folder the log is kept.
    """

    def __init__(self, tokenizer: Any, base: tofu.Base, models: Models) -> None:
        self.tokenizer, self.base, self.models = tokenizer, base, models
        self.logs: list[Mapping[str, Any]] = []
        self.states: list[dict[str, Any]] = []

    def __call__(self, model: Any) -> Mapping[str, Any]:
        if self.logs:
            log = tofu.measured_log(model, self.tokenizer, self.base)
        else:
            key = [self.base.forget, self.base.utility_rows, self.base.dtype]
            log = cached(
                self.models, "before", key, lambda: tofu.measured_log(model, self.tokenizer, self.base)
            )
        self.logs.append(log)
        self.states.append({name: parameter.detach().cpu().clone() for name, parameter in trained(model)})
        return log


def trained(model: Any) -> list[tuple[str, Any]]:
    """Return the trained parameters of a model."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def cached(models: Models, name: str, key: Any, make: Any) -> Any:
    """Return what an earlier cell has made for the same models and key, or make it."""
    folder, key = models.folder / "cache", [models.facts, key]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = folder / f"{name}-{digest}.json"
    if not file.is_file():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as unfinished:
            unfinished.write_text(json.dumps(made), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def robustness(model: Any, tokenizer: Any, cell: Cell, base: tofu.Base, models: Models) -> dict[str, Any]:
    """Return the figures of relearning, with its control, and of rounded weights."""
    from loku.attacks import quantisation_attack, relearning_attack

    sets = {"forget": base.forget, "retain": base.utility_rows["retain"]}
    rounded = quantisation_attack(model, tokenizer, sets, bits=[BITS], template=base.template)
    options: dict[str, Any] = {
        "steps": cell.relearning_steps,
        "every": max(1, cell.relearning_steps // 5),
        "seed": cell.seed,
        "template": base.template,
    }

    def relearned(model: Any) -> dict[str, Any]:
        return relearning_attack(model, tokenizer, base.forget, **options)["unlearned"]

    def control() -> dict[str, Any]:
        other, _ = load_model(never_saw, cell.dtype)
        return relearned(other.to(model.device))

    figures: dict[str, Any] = {
        "rounded": {
            title: {name: measures["probability"] for name, measures in of_sets.items()}
            for title, of_sets in rounded["roundings"].items()
        },
        "relearning": relearned(model),
    }
    if (never_saw := models.folder / f"retain{cell.forget_rows}").is_dir():
        key = [cell.forget_rows, cell.relearning_steps, cell.seed, cell.dtype]
        figures["control"] = cached(models, "control", key, control)
    return figures


def author_rows(log: Mapping[str, Any], base: tofu.Base) -> dict[str, list[list[float]]]:
    """Return [author, answer probability] of each measured row of the forget and the retained rows."""
    from loku.evaluation.tofu import SECTIONS

    all_rows = [*base.retain, *base.forget]
    authors = {row["question"]: index // tofu.ROWS_PER_AUTHOR for index, row in enumerate(all_rows)}
    sets = {"forget": base.forget, "retain": base.utility_rows["retain"]}
    return {
        name: [
            [authors[row["question"]], round(math.exp(-loss), DIGITS)]
            for row, loss in zip(rows, log[SECTIONS[name]]["avg_gt_loss"].values(), strict=True)
        ]
        for name, rows in sets.items()
    }


def run_cell(cell: Cell, base: tofu.Base, models: Models) -> dict[str, Any]:
    """Return the line of a cell: its curve with the rows, its robustness, the models and the seconds."""
    kept: list[Measured] = []

    def curve_of(tokenizer: Any) -> Any:
        kept.append(Measured(tokenizer, base, models))
        return tofu.curve_callback(tokenizer, base, kept[0], cell.measure_every)

    model, tokenizer, curve, seconds = tofu.unlearned(settings_of(cell, models), base, curve_of)
    found: dict[str, Any] | None = None
    counted = claims_report.passing_point({"curve": curve.points})
    if counted is not None and cell.relearning_steps:
        for name, parameter in trained(model):
            parameter.data.copy_(kept[0].states[curve.points.index(counted)][name])
        found = robustness(model, tokenizer, cell, base, models)
    return {
        "curve": [
            {**point, "rows": author_rows(log, base)}
            for point, log in zip(curve.points, kept[0].logs, strict=True)
        ],
        "robustness": found,
        "models": models.facts,
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "claims.jsonl")
    parser.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        help="what scripts/finetune_tofu.py made (default: the embedded model)",
    )
    for name in ("real-authors", "world-facts"):
        default = f"locuslab/TOFU:{name.replace('-', '_')}_perturbed"
        parser.add_argument(f"--{name}", metavar="SOURCE", default=default, help=f"default: {default}")
    options = grid.parse_arguments(parser, argv)
    models = models_of(options)
    cells = grid.chosen_cells(options, Cell)
    check_cells(cells, models)
    check_results(options.out, models)
    grid.run_and_report(
        cells,
        run_cell,
        lambda cell: (base_of(cell, models), models),
        options,
        tofu.summary,
        claims_report.write_report,
    )


if __name__ == "__main__":
    main()

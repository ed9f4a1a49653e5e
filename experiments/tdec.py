"""Unlearning of memorised sequences: the epochs until they cannot be extracted, and the cost to the rest.

    python experiments/tdec.py [--grid experiments/tdec.yaml] [--method ihl gd ...] [--jobs N]

This is the paper's experiment on the Training Data Extraction Challenge (LoKU, section 4.1). It forgets 32
sequences of 200 tokens, with WikiText as the retain set. It stops at the first epoch (of at most 20) after
which Extraction Likelihood (EL10) and Memorisation Accuracy are both at or under those of sequences that the
model never saw. ``--tasks 4`` unlearns four disjoint sets of 32, one after the other (Figure 6). Cells and
grids: see ``grid.py``. Finished cells are lines of ``--out``, by default ``experiments/results/tdec.jsonl``.
At the end ``tdec_report.py`` draws and tabulates them.

The model is a GPT-Neo of 1.4M parameters. The first run trains it until it has memorised its texts, which
takes several minutes, and keeps it in ``--work-dir``. Its texts are sequences of TOFU's questions and
answers, which are forgotten, and passages of WikiText (``experiments/data``).

``--model PATH`` needs ``--forget-text``, ``--holdout-text``, ``--retain-text`` and ``--unseen-text``: each a
file with a text on each line, JSON lines with ``text``, or a data set on the hub. The first 200 tokens of
each text count. The model has memorised the forget texts, 32 for each task, and the retain texts. It has
never seen the hold-out texts, which are like the forget texts, nor the unseen texts, which are like the
retain texts.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import grid
import tdec_report
import torch

from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model
from loku.objectives import OBJECTIVES
from loku.saving.destinations import destination
from loku.trust import load_tokenizer

DATA = Path(__file__).parent / "data" / "wikitext.jsonl"
SEQUENCES, TOKENS = 32, 200  # sequences of a forget set, tokens of a sequence
TASKS = 4
RETAIN_ROWS, UNSEEN_ROWS = 128, 64
STRIDE = 48  # tokens between the prefixes for EL10: 4 prefixes a sequence
EVALUATION_BATCH = 128

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Cell:
    """One run. Every field but ``tasks`` is a setting of ``loku.UnlearnConfig``."""

    method: str = "ihl"
    init: str = "fila"
    tuning: str = "lora"
    lora_rank: int = 16
    learning_rate: float = 1e-3
    target_modules: str = "qv+ffn"
    num_train_epochs: int = 20
    seed: int = 0
    tasks: int = 1


@dataclass(frozen=True)
class Base:
    """The model and the rows that all cells share. A row is ``{"input_ids", "labels"}``.

    Args:
        model: The path of the model.
        tasks: The rows of each forget set.
        holdout: Rows like the forget sets that the model never saw.
        retain: The rows to retain.
        unseen: Rows like the retain set that the model never saw.
    """

    model: str
    tasks: list[list[Row]]
    holdout: list[Row]
    retain: list[Row]
    unseen: list[Row]


# --- model and sets -------------------------------------------------------------------------------


def rows_of(sequences: Iterable[Sequence[int]]) -> list[Row]:
    """Return rows whose every token is labelled."""
    return [{"input_ids": list(ids), "labels": list(ids)} for ids in sequences]


def cut(texts: Iterable[str], tokenizer: Any, count: int) -> list[Row]:
    """Return ``count`` sequences of ``TOKENS`` tokens from texts joined by end-of-text tokens."""
    stream = [token for text in texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    ends = range(0, len(stream) + 1, TOKENS)
    sequences = [stream[start:end] for start, end in pairwise(ends)]
    if len(sequences) < count:
        raise SystemExit(f"the texts make {len(sequences)} sequences of {TOKENS} tokens, {count} are needed")
    return rows_of(sequences[:count])


def first_tokens(texts: Sequence[str], tokenizer: Any, count: int) -> list[Row]:
    """Return the first ``TOKENS`` tokens of each of ``count`` texts."""
    return rows_of(tokenizer(text).input_ids[:TOKENS] for text in texts[:count])


def memorise(
    rows: list[Row],
    output: Path,
    tokenizer: Any,
    rounds: Sequence[int] = (30, 15),
    learning_rate: float = 2e-3,
    sizes: tuple[int, int] = (4, 128),
) -> None:
    """Train a GPT-Neo from scratch, and save it and its tokenizer.

    Args:
        rows: The rows to memorise.
        output: The folder of the model.
        tokenizer: The tokenizer.
        rounds: The epochs of each round. The learning rate falls to 0 in a round, and the next begins anew.
        learning_rate: The largest learning rate.
        sizes: The number of layers and the width.
    """
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, Trainer, TrainingArguments

    from loku.data import collate, padding_id

    layers, width = sizes
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2 * TOKENS,
            hidden_size=width,
            num_layers=layers,
            attention_types=[[["global", "local"], layers // 2]],
            num_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            embed_dropout=0.0,
            attention_dropout=0.0,
            resid_dropout=0.0,
        )
    )
    collator = partial(collate, pad_token_id=padding_id(tokenizer))
    for epochs in rounds:
        arguments = TrainingArguments(
            output_dir=str(output.with_name(f"{output.name}_trainer")),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            per_device_train_batch_size=4,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    with destination(output, "merged") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def trained_base(work_dir: Path) -> Base:
    """Return the sets and the model that has memorised them. It is trained here if ``work_dir`` has none."""
    tokenizer = load_tokenizer(EMBEDDED)
    texts = [f"{row['question']} {row['answer']}" for row in read_rows(EMBEDDED / "tofu.jsonl")]
    sequences = cut(texts, tokenizer, SEQUENCES * (TASKS + 1))
    passages = first_tokens([row["text"] for row in read_rows(DATA)], tokenizer, RETAIN_ROWS + UNSEEN_ROWS)
    tasks = [sequences[SEQUENCES * task : SEQUENCES * (task + 1)] for task in range(TASKS)]
    retain = passages[:RETAIN_ROWS]
    path = work_dir / "gpt-neo"
    if not (path / "config.json").exists():
        memorise([row for task in tasks for row in task] + retain, path, tokenizer)
    return Base(str(path), tasks, sequences[SEQUENCES * TASKS :], retain, passages[RETAIN_ROWS:])


def given_base(options: Any) -> Base:
    """Return the model and the sets that the options name."""
    names = ("forget_text", "holdout_text", "retain_text", "unseen_text")
    missing = [name for name in names if not getattr(options, name)]
    if missing:
        raise SystemExit(f"--model needs its texts too; missing: {', '.join(missing)}")
    tokenizer = load_tokenizer(options.model)
    forget, holdout, retain, unseen = (given_rows(getattr(options, name), tokenizer) for name in names)
    if len(forget) % SEQUENCES or min(len(row["input_ids"]) for row in (*forget, *holdout)) < TOKENS:
        raise SystemExit(f"what is forgotten is sets of {SEQUENCES} texts of {TOKENS} tokens or more")
    tasks = [forget[start : start + SEQUENCES] for start in range(0, len(forget), SEQUENCES)]
    return Base(options.model, tasks, holdout, retain, unseen)


def given_rows(source: str, tokenizer: Any) -> list[Row]:
    """Return the first ``TOKENS`` tokens of all texts of a data set."""
    texts = [row if isinstance(row, str) else row["text"] for row in read_rows(source)]
    if not texts:
        raise SystemExit(f"{source} has no texts")
    return first_tokens(texts, tokenizer, len(texts))


# --- one cell -------------------------------------------------------------------------------------


def measure(model: Any, base: Base, count: int) -> dict[str, Any]:
    """Return EL10 and MA of the first ``count`` forget sets, and perplexity of retain and unseen rows."""
    from loku.evaluation import extraction_likelihood, token_measures, token_scores

    options: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "progress": False}
    sets = [*base.tasks[:count], base.retain, base.unseen]
    scores = [token_scores(model, rows, **options) for rows in sets]
    *forget, retain, unseen = (token_measures(of_rows) for of_rows in scores)
    return {
        "extraction_likelihood": [
            extraction_likelihood(model, rows, stride=STRIDE, scores=of_rows, **options).mean
            for rows, of_rows in zip(base.tasks[:count], scores, strict=False)
        ],
        "memorization_accuracy": [task["memorization_accuracy"] for task in forget],
        "retain_perplexity": retain["perplexity"],
        "retain_accuracy": retain["memorization_accuracy"],
        "unseen_perplexity": unseen["perplexity"],
    }


def stopping_rule(forget: list[Row], holdout: list[Row], thresholds: dict[str, float] | None) -> Any:
    """Return the callback of the paper's rule.

    Memorisation Accuracy is measured first. EL10, which generates text and takes longest, waits until
    Memorisation Accuracy is met.

    Args:
        forget: The rows of the forget set.
        holdout: The rows that the model never saw.
        thresholds: The thresholds of the original model. None takes them from the model before training.
    """
    from loku.callbacks import ExtractionStopping
    from loku.evaluation import token_measures

    class AccuracyFirst(ExtractionStopping):
        def measure(self, model: Any) -> dict[str, Any]:
            accuracy = token_measures(self.scores(model, "forget"))["memorization_accuracy"]
            if accuracy > self.thresholds["holdout_memorization_accuracy"]:
                return {"forget_memorization_accuracy": accuracy}
            return super().measure(model)

        def should_stop(self, entry: dict[str, Any]) -> bool:
            return "forget_extraction_likelihood_10" in entry and super().should_stop(entry)

    return AccuracyFirst(forget, holdout, stride=STRIDE, batch_size=EVALUATION_BATCH, thresholds=thresholds)


def training_flops(
    parameters: int, cell: Cell, forget_tokens: int, retain_tokens: int, epochs: float
) -> float:
    """Estimate the FLOPs of a run, after Kaplan et al. (2020).

    Each parameter and token costs 2 FLOPs forward, 2 for the gradient of the activations and 2 for the
    gradient of the weights, which LoRA saves. An epoch runs each forget row. Methods with a retain loss run a
    retain row of the same length with it, and some methods run forwards of the original model. FILA's Fisher
    runs both sets once, with weight gradients.

    Args:
        parameters: The number of parameters of the model.
        cell: The cell.
        forget_tokens: The number of tokens of the forget set.
        retain_tokens: The number of tokens of the retain set.
        epochs: The number of epochs.
    """
    objective = OBJECTIVES[cell.method]
    step = 4 if cell.tuning == "lora" else 6
    step = step * len(objective.kinds) + 2 * len(objective.reference_kinds)
    flops = step * parameters * forget_tokens * epochs
    if cell.tuning == "lora" and cell.init == "fila":
        flops += 6 * parameters * (forget_tokens + retain_tokens)
    return flops


# (model path, number of forget sets) -> measures before unlearning, for the cells of this process
_before: dict[tuple[str, int], dict[str, Any]] = {}


def run_cell(cell: Cell, base: Base) -> dict[str, Any]:
    """Return the figures of a cell.

    Returns:
        ``before`` has the measures before unlearning. ``steps`` has an entry for each forget set in turn:
        ``epochs``, ``forgotten`` (whether the rule was met), the callback's ``history``, ``training_flops``
        (an estimate), ``seconds``, and the measures of the model at that time.
    """
    import transformers

    from loku import UnlearnConfig, unlearn

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if cell.tasks > len(base.tasks):
        raise ValueError(f"there are {len(base.tasks)} forget sets, not {cell.tasks}")
    model, tokenizer = load_model(base.model)
    key = base.model, cell.tasks
    if key not in _before:
        _before[key] = measure(model, base, cell.tasks)
    settings = {
        name: getattr(cell, name)
        for name in ("method", "tuning", "init", "lora_rank", "learning_rate", "target_modules", "seed")
    }
    settings["retain_weight"] = 1.0  # Eq. 3
    done: list[dict[str, Any]] = []
    thresholds = None
    for task in range(cell.tasks):
        rule = stopping_rule(base.tasks[task], base.holdout, thresholds)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            config = UnlearnConfig(
                **grid.used_settings(settings),
                lora_alpha=2 * cell.lora_rank,
                num_train_epochs=cell.num_train_epochs,
                lr_scheduler_type="constant",  # the rule decides the number of epochs
                output_dir=directory,
                per_device_train_batch_size=8,
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            result = unlearn(
                model, base.tasks[task], base.retain, config=config, tokenizer=tokenizer, callbacks=[rule]
            )
        seconds = time.perf_counter() - start
        thresholds = rule.thresholds
        model = result.model.merge_and_unload() if cell.tuning == "lora" else result.model
        epochs = round(rule.history[-1]["epoch"])
        forget_tokens, retain_tokens = (
            sum(len(row["input_ids"]) for row in rows) for rows in (base.tasks[task], base.retain)
        )
        done.append(
            {
                "epochs": epochs,
                "forgotten": rule.should_stop(rule.history[-1]),
                "history": rule.history,
                "training_flops": training_flops(parameters, cell, forget_tokens, retain_tokens, epochs),
                "seconds": seconds,
                **measure(model, base, cell.tasks),
            }
        )
    return {"before": _before[key], "steps": done}


def summary(line: Mapping[str, Any]) -> str:
    """Return the text of a finished cell for the progress bar."""
    last = line["steps"][-1]
    return f"{last['epochs']} epochs, EL10 {last['extraction_likelihood'][-1]:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "tdec.jsonl")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/tdec"), help="folder of the trained model"
    )
    parser.add_argument("--model", metavar="PATH", help="the model (default: one that is trained here)")
    for name in ("forget-text", "holdout-text", "retain-text", "unseen-text"):
        parser.add_argument(f"--{name}", metavar="FILE", help="with --model: its texts")
    options = grid.parse_arguments(parser, argv)

    base = given_base(options) if options.model else trained_base(options.work_dir)
    cells = grid.chosen_cells(options, Cell)
    grid.run_and_report(cells, run_cell, lambda cell: (base,), options, summary, tdec_report.write_report)


if __name__ == "__main__":
    main()

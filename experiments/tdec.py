"""Unlearning memorised sequences: how soon they can no longer be extracted, and what it costs the rest.

    python experiments/tdec.py [--grid experiments/tdec.yaml] [--method ihl gd ...] [--jobs N]

The paper's experiment on the Training Data Extraction Challenge (LoKU, section 4.1): forget 32 sequences of
200 tokens, WikiText as the retain set, and stop at the first epoch (of at most 20) after which Extraction
Likelihood (EL10) and Memorisation Accuracy are both at or under those of sequences that the model never
saw. ``--tasks 4`` unlearns four disjoint sets of 32, one after the other (Figure 6). Cells and grids: see
``grid.py``. Finished cells are lines of ``--out``, by default results/tdec.jsonl; at the end
``tdec_report.py`` draws and tabulates them.

The model is a GPT-Neo of 1.4M parameters, which is trained at the first run, until it has memorised its
texts (several minutes), and kept in ``--work-dir``: sequences of TOFU's questions and answers, which are
what is forgotten, and passages of WikiText (``experiments/data``). With ``--model PATH`` give
``--forget-text``, ``--holdout-text``, ``--retain-text`` and ``--unseen-text``: a text a line, or JSON lines
with ``text``, or a data set on the hub, of which the first 200 tokens of each text are taken. The model has
memorised the first, 32 texts for each task, and never seen the second and the last, texts like the first and
the third.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import grid
import tdec_report
import torch

from loku.data.files import read_rows
from loku.demo import EMBEDDED, load_model
from loku.objectives import OBJECTIVES
from loku.saving.directories import whole_directory

DATA = Path(__file__).parent / "data" / "wikitext.jsonl"
SEQUENCES, TOKENS = 32, 200  # of a forget set
TASKS = 4
RETAIN_ROWS, UNSEEN_ROWS = 128, 64
STRIDE = 48  # between the prefixes of which EL10 is measured: 4 a sequence
EVALUATION_BATCH = 128


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
    """What all cells share: a model and rows of tokens, ``{"input_ids", "labels"}``."""

    model: str
    tasks: list  # rows of each forget set
    holdout: list  # rows like those, which the model never saw
    retain: list
    unseen: list  # rows like the retain set, which the model never saw


# --- model and sets -------------------------------------------------------------------------------


def rows_of(sequences):
    return [{"input_ids": list(ids), "labels": list(ids)} for ids in sequences]


def cut(texts, tokenizer, count):
    """``count`` sequences of ``TOKENS`` tokens, of texts joined by end-of-text tokens."""
    stream = [token for text in texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    ends = range(0, len(stream) + 1, TOKENS)
    sequences = [stream[start:end] for start, end in pairwise(ends)]
    if len(sequences) < count:
        raise SystemExit(f"the texts make {len(sequences)} sequences of {TOKENS} tokens, {count} are needed")
    return rows_of(sequences[:count])


def first_tokens(texts, tokenizer, count):
    """The first ``TOKENS`` tokens of each of ``count`` texts."""
    return rows_of(tokenizer(text).input_ids[:TOKENS] for text in texts[:count])


def memorise(rows, output, tokenizer, rounds=(30, 15), learning_rate=2e-3, sizes=(4, 128)):
    """Train a GPT-Neo from scratch on ``rows``, and save it and its tokenizer to ``output``.

    rounds: epochs of each; the learning rate falls to 0 in a round, and the next begins anew.
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
    with whole_directory(output, key="config.json", replaced=("*",)) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def trained_base(work_dir):
    """The sets, and the model that has memorised them: trained here if ``work_dir`` has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    texts = [f"{row['question']} {row['answer']}" for row in read_rows(EMBEDDED / "tofu.jsonl")]
    sequences = cut(texts, tokenizer, SEQUENCES * (TASKS + 1))
    passages = first_tokens([row["text"] for row in read_rows(DATA)], tokenizer, RETAIN_ROWS + UNSEEN_ROWS)
    tasks = [sequences[SEQUENCES * task : SEQUENCES * (task + 1)] for task in range(TASKS)]
    retain = passages[:RETAIN_ROWS]
    path = work_dir / "gpt-neo"
    if not (path / "config.json").exists():
        memorise([row for task in tasks for row in task] + retain, path, tokenizer)
    return Base(str(path), tasks, sequences[SEQUENCES * TASKS :], retain, passages[RETAIN_ROWS:])


def given_base(options):
    from transformers import AutoTokenizer

    names = ("forget_text", "holdout_text", "retain_text", "unseen_text")
    missing = [name for name in names if not getattr(options, name)]
    if missing:
        raise SystemExit(f"--model needs its texts too; missing: {', '.join(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    forget, holdout, retain, unseen = (given_rows(getattr(options, name), tokenizer) for name in names)
    if len(forget) % SEQUENCES or min(len(row["input_ids"]) for row in (*forget, *holdout)) < TOKENS:
        raise SystemExit(f"what is forgotten is sets of {SEQUENCES} texts of {TOKENS} tokens or more")
    tasks = [forget[start : start + SEQUENCES] for start in range(0, len(forget), SEQUENCES)]
    return Base(options.model, tasks, holdout, retain, unseen)


def given_rows(source, tokenizer):
    texts = [row if isinstance(row, str) else row["text"] for row in read_rows(source)]
    if not texts:
        raise SystemExit(f"{source} has no texts")
    return first_tokens(texts, tokenizer, len(texts))


# --- one cell -------------------------------------------------------------------------------------


def measure(model, base, count):
    """EL10 and MA of the first ``count`` forget sets, perplexity of the retain and the unseen rows."""
    from loku.evaluation import extraction_likelihood, token_measures, token_scores

    options = {"batch_size": EVALUATION_BATCH, "progress": False}
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


def stopping_rule(forget, holdout, thresholds):
    """The paper's rule; ``thresholds`` are those of the original model, None if this is it. What takes
    longest, generating for EL10, waits until Memorisation Accuracy is met."""
    from loku.callbacks import ExtractionStopping
    from loku.evaluation import token_measures

    class AccuracyFirst(ExtractionStopping):
        def measure(self, model):
            accuracy = token_measures(self.scores(model, "forget"))["memorization_accuracy"]
            if accuracy > self.thresholds["holdout_memorization_accuracy"]:
                return {"forget_memorization_accuracy": accuracy}
            return super().measure(model)

        def should_stop(self, entry):
            return "forget_extraction_likelihood_10" in entry and super().should_stop(entry)

    return AccuracyFirst(forget, holdout, stride=STRIDE, batch_size=EVALUATION_BATCH, thresholds=thresholds)


def training_flops(parameters, cell, forget_tokens, retain_tokens, epochs):
    """An estimate, after Kaplan et al. (2020): 2 a parameter and token forward, 2 for the gradient of the
    activations, 2 for that of the weights, which LoRA saves. An epoch sees each forget row, and with it what
    else the method runs: a retain row as long, and forwards of the original model. FILA's Fisher sees both
    sets once, weight gradients included."""
    objective = OBJECTIVES[cell.method]
    step = 4 if cell.tuning == "lora" else 6
    step = step * len(objective.kinds) + 2 * len(objective.reference_kinds)
    flops = step * parameters * forget_tokens * epochs
    if cell.tuning == "lora" and cell.init == "fila":
        flops += 6 * parameters * (forget_tokens + retain_tokens)
    return flops


_before = {}  # (model path, number of forget sets) -> what was measured of it, for the cells of this process


def run_cell(cell, base):
    """``before`` and, for each forget set in turn, ``steps``: epochs, whether the rule was met, the
    callback's ``history``, ``training_flops`` (an estimate), seconds, and ``measure`` of the model then."""
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
    done, thresholds = [], None
    for task in range(cell.tasks):
        rule = stopping_rule(base.tasks[task], base.holdout, thresholds)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            config = UnlearnConfig(
                **settings,
                lora_alpha=2 * cell.lora_rank,
                retain_weight=1.0,  # Eq. 3
                num_train_epochs=cell.num_train_epochs,
                lr_scheduler_type="constant",  # the number of epochs is not known beforehand
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


def summary(line):
    last = line["steps"][-1]
    return f"{last['epochs']} epochs, EL10 {last['extraction_likelihood'][-1]:.3f}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_arguments(parser, Cell, grid.RESULTS / "tdec.jsonl")
    parser.add_argument("--work-dir", type=Path, default=Path("build/tdec"), help="keeps the trained model")
    parser.add_argument("--model", help="default: the one that is trained here")
    for name in ("forget-text", "holdout-text", "retain-text", "unseen-text"):
        parser.add_argument(f"--{name}", metavar="FILE")
    options = grid.parse_arguments(parser, argv)

    base = given_base(options) if options.model else trained_base(options.work_dir)
    cells = grid.chosen_cells(options, Cell)
    grid.run_and_report(cells, run_cell, lambda cell: (base,), options, summary, tdec_report.write_report)


if __name__ == "__main__":
    main()

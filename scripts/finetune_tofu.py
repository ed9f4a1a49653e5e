"""Fine-tune a causal LM on TOFU, whole and without the forget set, for ``experiments/tofu.py --model``.

    python scripts/finetune_tofu.py BASE --full full.jsonl --forget forget10_perturbed.jsonl --out DIR

BASE is a path or hub name. The files are TOFU's, as JSON lines. All parameters are tuned as in TOFU (Maini et
al., 2024, appendix): 5 epochs, an effective batch of 32 rows, AdamW with weight decay 0.01, a linear warm-up
over the first epoch. The script writes ``DIR/full``, ``DIR/retain.jsonl`` (the rows of ``--full`` that are
not in ``--forget``), ``DIR/retain`` (the model trained on them) and ``DIR/retain_log.json`` (TOFU's log of
that model). A finished model is not trained again.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from loku.data import collate, padding_id, tokenize_dataset
from loku.data.files import read_rows
from loku.evaluation import evaluate_tofu_rows, write_report
from loku.evaluation.tofu import SECTIONS
from loku.models import load_model
from loku.saving.destinations import destination
from loku.trust import load_tokenizer


def finetune(base: str, rows: list[Any], output: Path, options: argparse.Namespace) -> None:
    """Train a model on question/answer rows and save it and its tokenizer.

    Args:
        base: The path or hub name of the model.
        rows: The rows.
        output: The folder of the trained model.
        options: The parsed options.
    """
    tokenizer = load_tokenizer(base)
    # Weights of 16 bits are too coarse for this learning rate: half of the steps round to zero.
    model = load_model(base, {"dtype": torch.float32})
    arguments = TrainingArguments(
        output_dir=str(output.with_name(f"{output.name}_trainer")),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=max(1, 32 // options.batch_size),
        weight_decay=0.01,
        warmup_steps=-(-len(rows) // 32),
        lr_scheduler_type="linear",
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    tokens = tokenize_dataset(rows, tokenizer, max_length=options.max_length, name="TOFU")
    collator = partial(collate, pad_token_id=padding_id(tokenizer))
    Trainer(model, arguments, train_dataset=tokens, data_collator=collator).train()
    with destination(output, "merged") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="path or hub name of the base model")
    parser.add_argument("--full", required=True, metavar="FILE", help="all rows")
    parser.add_argument("--forget", required=True, metavar="FILE", help="rows to forget, all in --full")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--epochs", type=float, default=5, help="default: 5")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-5, help="1e-5 for Llama-2, 2e-5 for Phi-1.5"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="rows at a time; a step has 32")
    parser.add_argument("--max-length", type=int, default=500, help="longest row, in tokens")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    options = parser.parse_args(argv)

    full, forget = read_rows(options.full), read_rows(options.forget)
    questions = {row["question"] for row in forget}
    retain = [row for row in full if row["question"] not in questions]
    if len(retain) + len(forget) != len(full):
        raise SystemExit("the rows of --forget are not all in --full")
    for name, rows in (("full", full), ("retain", retain)):
        if not (options.out / name / "config.json").exists():
            finetune(options.base, rows, options.out / name, options)
    (options.out / "retain.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in retain), encoding="utf-8"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(options.out / "retain")
    model.to(device)
    tokenizer = load_tokenizer(options.out / "retain")
    section = evaluate_tofu_rows(model, tokenizer, forget, description="the retain-only model")
    write_report(options.out / "retain_log.json", {SECTIONS["forget"]: section})


if __name__ == "__main__":
    main()

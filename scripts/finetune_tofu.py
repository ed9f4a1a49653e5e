"""Fine-tune a causal LM on TOFU, whole and without the forget set, for ``experiments/tofu.py --model``.

    python scripts/finetune_tofu.py BASE --full full.jsonl --forget forget10_perturbed.jsonl --out DIR

BASE is a path or hub name; the files are TOFU's, as JSON lines. Full-parameter tuning as TOFU's (Maini et
al., 2024, appendix): 5 epochs, effective batch of 32, AdamW with weight decay 0.01, a linear warm-up over
the first epoch. Writes ``DIR/full``, ``DIR/retain`` (on the rows of ``--full`` that are not in
``--forget``), ``DIR/retain.jsonl`` (those rows) and ``DIR/retain_log.json`` (TOFU's log of the retain-only
model). A finished model is not trained again.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from loku.data import collate, padding_id, tokenize_dataset
from loku.data.files import read_rows
from loku.evaluation import evaluate_tofu_rows, write_report
from loku.evaluation.tofu import SECTIONS
from loku.saving.directories import whole_directory


def finetune(base, rows, output, options):
    """Train ``base`` on question/answer rows and save model and tokenizer to ``output``."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Weights of 16 bits would not take steps of this learning rate: half of them round to nothing.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
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
    with whole_directory(output, key="config.json", replaced=("*",)) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("--full", required=True, metavar="FILE")
    parser.add_argument("--forget", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="TOFU: 1e-5 Llama-2, 2e-5 Phi-1.5")
    parser.add_argument("--batch-size", type=int, default=4, help="rows at a time, of the 32 of a step")
    parser.add_argument("--max-length", type=int, default=500)
    parser.add_argument("--seed", type=int, default=42)
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
    model = AutoModelForCausalLM.from_pretrained(options.out / "retain").to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.out / "retain")
    section = evaluate_tofu_rows(model, tokenizer, forget, description="the retain-only model")
    write_report(options.out / "retain_log.json", {SECTIONS["forget"]: section})


if __name__ == "__main__":
    main()

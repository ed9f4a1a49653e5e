"""Fine-tune a causal LM on TOFU, whole and without forget sets, for ``experiments/tofu.py --model``.

    python scripts/finetune_tofu.py BASE --full full.jsonl --forget forget10_perturbed.jsonl --out DIR
    python scripts/finetune_tofu.py BASE --full forget10_perturbed.jsonl --last 40 200 --out DIR

BASE is a path or hub name. The rows are in files or on the hub, as for ``loku unlearn``. All parameters are
tuned as in TOFU (Maini et al., 2024, appendix): 5 epochs, an effective batch of 32 rows, AdamW with weight
decay 0.01, a linear warm-up over the first epoch. ``--question-template`` asks the questions in another form
than TOFU's, such as "chat".

The script writes ``DIR/full`` and its rows, ``DIR/full.jsonl``. With ``--forget`` it also writes
``DIR/retain.jsonl`` (the rows of ``--full`` that are not in ``--forget``), ``DIR/retain`` (the model trained
on them) and ``DIR/retain_log.json`` (TOFU's log of that model on the rows of ``--forget``). ``--last`` makes
the same for forget sets that are the last rows of ``--full``, each with its number in the names:
``DIR/retain40`` and so on. ``experiments/claims.py`` reads these.

A finished model is not trained again, and one that was stopped goes on from its last epoch. In its folder
``finetuning.json`` has the settings. The script prints what each model has memorised of its rows, and of the
rows that it never saw.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loku.benchmarks.finetuning import SETTINGS, finetune, is_finetuned
from loku.commands import add_template_options, template_of
from loku.data import tokenize_dataset
from loku.data.files import read_rows
from loku.evaluation import evaluate_tofu_rows, token_scores, write_report
from loku.evaluation.scores import token_measures
from loku.evaluation.tofu import SECTIONS
from loku.fingerprints import ordered_rows_fingerprint
from loku.models import load_model
from loku.trust import load_tokenizer

# The options that decide a model beside its rows.
DECIDING = ("base", "epochs", "learning_rate", "rows_per_step", "batch_size", "max_length", "seed", "bf16")


def facts_of(tokens: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides a fine-tuned model: the options, the template and the digest of its rows."""
    names = (*DECIDING, "question_template", "answer_template")
    facts = {name: getattr(options, name) for name in names}
    return {**facts, "rows": len(tokens), "rows_digest": ordered_rows_fingerprint(tokens)}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``transformers.TrainingArguments`` that the options stand for."""
    return {
        **SETTINGS,
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "seed": options.seed,
        "bf16": options.bf16,
        "use_cpu": not torch.cuda.is_available(),
    }


def forget_sets(full: list[Any], options: argparse.Namespace) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return the name of each retain-only model, with its retained rows and the rows that it never sees."""
    if options.last:
        if too_many := [count for count in options.last if not 0 < count < len(full)]:
            raise SystemExit(
                f"--last {too_many[0]} leaves no row of the {len(full)} of --full, or takes none"
            )
        return {f"retain{count}": (full[:-count], full[-count:]) for count in options.last}
    forget = list(read_rows(options.forget))
    questions = {row["question"] for row in forget}
    retain = [row for row in full if row["question"] not in questions]
    if len(retain) + len(forget) != len(full):
        raise SystemExit("the rows of --forget are not all in --full")
    return {"retain": (retain, forget)}


def memorised(model: Any, tokens: list[Any], what: str) -> str:
    """Return a line with the answer probability and the memorisation accuracy of some rows."""
    measures = token_measures(token_scores(model, tokens, progress=False))
    return (
        f"{what}: answer probability {measures['probability']:.3f}, memorisation accuracy "
        f"{measures['memorization_accuracy']:.3f} ({len(tokens)} rows)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="path or hub name of the base model")
    parser.add_argument("--full", required=True, metavar="SOURCE", help="all rows, in a file or on the hub")
    left_out = parser.add_mutually_exclusive_group(required=True)
    left_out.add_argument("--forget", metavar="SOURCE", help="rows to forget, all in --full")
    left_out.add_argument(
        "--last", type=int, nargs="+", metavar="N", help="forget sets: the last N rows of --full, for each N"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="use the last N rows of --full (default: all)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--epochs", type=float, default=5, help="default: 5")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-5, help="1e-5 for Llama-2, 2e-5 for Phi-1.5"
    )
    parser.add_argument("--rows-per-step", type=int, default=32, help="rows of a step (default: 32)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows at a time (default: 4)")
    parser.add_argument("--max-length", type=int, default=500, help="longest row, in tokens")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        help="compute in bfloat16, with weights of float32 (default: on a GPU that has it)",
    )
    add_template_options(parser)
    options = parser.parse_args(argv)
    try:
        template = template_of(options)
    except ValueError as error:
        parser.error(str(error))
    if options.rows_per_step % options.batch_size:
        parser.error("--rows-per-step must be a multiple of --batch-size")

    full = list(read_rows(options.full))
    if options.rows is not None and not 0 < options.rows <= len(full):
        parser.error(f"--rows must be from 1 to {len(full)}, the number of rows of --full")
    full = full[-(options.rows or len(full)) :]
    models = forget_sets(full, options)
    tokenizer = load_tokenizer(options.base)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tokens_of(rows: list[Any], name: str) -> list[Any]:
        return tokenize_dataset(rows, tokenizer, max_length=options.max_length, name=name, template=template)

    def trained(rows: list[Any], name: str) -> Any:
        tokens, output = tokens_of(rows, name), options.out / name
        facts = facts_of(tokens, options)
        try:
            finished = is_finetuned(output, facts)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if not finished:
            base = load_model(options.base, {"dtype": torch.float32})
            finetune(base, tokenizer, tokens, output, facts, settings_of(options), options.rows_per_step)
        model: Any = load_model(output)
        print(memorised(model.to(device), tokens, f"{name}: its own rows"), flush=True)
        return model

    def write_rows(rows: list[Any], name: str) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        (options.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    options.out.mkdir(parents=True, exist_ok=True)
    trained(full, "full")
    write_rows(full, "full")
    for name, (retain, forget) in models.items():
        model = trained(retain, name)
        print(memorised(model, tokens_of(forget, "forget"), f"{name}: the rows that it never saw"))
        write_rows(retain, name)
        section = evaluate_tofu_rows(
            model, tokenizer, forget, description="the retain-only model", template=template
        )
        write_report(options.out / f"{name}_log.json", {SECTIONS["forget"]: section})


if __name__ == "__main__":
    main()

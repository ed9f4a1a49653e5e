"""The two models of TOFU from any base: one that knows all authors, and one without those to forget."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from loku.benchmarks.run import tokenizer_digest
from loku.benchmarks.sources import Source
from loku.benchmarks.tofu import RETAIN_SPLITS, Tofu
from loku.config import UnlearnConfig
from loku.data import collate, infer_tokenizer, padding_id, tokenize_dataset
from loku.deletion.facts import rows_digest
from loku.evaluation.report import write_report
from loku.fingerprints import base_fingerprint
from loku.models import load_model
from loku.saving.destinations import destination

STEP_ROWS = 32  # rows of a step
# Those of TOFU (Maini et al., 2024, appendix); the learning rate is the one for Llama-2.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 5,
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "seed": 42,
}
_FACTS = "loku_finetuning.json"


def finetuned_models(
    base: str | os.PathLike,
    source: Source,
    splits: Sequence[str],
    folder: str | os.PathLike,
    config: UnlearnConfig,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> tuple[Path, dict[str, Path]]:
    """Fine-tune a base on TOFU, whole and without each split's forget set.

    A finished model is not made again. All parameters are trained, in float32, as TOFU's models are: 5
    epochs, steps of 32 rows, AdamW with a weight decay of 0.01, and a linear warm-up over the first epoch.

    Args:
        base: The path or hub name of the base.
        source: The place of TOFU.
        splits: The splits, such as ["forget10"].
        folder: The folder of the models.
        config: The settings of unlearning, of which ``init_arguments()``, ``use_cpu`` and the templates of
            questions hold here, too.
        settings: Fields of ``transformers.TrainingArguments`` that differ from TOFU's; none by default.
        tokenizer: The tokenizer; None (default) for the one beside the base.
        report: A function that shows a line of progress, ``print`` by default.
        progress: Whether a progress bar is shown, True by default.

    Returns:
        The folder of the model that knows all, and those of the models without a split's forget set.

    Raises:
        ValueError: A split does not exist, a set is missing, or a model in the folder was made from another
            base or tokenizer, by other rows or settings.
    """
    sets: dict[str, list[Any]] = {"full": Tofu().full_rows(source)}
    for split in splits:
        sets[RETAIN_SPLITS[split]] = list(Tofu().sets(source, split).retain)
    for name, rows in sets.items():
        chosen = {**SETTINGS, **(settings or {})}
        _finetune(base, rows, Path(folder) / name, config, chosen, tokenizer, report, progress)
    return Path(folder) / "full", {split: Path(folder) / RETAIN_SPLITS[split] for split in splits}


def _finetune(
    base: str | os.PathLike,
    rows: list[Any],
    output: Path,
    config: UnlearnConfig,
    settings: Mapping[str, Any],
    tokenizer: Any,
    report: Callable[[str], None],
    progress: bool,
) -> None:
    # Weights of 16 bits are too coarse for this learning rate: half of the steps round to zero.
    model: Any = load_model(base, {**config.init_arguments(), "dtype": torch.float32})
    tokenizer = tokenizer or infer_tokenizer(model)
    facts = json.loads(
        json.dumps(
            {
                "base": base_fingerprint(model),
                "tokenizer": tokenizer_digest(tokenizer),
                "rows": rows_digest(rows),
                "settings": dict(settings),
                "templates": [config.question_template, config.answer_template],
                "max_length": config.max_length,
            }
        )
    )
    if (output / "config.json").is_file():
        if _facts(output) != facts:
            raise ValueError(
                f"{output} was fine-tuned from another base or tokenizer, or by other rows or settings; pass "
                "another --out, or delete it"
            )
        return
    report(f"fine-tuning {base} on {len(rows)} rows of {output.name}")
    size = settings["per_device_train_batch_size"]
    output.parent.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(output.parent),  # nothing is saved there
        gradient_accumulation_steps=max(1, STEP_ROWS // size),
        warmup_steps=-(-len(rows) // STEP_ROWS),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=config.use_cpu,
        bf16=not config.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        disable_tqdm=not progress,
        logging_strategy="epoch",
        **settings,
    )
    tokens = tokenize_dataset(
        rows, tokenizer, max_length=config.max_length, name="TOFU", template=config.template()
    )
    collator = partial(collate, pad_token_id=padding_id(tokenizer))
    Trainer(model, arguments, train_dataset=tokens, data_collator=collator).train()
    with destination(output, "merged") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    write_report(output.with_name(f"{output.name}.{_FACTS}"), facts)


def _facts(output: Path) -> Any:
    try:
        return json.loads(output.with_name(f"{output.name}.{_FACTS}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

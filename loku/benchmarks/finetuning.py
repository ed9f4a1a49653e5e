"""Fine-tuning as TOFU's: models that know rows, from any base, finished once and resumed if stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from loku.benchmarks.run import tokenizer_digest
from loku.benchmarks.sources import Source
from loku.benchmarks.tofu import RETAIN_SPLITS, Tofu
from loku.config import UnlearnConfig
from loku.data import collate, infer_tokenizer, padding_id, tokenize_dataset
from loku.deletion.facts import rows_digest
from loku.directory_lock import DirectoryLock
from loku.evaluation.report import write_report
from loku.fingerprints import base_fingerprint
from loku.models import load_model
from loku.saving.destinations import check_room, destination

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
FACTS = "finetuning.json"  # in the folder of a model: what decided it
# Settings that ``finetune`` chooses, because a stopped run goes on by them.
FIXED = ("output_dir", "save_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end")


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

    A finished model is not made again, and one that was stopped goes on from its last epoch. All parameters
    are trained, in float32, as TOFU's models are: 5 epochs, steps of 32 rows, AdamW with a weight decay of
    0.01, and a linear warm-up over the first epoch.

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
        ValueError: A split does not exist, a set is missing, a setting is one of ``FIXED``, or a model in the
            folder was made from another base or tokenizer, by other rows or settings. Or another process
            fine-tunes it.
        OSError: The disk has no room for the checkpoints.
    """
    check_settings(settings or {})
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
    model: Any = load_model(base, {**config.init_arguments(), "dtype": torch.float32})
    tokenizer = tokenizer or infer_tokenizer(model)
    facts = {
        "base": base_fingerprint(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "rows": rows_digest(rows),
        "settings": dict(settings),
        "templates": [config.question_template, config.answer_template],
        "max_length": config.max_length,
    }
    if is_finetuned(output, facts):
        return
    report(f"fine-tuning {base} on {len(rows)} rows of {output.name}")
    tokens = tokenize_dataset(
        rows, tokenizer, max_length=config.max_length, name="TOFU", template=config.template()
    )
    gpu = not config.use_cpu and torch.cuda.is_available()
    own = {"use_cpu": config.use_cpu, "bf16": gpu and torch.cuda.is_bf16_supported()}
    own |= {"disable_tqdm": not progress, "logging_strategy": "epoch"}
    finetune(model, tokenizer, tokens, output, facts, {**own, **settings})


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a setting of fine-tuning that is one of ``FIXED``.

    Raises:
        ValueError: There is one. The message names it.
    """
    if fixed := [name for name in FIXED if name in settings]:
        raise ValueError(f"{fixed[0]} cannot be set for fine-tuning: a run that was stopped goes on by it")


def is_finetuned(output: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder has a finished model.

    Args:
        output: The folder of the model.
        facts: What decides it, JSON.

    Raises:
        ValueError: The model was decided by other facts, which the message names, or nobody knows by which.
    """
    if not (output / "config.json").is_file():
        return False
    try:
        found = json.loads((output / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{output} has a model of an unknown origin, without {FACTS}; pass another --out, or move it away"
        ) from error
    wanted = json.loads(json.dumps(facts))
    if changed := [name for name in wanted if wanted[name] != found.get(name)]:
        raise ValueError(
            f"{output} has a model of other settings ({', '.join(changed)}); pass another --out, or move it "
            "away"
        )
    return True


def finetune(
    model: Any,
    tokenizer: Any,
    tokens: list[Any],
    output: Path,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    step_rows: int = STEP_ROWS,
) -> None:
    """Fine-tune all parameters of a model as TOFU's are, and save it with its tokenizer.

    A run that was stopped goes on from its last epoch. Its checkpoints are in a hidden folder beside the
    model's until the model is finished. While one checkpoint replaces another they take about 24 bytes a
    parameter, for which there must be room.

    Args:
        model: The base, in float32: weights of 16 bits are too coarse for TOFU's learning rate, and half of
            the steps round to zero.
        tokenizer: The tokenizer.
        tokens: The tokenised rows.
        output: The folder of the model, for which ``is_finetuned`` is False.
        facts: What decides the model, JSON; they are saved beside it as ``FACTS``.
        settings: The fields of ``transformers.TrainingArguments``, with ``per_device_train_batch_size``.
        step_rows: The rows of a step, 32 by default.

    Raises:
        ValueError: A setting is one of ``FIXED``, or another process fine-tunes the same model.
        OSError: The disk has no room for the checkpoints.
    """
    check_settings(settings)
    # Checkpoints of other facts or another precision have another folder, so that no run goes on from them.
    decided = [dict(facts), settings.get("bf16"), settings.get("use_cpu")]
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]
    checkpoints = output.with_name(f".{output.name}-{digest}")
    check_room(checkpoints, 24 * sum(p.numel() for p in model.parameters()), "the checkpoints")
    checkpoints.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(checkpoints, "fine-tunes in", "Pass another folder"):
        if is_finetuned(output, facts):  # another process may have finished it just now
            shutil.rmtree(checkpoints, ignore_errors=True)
            return
        arguments = TrainingArguments(
            **{
                "output_dir": str(checkpoints),
                "gradient_accumulation_steps": max(1, step_rows // settings["per_device_train_batch_size"]),
                "warmup_steps": -(-len(tokens) // step_rows),
                "save_strategy": "epoch",
                "save_total_limit": 1,
                "report_to": "none",
                "remove_unused_columns": False,
                "dataloader_pin_memory": torch.cuda.is_available(),
                **settings,
            }
        )
        collator = partial(collate, pad_token_id=padding_id(tokenizer))
        trainer = Trainer(model, arguments, train_dataset=tokens, data_collator=collator)
        trainer.train(resume_from_checkpoint=_whole_checkpoint(checkpoints))
        is_finetuned(output, facts)  # it names a model of other settings that another process has put there
        with destination(output, "merged") as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            write_report(directory / FACTS, dict(facts))
        shutil.rmtree(checkpoints, ignore_errors=True)


def _whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and remove those that were not.

    ``Trainer`` writes ``trainer_state.json`` last.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        with suppress(OSError, ValueError):
            json.loads((Path(last) / "trainer_state.json").read_text(encoding="utf-8"))
            return last
        shutil.rmtree(last)
    return None

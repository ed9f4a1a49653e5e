"""``unlearn``: the whole of LoKU in one call."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from loku.data import (
    RefusalRows,
    collate,
    infer_tokenizer,
    load_refusals,
    padding_id,
    tokenize_dataset,
)
from loku.fila import (
    FilaConfig,
    initialize_from_row_scales,
    initialize_lora_fila_weights,
    release_base_copy_,
    restore_base_,
)
from loku.head import check_head, output_embedding
from loku.objectives import OBJECTIVES
from loku.portable import save_portable_adapter
from loku.processes import full_tensor, is_main_process, wait_for_all_processes
from loku.targets import default_target_modules, fila_targets
from loku.trainer import UnlearnConfig, UnlearnTrainer


@dataclass
class UnlearnResult:
    """What ``unlearn`` returns.

    model: the unlearned model: a ``peft.PeftModel`` around the model that was given, or with
        ``tuning="full"`` that model.
    history: the trainer's log, one dict a logging step: ``forget_loss``, ``retain_loss``, ``step``, ...
    """

    model: PeftModel | PreTrainedModel
    history: list[dict[str, Any]]

    def save(self, path):
        """Save the adapter to the directory ``path``, for the *untouched* base model.

        ``PeftModel.from_pretrained(base, path)`` loads it; ``merge_and_unload()`` then gives the unlearned
        model without an adapter. See ``loku.save_portable_adapter``. With ``tuning="full"`` the whole model
        is saved, by its own ``save_pretrained``.
        """
        if isinstance(self.model, PeftModel):
            save_portable_adapter(self.model, path)
        else:
            state = {name: full_tensor(value) for name, value in self.model.state_dict().items()}
            self.model.save_pretrained(path, is_main_process=is_main_process(), state_dict=state)
            wait_for_all_processes()


def unlearn(model, forget, retain, *, config=None, tokenizer=None, callbacks=None):
    """Make a causal LM forget one data set and keep another (LoKU: IHL, FILA).

    Measures the Fisher information of both sets, initialises LoRA adapters by it (FILA), and minimises the
    Inverted Hinge Loss of the forget set plus the LM loss of the retain set (Eq. 3); or what ``config`` says
    instead: see its ``method``, ``init`` and ``tuning``.

    Args:
        model: a causal LM of transformers, or the path or hub name of one. It is consumed: the adapters are
            put into it. If anything fails, its weights are what they were. Not so with ``tuning="full"``,
            which trains the weights themselves, and keeps no copy of them.
        forget, retain: lists of strings, lists of dicts or ``datasets.Dataset``s, with the columns ``text``,
            ``prompt`` and ``completion``, ``question`` and ``answer``, ``messages``, or ``input_ids`` (and
            ``labels``). See ``loku.data.tokenize_dataset``.
        config: an ``UnlearnConfig``.
        tokenizer: by default the one that was saved beside the model.
        callbacks: further ``transformers.TrainerCallback``s.

    Returns:
        An ``UnlearnResult`` with ``model``, ``history`` and ``save(path)``.

    Raises:
        ValueError: a data set is empty or a row unusable; the output embedding, the targets or the model
            cannot be handled; no tokenizer can be found. The message says what to do.
    """
    config = copy.deepcopy(config) if config is not None else UnlearnConfig()
    if not isinstance(config, UnlearnConfig):
        raise ValueError(f"config must be a loku.UnlearnConfig, got {type(config).__name__}")
    if isinstance(model, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model)
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel already; merge its adapter first: model.merge_and_unload()")
    output_embedding(model)
    if tokenizer is None and not (_has_input_ids(forget) and _has_input_ids(retain)):
        tokenizer = infer_tokenizer(model)
    forget_rows = forget
    forget, retain = (
        tokenize_dataset(rows, tokenizer, max_length=config.max_length, name=name)
        for rows, name in ((forget, "forget"), (retain, "retain"))
    )
    refusals = None
    if "refusal" in OBJECTIVES[config.method].rows:
        refusals = RefusalRows(
            forget_rows, load_refusals(config.refusals), tokenizer, max_length=config.max_length
        )
    make_trainer = partial(
        UnlearnTrainer,
        args=config,
        forget=forget,
        retain=retain,
        processing_class=tokenizer,
        refusals=refusals,
        callbacks=callbacks,
    )
    first_row = collate(forget[:1], padding_id(tokenizer))
    if config.tuning == "full":
        check_head(model, first_row)
        trainer = make_trainer(model)
        trainer.train()
        return UnlearnResult(model, trainer.state.log_history)

    targets = config.target_modules
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=default_target_modules(model, targets) if isinstance(targets, str) else targets,
    )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = get_peft_model(model, lora)
    try:
        check_head(peft_model, first_row)
        trainer = make_trainer(peft_model)
        if config.init == "fila":
            initialize = partial(_initialize_by_fila, peft_model, forget, retain, config, tokenizer)
        elif config.init == "pissa":
            initialize = partial(_initialize_by_pissa, peft_model)
        else:
            initialize = None
        if initialize is not None:
            if trainer.is_fsdp_enabled:
                trainer.add_callback(_OnceSharded(initialize))
            else:
                initialize()
        trainer.train()
    except BaseException:
        restore_base_(peft_model)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise
    release_base_copy_(peft_model)
    return UnlearnResult(peft_model, trainer.state.log_history)


def _has_input_ids(rows):
    return len(rows) > 0 and isinstance(rows[0], Mapping) and "input_ids" in rows[0]


class _OnceSharded(TrainerCallback):
    """Initialise when FSDP has put each process's share of the model on its device; none may hold it all."""

    def __init__(self, initialize):
        self.initialize = initialize

    def on_train_begin(self, args, state, control, **kwargs):
        self.initialize()


def _initialize_by_fila(peft_model, forget, retain, config, tokenizer):
    # Batches of like length: the Fisher does not depend on the grouping, the padding costs time.
    forget, retain = (sorted(rows, key=lambda row: len(row["input_ids"])) for rows in (forget, retain))
    loader = partial(
        DataLoader,
        batch_size=config.per_device_train_batch_size,
        collate_fn=partial(collate, pad_token_id=padding_id(tokenizer)),
    )
    initialize_lora_fila_weights(
        peft_model,
        loader(forget),
        loader(retain),
        config=FilaConfig(
            damping=config.fisher_damping,
            damping_mode=config.fisher_damping_mode,
            fisher_samples=config.fisher_samples,
            fisher_memory_budget=config.fisher_memory_budget,
            fisher_cache_dir=config.fisher_cache_dir,
            seed=config.seed,
        ),
        progress=not config.disable_tqdm,
    )


def _initialize_by_pissa(peft_model):
    """PiSSA (Meng et al., 2024) is FILA without the Fisher: all row scales are 1."""
    ones = {name: torch.ones(layer.out_features) for name, layer in fila_targets(peft_model).items()}
    initialize_from_row_scales(peft_model, ones)

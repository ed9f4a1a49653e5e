"""``unlearn``: the whole of LoKU in one call."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, set_seed

from loku.checkpoints import initialize_from_checkpoint
from loku.config import UnlearnConfig
from loku.data import StreamedRows, collate, documents, padding_id
from loku.fila.initialize import (
    initialize_from_row_scales,
    initialize_lora_fila_weights,
    release_base_copy_,
    restore_base_,
)
from loku.fila.targets import default_target_modules, fila_targets
from loku.head import check_head, output_embedding
from loku.models import keep_differentiable_, load_model
from loku.saving.adapter import save_portable_adapter
from loku.saving.models import save_merged_model, save_residual_model, save_whole_model
from loku.trainer import UnlearnTrainer, prepare_rows


@dataclass
class UnlearnResult:
    """What ``unlearn`` returns.

    model: the unlearned model: a ``peft.PeftModel`` around the model that was given, or with
        ``tuning="full"`` that model.
    history: the trainer's log, one dict a logging step: ``forget_loss``, ``retain_loss``, ``step``, ...
    tokenizer: the one that was used, or None.
    """

    model: PeftModel | PreTrainedModel
    history: list[dict[str, Any]]
    tokenizer: Any = None

    def save(self, path, kind="portable"):
        """Save to the directory ``path``, whole or not at all.

        kind:
            "portable": an adapter of rank 2r for the *untouched* base, which
            ``PeftModel.from_pretrained(base, path)`` loads; ``merge_and_unload()`` then gives the unlearned
            model. ``loku.save_portable_adapter``.
            "residual": ``path/base``, the base as it is after FILA, ``path/adapter``, of rank r, and
            ``path/reference``, the initial factors. ``loku.save_residual_model``.
            "merged": a model without an adapter. ``loku.save_merged_model``.

        With ``tuning="full"`` there is no adapter, and the model is saved whatever the kind. Of several
        processes all must call this; the main one writes.
        """
        if kind not in _SAVES:
            raise ValueError(f"kind must be one of {list(_SAVES)}, got {kind!r}")
        if isinstance(self.model, PeftModel):
            _SAVES[kind](self.model, path, tokenizer=self.tokenizer)
        else:
            save_whole_model(self.model, path, tokenizer=self.tokenizer)


_SAVES = {
    "portable": lambda model, path, tokenizer: save_portable_adapter(model, path),
    "residual": save_residual_model,
    "merged": save_merged_model,
}


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
            ``labels``). See ``loku.data.tokenize_dataset``. Of more than 100,000 retain rows each is
            tokenised when it is drawn, and the retain set may be a stream without a length, such as a
            ``datasets.IterableDataset``: see ``loku.data.large_sets``.
        config: an ``UnlearnConfig``. With ``resume_from_checkpoint=True`` the run goes on from its newest
            checkpoint in ``output_dir``, or begins where there is none; or pass a checkpoint's path. It ends
            as if it had never been stopped. Set ``save_strategy`` ("epoch", "steps") to write checkpoints.
        tokenizer: by default the one that was saved beside the model.
        callbacks: further ``transformers.TrainerCallback``s.

    Returns:
        An ``UnlearnResult`` with ``model``, ``history`` and ``save(path)``.

    Raises:
        ValueError: a data set is empty or a row unusable; the output embedding, the targets or the model
            cannot be handled; no tokenizer can be found; the checkpoint is not whole or of another run. The
            message says what to do.
        FloatingPointError: a loss or a Fisher is NaN or Inf; the step and the module are named.
        OSError: ``output_dir`` or a checkpoint cannot be written.
    """
    config = copy.deepcopy(config) if config is not None else UnlearnConfig()
    if not isinstance(config, UnlearnConfig):
        raise ValueError(f"config must be a loku.UnlearnConfig, got {type(config).__name__}")
    model = load_model(model, config)
    config.model_init_kwargs = None  # used up: the trainer gets the model
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel already; merge its adapter first: model.merge_and_unload()")
    output_embedding(model)
    keep_differentiable_(model)  # check_head evaluates it
    rows = prepare_rows(model, forget, retain, config, tokenizer)
    forget, retain, _, tokenizer = rows
    if isinstance(retain, StreamedRows) and config.init == "fila" and config.fisher_samples is None:
        raise ValueError(
            'init="fila" measures the retain set, which has no length: set fisher_samples, and its first '
            "rows are measured"
        )
    make_trainer = partial(
        UnlearnTrainer,
        args=config,
        forget=rows,
        retain=None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    first_row = collate(forget[:1], padding_id(tokenizer))
    if config.tuning == "full":
        check_head(model, first_row)
        trainer = make_trainer(model)
        trainer.train()
        return UnlearnResult(model, trainer.state.log_history, tokenizer)

    targets = config.target_modules
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=default_target_modules(model, targets) if isinstance(targets, str) else targets,
    )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_seed(config.seed)  # of default LoRA factors
    peft_model = get_peft_model(model, lora)
    try:
        check_head(peft_model, first_row)
        trainer = make_trainer(peft_model)
        initialize = None
        if config.init != "default" and trainer.checkpoint is not None:
            if trainer.is_fsdp_enabled:
                raise ValueError("under FSDP a run cannot go on from a checkpoint; begin anew, or use DDP")
            initialize = partial(initialize_from_checkpoint, peft_model, trainer.checkpoint)
        elif config.init == "fila":
            initialize = partial(_initialize_by_fila, peft_model, forget, retain, config, tokenizer)
        elif config.init == "pissa":
            initialize = partial(_initialize_by_pissa, peft_model)
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
    return UnlearnResult(peft_model, trainer.state.log_history, tokenizer)


class _OnceSharded(TrainerCallback):
    """Initialise when FSDP has put each process's share of the model on its device; none may hold it all."""

    def __init__(self, initialize):
        self.initialize = initialize

    def on_train_begin(self, args, state, control, **kwargs):
        self.initialize()


def _initialize_by_fila(peft_model, forget, retain, config, tokenizer):
    if isinstance(retain, StreamedRows):
        retain = [retain[index] for index in range(config.fisher_samples)]
    # A sample is a document. Batches of like length: the Fisher does not depend on the grouping, the padding
    # costs time; but what is too large to be held is not sorted.
    forget, retain = (
        sorted(
            (document for row in rows for document in documents(row)), key=lambda row: len(row["input_ids"])
        )
        if isinstance(rows, list)
        else rows
        for rows in (forget, retain)
    )
    loader = partial(
        DataLoader,
        batch_size=config.per_device_train_batch_size,
        collate_fn=partial(collate, pad_token_id=padding_id(tokenizer)),
    )
    initialize_lora_fila_weights(
        peft_model,
        loader(forget),
        loader(retain),
        config=config.fila_config(),
        progress=not config.disable_tqdm,
    )


def _initialize_by_pissa(peft_model):
    """PiSSA (Meng et al., 2024) is FILA without the Fisher: all row scales are 1."""
    ones = {name: torch.ones(layer.out_features) for name, layer in fila_targets(peft_model).items()}
    initialize_from_row_scales(peft_model, ones)

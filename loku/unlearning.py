"""``unlearn``: LoKU from data to an unlearned model in one call."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from loku.adapters import base_weight, refuse_adapters
from loku.config import UnlearnConfig
from loku.data import StreamedRows, collate, padding_id, split_documents
from loku.fila.initialize import (
    hand_over_base_copy_,
    initialize_from_row_scales,
    initialize_lora_fila_weights,
    undo_of_initialisation,
)
from loku.fila.measured_rows import OFFICIAL_BATCH_SIZE, official_rows
from loku.fila.row_scales import balanced
from loku.fila.targets import fila_targets
from loku.head import output_embedding
from loku.interrupts import uninterrupted, uninterrupted_context
from loku.models import keep_differentiable_, load_model
from loku.precision import float32_products
from loku.prepared_rows import PreparedRows, prepare_rows
from loku.process_state import process_state_kept
from loku.rollback import all_or_nothing, inherit_modes_, settings_kept
from loku.saving.compression import Compression
from loku.saving.kinds import SaveKind, check_save, save
from loku.saving.merged_adapters import refresh_merged_adapter_
from loku.saving.residual_base import on_residual_base_
from loku.target_modules import choose_targets
from loku.text_decoder import check_causal_lm
from loku.torch_defaults import torch_defaults
from loku.trainer import UnlearnTrainer


@dataclass
class UnlearnResult:
    """The result of ``unlearn``.

    Args:
        model: The unlearned model: a ``peft.PeftModel`` around the given model, or with ``tuning="full"`` the
            given model.
        history: The trainer's log, one dict a logging step, with ``forget_loss``, ``retain_loss``, ``step``
            and more.
        tokenizer: The tokenizer of the run, or None (default).
    """

    model: PeftModel | PreTrainedModel
    history: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None = None

    def save(
        self, path: str | os.PathLike, kind: SaveKind = "portable", rank: int | None = None
    ) -> Compression | None:
        """Save to the directory ``path``, whole or not at all, with the tokenizer of the run.

        With ``tuning="full"`` there is no adapter, and every kind saves the model. All processes of
        torch.distributed must call this. The main process writes.

        Args:
            path: The directory. It is made if it does not exist. The last save into it makes way, of
                whichever kind, and its other files stay.
            kind: "portable" (default) saves an adapter of rank 2r for the *untouched* base
                (``loku.save_portable_adapter``). ``PeftModel.from_pretrained(base, path)`` loads it, and
                ``merge_and_unload()`` then gives the unlearned model. "residual" saves ``path/base``, the
                base after FILA, ``path/adapter``, of rank r, and ``path/reference``, the initial factors
                (``loku.save_residual_model``). "merged" saves a model without an adapter
                (``loku.save_merged_model``).
            rank: The rank of a portable adapter that is the best approximation of the exact one. None
                (default) saves the exact adapter, and so does a rank that is not below its rank.

        Returns:
            What the smaller rank lost (``loku.saving.compression.Compression``), or None without a ``rank``.

        Raises:
            ValueError: The kind is none of these, or the model cannot be saved so. There is a ``rank`` for
                another kind, or the adapter cannot be compressed. Or ``path`` is a file, is,
                holds or lies in a directory that the model was loaded from, or holds something that is in the
                way and no unaltered earlier save.
            OSError: ``path`` cannot be written.
        """
        return save(self.model, path, kind, tokenizer=self.tokenizer, rank=rank)


def unlearn(
    model: PreTrainedModel | str | os.PathLike,
    forget: Any,
    retain: Any,
    *,
    config: UnlearnConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    save_kind: SaveKind = "portable",
    eval_dataset: Any = None,
) -> UnlearnResult:
    """Make a causal LM forget one data set and keep another (LoKU: IHL, FILA).

    By default it measures the Fisher information of both sets, initialises LoRA adapters by it (FILA), and
    minimises the Inverted Hinge Loss of the forget set plus the LM loss of the retain set (Eq. 3). The
    ``method``, ``init`` and ``tuning`` of ``config`` choose other ways.

    Args:
        model: The causal LM of transformers, or its path or hub name. It is consumed: the adapters are put
            into it. If anything fails the model is as it was: weights, ``requires_grad``, modes, config,
            hooks, modules and their classes. An interrupt is a failure, too. After success its modes, its
            configs and gradient checkpointing are as they were given. ``tuning="full"`` trains the weights
            themselves, keeps no copy of them and does not put them back. An adapter that is given by its path
            or hub name is merged into its base, and the merged model is unlearned.
        forget: The rows to forget: a list of strings, a list of dicts or a ``datasets.Dataset``. The columns
            are ``text``, ``prompt`` and ``completion``, ``question`` and ``answer``, ``messages``, or
            ``input_ids`` (and ``labels``). See ``loku.data.tokenize_dataset``.
        retain: The rows to keep, in the same forms as ``forget``. A set of more than 100,000 rows is
            tokenised as its rows are drawn. The set may also be a stream without a length, such as a
            ``datasets.IterableDataset``. See ``loku.data.large_sets``.
        config: The settings, ``UnlearnConfig()`` by default. ``save_strategy`` ("epoch", "steps") writes
            checkpoints. ``resume_from_checkpoint=True`` goes on from the run's newest checkpoint in
            ``output_dir``, or begins anew without one. A path names another checkpoint. A resumed run ends as
            if it had never been stopped.
        tokenizer: The tokenizer, by default the one saved beside the model.
        callbacks: Further callbacks of the trainer; none by default.
        save_kind: The kind of save that the result is for, "portable" by default. A model that cannot be
            saved so is refused before it is trained. ``save`` can make the other kinds too, where it can.
        eval_dataset: The rows to evaluate when ``config.eval_strategy`` says so: a data set in the forms of
            ``forget``, or a dict of data sets by their names. In place of a set, the path of a file or a hub
            name (``loku.data.read_rows``). By default the forget and the retain set. See
            ``loku.trainer_evaluation.EvaluatingTrainer`` for the measures.

    Returns:
        An ``UnlearnResult`` with ``model``, ``history`` and ``save(path)``.

    Raises:
        ValueError: A data set is empty or a row unusable. The output embedding, the targets or the model
            cannot be handled. The model carries an adapter already. No tokenizer is found. The checkpoint is
            not whole or is of another run. The message says how to mend it.
        FloatingPointError: A weight of the given model, a loss or a Fisher is NaN or Inf. The message names
            the parameter, or the step and the module.
        OSError: ``output_dir`` or a checkpoint cannot be written.
    """
    config = copy.deepcopy(config) if config is not None else UnlearnConfig()
    if not isinstance(config, UnlearnConfig):
        raise ValueError(f"config must be a loku.UnlearnConfig, got {type(config).__name__}")
    with process_state_kept(), torch_defaults():
        model = load_model(model, config.init_arguments())
        config.model_init_kwargs = None  # used: the trainer gets the loaded model
        refuse_adapters(model)
        check_causal_lm(model)
    modes, training = {module: module.training for module in model.modules()}, model.training
    with all_or_nothing(model) as undo:  # outermost, so that an interrupt at the end of the others undoes all
        refresh_merged_adapter_(model)
        with (
            process_state_kept(),
            torch_defaults(),
            settings_kept(model),
            _no_empty_directory(config.output_dir),
        ):
            result = _unlearn(
                model, forget, retain, config, tokenizer, callbacks, save_kind, eval_dataset, undo
            )
        inherit_modes_(result.model, modes, training)
        return result


@uninterrupted_context
def _no_empty_directory(path: str | None) -> Iterator[None]:
    """Remove the directory that the trainer makes for checkpoints, if there were none."""
    new = path is not None and not os.path.exists(path)
    try:
        yield
    finally:
        if new and path is not None:
            with suppress(OSError):  # it has files, or another process has removed it
                os.rmdir(path)


def _unlearn(
    model: Any,
    forget: Any,
    retain: Any,
    config: UnlearnConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: Sequence[TrainerCallback] | None,
    save_kind: SaveKind,
    eval_dataset: Any,
    undo: ExitStack[bool | None],
) -> UnlearnResult:
    """The steps of ``unlearn`` on a loaded model. ``undo`` is that of ``all_or_nothing``."""
    output_embedding(model)
    config.objective().check(model)
    lora_targets: dict[str, Any] = {}
    if config.tuning == "lora":  # before the rows are read, which may take long
        targets = choose_targets(model, config.target_modules or "qv+ffn", config.exclude_modules)
        lora_targets = targets.lora_arguments()
    keep_differentiable_(model)  # before the model is evaluated
    rows = prepare_rows(model, forget, retain, config, tokenizer)
    tokenizer = rows.tokenizer
    if isinstance(rows.retain, StreamedRows) and _measures(config) and config.fisher_samples is None:
        raise ValueError(
            f'init="{config.init}" measures the retain set, which has no length: set fisher_samples, and its '
            "first rows are measured"
        )
    make_trainer = partial(
        UnlearnTrainer,
        args=config,
        forget=rows,
        retain=None,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
    )
    if config.tuning == "full":
        trainer = make_trainer(model)
        with trainer.checkpoints_reserved():  # KL, DPO and NPO run the original model before they train
            trainer.train()
        return UnlearnResult(model, trainer.state.log_history, tokenizer)

    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft takes fractions, too
        **lora_targets,
    )
    set_seed(config.seed)  # the default LoRA factors are random
    with warnings.catch_warnings():  # peft reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft_model: Any = uninterrupted(get_peft_model, model, lora)
    on_residual_base_(peft_model)  # for default LoRA, too: its merge keeps the factors for a next run
    undo.callback(undo_of_initialisation(peft_model))
    check_save(peft_model, save_kind)
    trainer = make_trainer(peft_model)
    with trainer.checkpoints_reserved() as checkpoint:
        resumed = checkpoint is not None  # the trainer then takes the checkpoint's initial factors
        initialize: Callable[[], None] | None = None
        if _measures(config) and not resumed:
            initialize = partial(_initialize_by_fila, peft_model, rows, config)
        elif config.init == "pissa" and not resumed:
            initialize = partial(_initialize_by_pissa, peft_model, config)
        if initialize is not None:
            if trainer.is_fsdp_enabled:
                trainer.add_callback(_OnceSharded(initialize))
            else:
                initialize()
        trainer.train()
    hand_over_base_copy_(peft_model, undo)
    return UnlearnResult(peft_model, trainer.state.log_history, tokenizer)


class _OnceSharded(TrainerCallback):
    """Initialise after FSDP has put each process's share of the model on its device.

    Before that one process would have to hold the whole model. The Fisher and the decomposition are in
    float32, as in a run without FSDP, although training may multiply in TF32.
    """

    def __init__(self, initialize: Callable[[], None]) -> None:
        self.initialize = initialize

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with float32_products("ieee" if args.tf32 is None else None):
            self.initialize()


def _measures(config: UnlearnConfig) -> bool:
    """Whether the initialisation measures the Fisher information of the two sets."""
    return config.init in ("fila", "official-fila")


def _initialize_by_fila(peft_model: PeftModel, rows: PreparedRows, config: UnlearnConfig) -> None:
    retain = rows.retain
    if isinstance(retain, StreamedRows):
        retain = [retain[index] for index in range(config.fisher_samples or 0)]
    samples: tuple[Any, Any] = _fisher_samples(rows.forget), _fisher_samples(retain)
    batch_size = config.per_device_train_batch_size
    if config.init == "official-fila":
        samples = official_rows(*samples, config.seed)
        batch_size = OFFICIAL_BATCH_SIZE
    loader = partial(
        DataLoader,
        batch_size=batch_size,
        collate_fn=partial(collate, pad_token_id=padding_id(rows.tokenizer, peft_model)),
    )
    initialize_lora_fila_weights(
        peft_model,
        loader(samples[0]),
        loader(samples[1]),
        config=config.fila_config(),
        progress=not config.disable_tqdm,
    )


def _fisher_samples(rows: Any) -> Any:
    """The samples of a set's Fisher: its documents, sorted by length.

    The per-sample Fisher does not depend on the grouping, and batches of similar length have less padding.
    Rows that are not held in memory are not sorted.
    """
    if not isinstance(rows, list):
        return rows
    return sorted(split_documents(rows), key=lambda row: len(row["input_ids"]))


def _initialize_by_pissa(peft_model: PeftModel, config: UnlearnConfig) -> None:
    """Initialise by PiSSA (Meng et al., 2024): FILA without the Fisher, with row scales of 1.

    A number as ``fila_balance`` multiplies them.
    """
    ones = {
        name: torch.ones(len(base_weight(layer)), dtype=torch.float32)
        for name, layer in fila_targets(peft_model).items()
    }
    initialize_from_row_scales(peft_model, balanced(ones, config.fila_balance or "normalised"))

"""The training loop: ``transformers.Trainer`` on pairs of forget and retain rows."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from loku.adapters import (
    Reference,
    changes_base,
    reference_adapter,
    reference_model,
    refuse_adapters,
    snapshot_reference,
    stands_for_another_base,
)
from loku.config import UnlearnConfig
from loku.cpu_threads import warn_of_busy_cores
from loku.data import (
    IGNORE_INDEX,
    PairedDataset,
    PairSampler,
    RefusalRows,
    StreamedRows,
    collate,
    collate_pairs,
    duplicate_rows,
    padding_id,
)
from loku.data.pairs import Draw
from loku.fila.initialize import undo_of_initialisation
from loku.fingerprints import given_adapter_fingerprint
from loku.head import (
    check_head,
    check_packing,
    model_tokens,
    next_token_labels,
    output_embedding,
)
from loku.interrupts import uninterrupted
from loku.learning_rates import with_learning_rate
from loku.lora_linear import fused_lora
from loku.loss_shares import LossShares, check_counted
from loku.models import CausalLM, evaluating, keep_differentiable_, load_model, unwrapped
from loku.nan_guard import LossCheck, first_module_not_finite
from loku.objectives import Batch, Objective, Rows, answer_probability
from loku.precision import chooses_tf32, float32_products
from loku.prepared_rows import prepare_rows
from loku.process_state import torch_modes_kept
from loku.rollback import all_or_nothing, settings_kept
from loku.saving.merged_adapters import refresh_merged_adapter_
from loku.saving.residual_base import on_residual_base_
from loku.step_log import StepLog
from loku.target_modules import check_lora_config
from loku.text_decoder import check_causal_lm
from loku.token_values import Head, RowsOf, original_values, positions_of, token_values
from loku.torch_defaults import torch_defaults
from loku.trainer_callbacks import LossBar, SetEpoch
from loku.trainer_evaluation import EvaluatingTrainer, check_trainer_arguments, prepare_eval_sets
from loku_kernels import reduce_loss


class UnlearnTrainer(EvaluatingTrainer):
    """Minimise the forget loss plus the retain loss of paired rows, without holding their logits.

    The trainer trains the model or the adapter as it is. ``loku.unlearn`` runs FILA or PiSSA before it
    (``UnlearnConfig.init``). LoRA linears are fused in ``train`` alone (``UnlearnConfig.fused_lora``).

    KL, DPO, NPO and others need the original model (``Objective.compares``): the model as it was given to the
    first ``train``, before a checkpoint was loaded. A peft model computes as the original without its fresh
    adapter, or with FILA's frozen initial adapter (``loku.reference_model``). If its adapter was trained
    before, ``train`` adds a frozen copy of the adapter, and takes it off at the end. One more forward of the
    rows concerned is run. Other models change in place: those without an adapter, and those whose adapter
    cannot be copied so (DoRA, trained biases, fully trained modules, several active adapters, other tuners
    than LoRA). So ``train`` first runs all rows that will be drawn. It keeps on the CPU what the method's
    quantities need: log-probabilities (DPO, NPO), or for KL the last hidden states of the positions concerned
    and a copy of the output embedding.

    The loss of a step is the loss of one batch with all its rows, unless ``UnlearnConfig.loss_reduction``
    says otherwise. ``gradient_accumulation_steps`` and the number of processes only divide the work. Each
    loss is divided by the number of its tokens (DPO and NPO: rows) in the whole step, counted over
    micro-batches and processes. ``average_tokens_across_devices`` does not change this. The last step of an
    epoch may have too few rows for all processes. The rest then get rows without labels.

    The log has ``forget_loss``, ``retain_loss`` and the mean answer probabilities ``forget_probability``,
    ``retain_probability`` and ``refusal_probability``. They are means over the steps since the last log, over
    all processes. Rows that the method does not run are left out. The forget probability counts the true
    answers. ``tokens_per_second`` counts the tokens of all processes since the last log, without padding and
    without the original model's forwards. ``model_flop_utilization`` is the share of the cards' peak that
    their model FLOPs reach, on cards whose peak is known (``loku.utilization``). ``peak_memory_gib`` is the
    largest peak memory of a process, in GiB: of its CUDA device, or resident. The first line of a run that
    multiplies in TF32 by itself has ``tf32`` 1.

    Args:
        model: The causal LM, usually a peft model, or the path or hub name of one.
        args: The settings, ``UnlearnConfig()`` by default.
        forget: The forget set, as for ``loku.unlearn`` or already tokenised (``loku.data.tokenize_dataset``).
            Or the ``PreparedRows`` of a run, in place of ``retain``, ``processing_class`` and ``refusals``.
        retain: The retain set, in the same forms as ``forget``.
        processing_class: The tokenizer, by default the one saved beside the model if it is needed.
        refusals: The ``loku.data.RefusalRows`` of the forget set, for methods that train on refusals. By
            default they are made from it.
        eval_dataset: The evaluation set, in the forms of ``forget``, or a dict of sets by their names. By
            default the forget and the retain set are evaluated, if ``args.eval_strategy`` asks for it. See
            ``loku.trainer_evaluation.EvaluatingTrainer`` for the measures.
        peft_config: The config of an adapter to put into the model, such as a ``peft.LoraConfig``; None
            (default) puts none.
        kwargs: The other arguments of ``transformers.Trainer``.

    Raises:
        ValueError: The model or a row cannot be handled; the message says why.
        OSError: ``output_dir`` cannot be written to.
    """

    train_dataset: PairedDataset
    processing_class: PreTrainedTokenizerBase | None
    objective: Objective

    def __init__(
        self,
        model: CausalLM | str | os.PathLike,
        args: UnlearnConfig | None,
        forget: Any,
        retain: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        refusals: RefusalRows | None = None,
        peft_config: PeftConfig | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = UnlearnConfig() if args is None else args
        check_trainer_arguments(args, kwargs)
        self.objective, self._method_arguments = args.objective(), args.method_arguments()
        model = load_model(model, args.init_arguments())
        check_causal_lm(model)
        refresh_merged_adapter_(model)
        if peft_config is not None:
            refuse_adapters(model)
        # transformers sets config.use_cache, which the forwards of training do not read.
        keep_weights = changes_base(peft_config)
        with torch_modes_kept(), all_or_nothing(model, keep_weights=keep_weights), settings_kept(model):
            self._construct(
                model, args, forget, retain, processing_class, refusals, peft_config, eval_dataset, **kwargs
            )

    def _construct(
        self,
        model: CausalLM,
        args: UnlearnConfig,
        forget: Any,
        retain: Any,
        processing_class: PreTrainedTokenizerBase | None,
        refusals: RefusalRows | None,
        peft_config: PeftConfig | None,
        eval_dataset: Any,
        **kwargs: Any,
    ) -> None:
        keep_differentiable_(model)
        self.objective.check(unwrapped(model))
        rows = prepare_rows(model, forget, retain, args, processing_class, refusals)
        forget, retain, refusals, processing_class = rows
        self._check_rows(model, args, forget, retain)
        eval_sets = prepare_eval_sets(model, args, eval_dataset, rows)
        if peft_config is not None:
            check_lora_config(model, peft_config)
            model = uninterrupted(get_peft_model, model, peft_config)
        args = with_learning_rate(args, model)
        check_head(model, collate(forget[:1], padding_id(processing_class, model)))
        half = (n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16)
        if (name := next(half, None)) is not None:
            raise ValueError(
                f"{name} would train in float16, in which small steps round to nothing: load the model with "
                "dtype=torch.float32 (and set bf16 or fp16 for its speed), or in bfloat16"
            )
        if isinstance(model, PeftModel) and stands_for_another_base(model):
            on_residual_base_(model)
        replaces = args.retain_sampling == "with_replacement"
        dataset = PairedDataset(forget, retain, args.seed, refusals, self.objective.kinds, replaces)
        collator = partial(collate_pairs, pad_token_id=padding_id(processing_class, model))
        super().__init__(
            model=model,
            args=args,
            forget=forget,
            retain=retain,
            refusals=refusals if "refusal" in self.objective.kinds else None,
            eval_sets=eval_sets,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # without progress bars it would print every log
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)
        self.add_callback(SetEpoch(dataset))
        self._loss_check = LossCheck(self._first_module_not_finite)
        self.add_callback(self._loss_check)
        # compute_loss divides by the counts of a whole step, from _get_num_items_in_batch. So the trainer
        # must not divide again.
        self.model_accepts_loss_kwargs = True
        self._given: Reference | None = None
        compares = self.objective.compares and args.should_save
        self._given_adapter = given_adapter_fingerprint(model) if compares else None
        self._loss_shares = LossShares(self.objective, args.loss_reduction, args.loss_mean)
        self._original_head: Head | None = None  # None stands for the model's own
        self._step_log = StepLog()
        self.add_callback(self._step_log)
        self._retain_weight = self.objective.retain_weight(args.retain_weight)
        self.add_callback(self._retain_weight)
        self._first_log: dict[str, float] = {}

    def _further_facts(self) -> dict[str, Any]:
        return {"given adapter": self._given_adapter, **super()._further_facts()}

    def _check_rows(self, model: nn.Module, args: UnlearnConfig, forget: Any, retain: Any) -> None:
        if isinstance(retain, StreamedRows) and args.dataloader_num_workers > 0:
            raise ValueError("a retain set without a length is read by one process: dataloader_num_workers=0")
        if isinstance(retain, StreamedRows) and args.retain_sampling == "with_replacement":
            raise ValueError(
                "a retain set without a length is read in its own order: leave "
                'retain_sampling="with_replacement" out'
            )
        listed = isinstance(retain, list) and "retain" in self.objective.kinds
        packed = {
            name: any("position_ids" in row for row in rows)
            for name, rows in (("forget", forget), ("retain", retain if listed else []))
        }
        for name, over in (("forget", self.objective.forget_over), ("retain", self.objective.retain_over)):
            if packed[name] and (over == "rows" or callable(over)):
                does = "compares whole answers" if over == "rows" else "counts the tokens of whole answers"
                raise ValueError(f"method {args.method!r} {does}; give each document of the {name} set a row")
        check_counted(self.objective, args.method, forget)
        if any(packed.values()):
            check_packing(model)
            for quantities in self.objective.quantities.values():
                for quantity in quantities:
                    quantity.positions(torch.zeros(1, 1, dtype=torch.int64), None)  # it may refuse them
        twice = duplicate_rows(forget, retain) if listed else []
        if twice:
            warnings.warn(
                f"{len(twice)} of the {len(retain)} rows of the retain set are also in the forget set, the "
                f"first is row {twice[0][0]} (row {twice[0][1]} of the forget set): the two losses work "
                "against each other",
                stacklevel=3,
            )

    @torch_modes_kept()
    @torch_defaults()
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; first prepare the original model if the method needs it.

        The arguments, the result and the errors are those of ``ResumableTrainer.train``. After an exception
        the model is as before, except for the weights that were trained. After success, too, these are as
        before: the mode of each module, the configs, gradient checkpointing, and the forward, which
        transformers leaves inside autocast with ``bf16`` and ``fp16``.
        """
        if self.args.device.type == "cpu":
            warn_of_busy_cores()
        tf32 = chooses_tf32(self.args, self.model)
        self._first_log = {"tf32": 1.0} if tf32 else {}
        with all_or_nothing(self.model) as undo:
            undo.callback(undo_of_initialisation(self.model))  # a checkpoint may initialise it
            if not self.is_fsdp_enabled:
                self.model_wrapped = self.model  # after an earlier train it has to be prepared again
            with settings_kept(self.model):
                self._keep_original()
                with (
                    fused_lora(self.model, self.args.fused_lora),
                    float32_products("tf32" if tf32 else None),
                    self._original_model(),
                ):
                    return super().train(*args, **kwargs)

    def _keep_original(self) -> None:
        """Keep what the objective needs of the model that the first train was given."""
        if not self.objective.compares or self._given is not None or self.train_dataset.originals:
            return
        self._given = snapshot_reference(self.model)
        if self._given is None:
            with self.accelerator.autocast():  # in the precision of training
                self._keep_originals()

    def _original_model(self) -> AbstractContextManager[None]:
        """A context in which ``_originals`` are those of the model that the first train was given."""
        peft_model: Any = self.model
        return nullcontext() if self._given is None else reference_adapter(peft_model, self._given)

    def _keep_originals(self) -> None:
        """Run the original model on every row that will be drawn, and keep what the quantities need of it."""
        dataset = self.train_dataset
        steps = self._steps_of_an_epoch()
        epochs = self.args.max_steps / steps if self.args.max_steps > 0 else self.args.num_train_epochs
        drawn: dict[tuple[str, Any], None] = {}  # an ordered set

        def reading_order(draw: Draw) -> tuple[bool, int | None]:  # a stream is read once
            return draw.row is None, draw.position if dataset.streams_retain else draw.row

        for epoch in range(math.ceil(epochs)):
            dataset.set_epoch(epoch)
            for draw in sorted(self._get_train_sampler(), key=reading_order):
                for kind in self.objective.reference_kinds:
                    drawn[kind, dataset.key(kind, draw)] = None
        dataset.set_epoch(0)
        everything, size = list(drawn), self.args.per_device_train_batch_size
        for begin in tqdm(
            range(0, len(everything), size),
            desc="original model",
            disable=self.args.disable_tqdm,
            leave=False,
        ):
            keys = everything[begin : begin + size]
            rows = [dataset.row(*key) for key in keys]
            tokens = self._prepare_inputs(collate(rows, padding_id(self.processing_class, self.model)))
            masks = {
                kind: torch.tensor([key[0] == kind for key in keys], dtype=torch.bool)
                for kind in self.objective.kinds
            }
            needed = self._compared({kind: mask.to(self.args.device) for kind, mask in masks.items()})
            with evaluating(self.model):
                values = original_values(self.model, needed=needed, **tokens)
            positions = positions_of(needed, tokens["labels"], tokens.get("attention_mask"))
            for quantity, concerned in needed:
                counts = positions[quantity.name].sum(1)[concerned].tolist()
                parts = values[quantity.name].cpu().split(counts)
                chosen = (key for key, chosen in zip(keys, concerned.tolist(), strict=True) if chosen)
                for key, part in zip(chosen, parts, strict=True):
                    dataset.originals.setdefault(key, {})[quantity.name] = part.clone()
        if self.objective.needs_head:
            head = output_embedding(self.model)
            bias = None if head.bias is None else head.bias.detach().clone()
            self._original_head = head.weight.detach().clone(), bias

    def _compared(self, masks: Mapping[str, Tensor]) -> list[RowsOf]:
        """The quantities that compare with the original model, each with its rows.

        ``masks`` (B,), bool, are those of each kind of rows.
        """
        return [(quantity, rows) for quantity, rows in self.objective.rows_of(masks) if quantity.compares]

    def _originals(
        self, model: nn.Module, inputs: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the quantities need of the original model for the rows of a batch, by their names."""
        needed = self._compared(masks)
        names = [quantity.name for quantity, _ in needed]
        if all(f"original_{name}" in inputs for name in names):
            return {name: inputs[f"original_{name}"] for name in names}
        peft_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if not isinstance(peft_model, PeftModel):
            raise ValueError(
                f"method {self.args.method!r} without an adapter needs the original model's values, which "
                "only train() has, for the rows that it draws"
            )
        concerned = torch.stack([rows for _, rows in needed]).any(0)
        tokens = {name: value[concerned] for name, value in model_tokens(inputs).items()}
        needed = [(quantity, rows[concerned]) for quantity, rows in needed]
        with reference_model(peft_model), evaluating(model):
            return original_values(model, needed=needed, **tokens)

    def _batch(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Batch, Tensor]:
        """Run the model, and before it the original model if the objective needs it.

        Returns:
            The ``Batch`` and the triplets (B, T, 3) of all its rows.
        """
        masks = {kind: inputs[f"is_{kind}"] for kind in self.objective.kinds}
        found = token_values(
            model,
            needed=self.objective.rows_of(masks),
            originals=self._originals(model, inputs, masks),
            original_head=self._original_head,
            **model_tokens(inputs),
        )
        rows = {
            kind: Rows(
                found.triplet[mask],
                found.counted[mask],
                {name: value[mask] for name, value in found.values.items()},
                {name: where[mask] for name, where in found.positions.items()},
            )
            for kind, mask in masks.items()
        }
        beta, arguments = self._method_arguments
        return Batch(**rows, beta=beta, arguments=arguments), found.triplet  # type: ignore[arg-type]

    def _first_module_not_finite(self, inputs: Mapping[str, Tensor]) -> str | None:
        if self.is_fsdp_enabled:
            return None  # a forward needs all processes, and only this process may have the NaN
        return first_module_not_finite(self.model, lambda: self._batch(self.model, inputs))

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        config: Any = self.args.accelerator_config
        size = self._train_batch_size
        together = size if config.split_batches else size * self.accelerator.num_processes
        one = self.accelerator.num_processes == 1 or self.args.dataloader_drop_last
        return PairSampler(
            self.train_dataset,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            strategy=self.args.train_sampling_strategy,
            step=together * self.args.gradient_accumulation_steps,
            multiple=1 if one else together,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """The ``LossShares.counts`` of a step, summed over its micro-batches and over processes."""
        totals: Any = 0
        for batch in batch_samples:
            counts = self._loss_shares.counts(batch)
            totals = totals + torch.stack(list(counts.values())).to(device)
        if not batch_samples:
            return None
        return dict(zip(counts, self.accelerator.reduce(totals, "sum"), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute a batch's part of the loss of its step.

        The parts add up over the step's micro-batches and average over processes, as DDP averages gradients.
        The result is the loss of one batch with all rows.

        Args:
            model: The model, with the wrappers of accelerate or without.
            inputs: The batch, as from ``loku.data.collate_pairs``.
            return_outputs: Whether to return the triplets, too; False by default.
            num_items_in_batch: The ``LossShares.counts`` of the step, a dict of 0-dimensional tensors. None
                (default) stands for those of this batch.

        Returns:
            The scalar loss; or a tuple of it and ``{"triplet": (B, T, 3)}``.
        """
        self._step_log.start()
        batch, triplet = self._batch(model, inputs)
        measured = self.objective.losses(batch)
        if model.training:
            self._loss_check.add(measured, inputs)
        with torch.no_grad():
            for kind in self.objective.kinds:
                rows = getattr(batch, kind)
                probability = answer_probability(rows.triplet.detach(), rows.counted)
                measured[f"{kind}_probability"] = reduce_loss(probability, rows.labelled(), "mean")
            counts = self._loss_shares.counts(inputs)
            shares = self._loss_shares.shares(counts, num_items_in_batch or counts)
            self._step_log.add(measured, shares.log)
            if model.training and "retain_loss" in measured:
                self._retain_weight.add(measured["retain_loss"] * shares.log["retain_loss"])
            labels = (next_token_labels(inputs["labels"]) != IGNORE_INDEX).sum()
            self._step_log.count(inputs["token_count"].sum(), labels)
        loss = self.args.forget_weight * (measured["forget_loss"] * shares.losses["forget_loss"])
        if "retain_loss" in measured:
            part = measured["retain_loss"] * shares.losses["retain_loss"]
            loss = loss + self._retain_weight.value * part
        if num_items_in_batch:
            loss = loss * self.accelerator.num_processes
        return (loss, {"triplet": triplet}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the metrics of the steps since the last log.

        Args:
            logs: The trainer's log, which gets the metrics.
            args: The other arguments of ``transformers.Trainer.log``.
            kwargs: The other keyword arguments of ``transformers.Trainer.log``.
        """
        causal_lm: Any = unwrapped(self.model)
        narrow = self.args.bf16 or self.args.fp16  # by autocast
        dtype = torch.bfloat16 if narrow else causal_lm.dtype  # both 16-bit dtypes have a card's same peak
        if not logs.keys().isdisjoint(("loss", "train_loss")):  # not the log of an evaluation
            logs |= self._step_log.take(self.accelerator, self.model, dtype) | self._retain_weight.logged()
            logs |= self._first_log
            self._first_log = {}
        super().log(logs, *args, **kwargs)

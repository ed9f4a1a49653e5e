"""The training loop: ``transformers.Trainer`` on pairs of forget and retain rows."""

import math
import time
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from loku.checkpoints import ResumableTrainer
from loku.config import UnlearnConfig
from loku.data import (
    IGNORE_INDEX,
    PairedDataset,
    PairSampler,
    RefusalRows,
    StreamedRows,
    collate,
    collate_pairs,
    duplicate_rows,
    has_input_ids,
    infer_tokenizer,
    load_refusals,
    padding_id,
    retain_rows,
    tokenize_dataset,
)
from loku.data.large_sets import DrawnRows
from loku.fila.initialize import reference_model
from loku.head import (
    check_packing,
    label_hidden_states,
    model_tokens,
    next_token_labels,
    output_embedding,
    token_triplets,
    token_triplets_and_divergence,
)
from loku.memory import peak_device_memory, peak_memory
from loku.models import evaluating, keep_differentiable_, load_model
from loku.nan_guard import LossCheck, first_module_not_finite
from loku.objectives import OBJECTIVES, Batch, Rows, answer_probability
from loku_kernels import reduce_loss


class PreparedRows(NamedTuple):
    """The rows of a run, tokenised, by ``prepare_rows``."""

    forget: list  # tokenised rows
    retain: Any  # tokenised rows, LazyRows or StreamedRows
    refusals: Any  # RefusalRows, or None
    tokenizer: Any  # the tokenizer, or None where every row was tokenised


def prepare_rows(
    model: Any,
    forget: Any,
    retain: Any,
    config: UnlearnConfig,
    tokenizer: Any = None,
    refusals: Any = None,
) -> PreparedRows:
    """Tokenise the rows that are not yet tokenised.

    Args:
        model: The causal LM, whose tokenizer is looked for where none is given and one is needed.
        forget: The forget set, as for ``loku.unlearn``; or ``PreparedRows``, which are returned as they are.
        retain: The retain set, as for ``loku.unlearn``.
        config: The settings; ``method``, ``max_length`` and ``refusals`` count.
        tokenizer: The tokenizer, by default the one saved beside the model.
        refusals: A ``loku.data.RefusalRows``, by default made of the forget set where the method needs it.
    """
    if isinstance(forget, PreparedRows):
        return forget
    if tokenizer is None and not all(
        isinstance(rows, DrawnRows) or has_input_ids(rows) for rows in (forget, retain)
    ):
        tokenizer = infer_tokenizer(model)
    if refusals is None and "refusal" in OBJECTIVES[config.method].rows:
        if has_input_ids(forget):
            raise ValueError(
                f"method {config.method!r} trains on refusals; pass a loku.data.RefusalRows, or a forget set "
                "that is not tokenised"
            )
        refusals = RefusalRows(
            forget, load_refusals(config.refusals), tokenizer, max_length=config.max_length
        )
    forget = tokenize_dataset(forget, tokenizer, max_length=config.max_length)
    retain = retain_rows(retain, tokenizer, max_length=config.max_length, forget=forget)
    return PreparedRows(forget, retain, refusals, tokenizer)


def _reference_values(model, tokens, reference):
    """The values of the original model that an objective names, of a model that computes as the original.

    "log_probability" is (B,), of each row; "divergence" starts from the hidden states (n, D).
    """
    with evaluating(model):
        if reference == "divergence":
            return label_hidden_states(model, **tokens)
        return Rows(*token_triplets(model, **tokens)).log_probability()


class LossBar(ProgressCallback):
    """The trainer's progress bar, with the last losses at its end instead of a line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {name: value for name, value in (logs or {}).items() if name.endswith("_loss")}
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix(losses)


class _SetEpoch(TrainerCallback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class UnlearnTrainer(ResumableTrainer):
    """Minimise the forget loss plus the retain loss of paired rows; never hold their logits.

    It trains the model, or the adapter, as it is: ``loku.unlearn`` is this with FILA or PiSSA before it
    (``UnlearnConfig.init``). The original model, which KL, DPO and NPO need, is with LoRA the peft model
    itself, with its frozen initial adapter (``loku.reference_model``): one more forward of the rows
    concerned. A model without an adapter changes in place, so ``train`` first runs all rows that will be
    drawn, and keeps their log-probabilities (DPO, NPO), or for KL the last hidden states of the retain rows'
    labelled tokens, on the CPU, and a copy of the output embedding.

    Args:
        model: a causal LM, usually a peft model, or the path or hub name of one.
        args: an ``UnlearnConfig``; by default its defaults.
        forget, retain: data sets as for ``loku.unlearn``, or tokenised rows (``loku.data.tokenize_dataset``).
        processing_class: the tokenizer; by default the one saved beside the model, if it is needed.
        refusals: a ``loku.data.RefusalRows`` of the forget set, for methods that train on refusals; by
            default made from it.
        peft_config: of an adapter to put into the model, such as a ``peft.LoraConfig``.
        Everything else is ``transformers.Trainer``'s.

    A step's loss is that of one batch with all its rows: ``gradient_accumulation_steps`` and the number of
    processes only say where they are run. Each loss is divided by what the whole step has of its tokens (DPO
    and NPO: rows), counted over micro-batches and processes, whatever ``average_tokens_across_devices`` says.
    Where the last step of an epoch has too few rows for all processes, the rest get rows without labels.

    Logs ``forget_loss``, ``retain_loss`` and the mean answer probabilities ``forget_probability``,
    ``retain_probability`` and ``refusal_probability`` of the steps since the last log, of all processes
    together; not those of rows that the method does not run. The forget probability is that of the true
    answers. And ``tokens_per_second``, of all processes and since the last log, padding and the original
    model's forwards not counted; ``peak_memory_gib``, the most that a process has taken: of its CUDA
    device, or resident.
    """

    def __init__(
        self,
        model,
        args,
        forget,
        retain,
        processing_class=None,
        refusals=None,
        peft_config=None,
        **kwargs,
    ):
        args = UnlearnConfig() if args is None else args
        self.objective = OBJECTIVES[args.method]
        model = load_model(model, args)
        keep_differentiable_(model)
        if peft_config is not None and isinstance(model, PeftModel):
            raise ValueError(
                "model is a PeftModel already; leave out peft_config, or merge its adapter first"
            )
        forget, retain, refusals, processing_class = prepare_rows(
            model, forget, retain, args, processing_class, refusals
        )
        self._check_rows(model, args, forget, retain)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        half = (n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16)
        if (name := next(half, None)) is not None:
            raise ValueError(
                f"{name} would train in float16, in which small steps round to nothing: load the model with "
                "dtype=torch.float32 (and set bf16 or fp16 for its speed), or in bfloat16"
            )
        dataset = PairedDataset(forget, retain, args.seed, refusals, self.objective.kinds)
        collator = partial(collate_pairs, pad_token_id=padding_id(processing_class))
        super().__init__(
            model=model,
            args=args,
            forget=forget,
            retain=retain,
            refusals=refusals if "refusal" in self.objective.kinds else None,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # without progress bars it would print every log
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)
        self.add_callback(_SetEpoch(dataset))
        self._loss_check = LossCheck(self._first_module_not_finite)
        self.add_callback(self._loss_check)
        # compute_loss divides by the counts of a whole step, from _get_num_items_in_batch: scaled already
        self.model_accepts_loss_kwargs = True
        # transformers 5.2 to 5.5.3 let accelerate divide once more, by the number of micro-batches
        self.accelerator.gradient_accumulation_steps = 1
        self._reference_head = (None, None)
        # name -> its part of the step's mean, and the share of the step that was averaged, of each batch
        # since the last log
        self._batch_metrics, self._batch_shares = {}, {}
        self._tokens, self._since = [], None  # of each batch, and the time, since then

    def _check_rows(self, model, args, forget, retain):
        if isinstance(retain, StreamedRows) and args.dataloader_num_workers > 0:
            raise ValueError("a retain set without a length is read by one process: dataloader_num_workers=0")
        packed = any("position_ids" in row for row in forget)
        if packed and self.objective.forget_over == "rows":
            raise ValueError(
                f"method {args.method!r} compares whole answers; give each document of the forget set a row"
            )
        listed = isinstance(retain, list) and "retain" in self.objective.kinds
        if packed or any("position_ids" in row for row in (retain if listed else [])):
            check_packing(model)
        twice = duplicate_rows(forget, retain) if listed else []
        if twice:
            warnings.warn(
                f"{len(twice)} of the {len(retain)} rows of the retain set are also in the forget set, the "
                f"first is row {twice[0][0]} (row {twice[0][1]} of the forget set): the two losses work "
                "against each other",
                stacklevel=3,
            )

    def train(self, *args, **kwargs):
        needed = self.objective.reference is not None and not isinstance(self.model, PeftModel)
        if needed and not self.train_dataset.references:
            self._keep_references()
        return super().train(*args, **kwargs)

    def _keep_references(self):
        """Run the original model on every row that will be drawn, and keep what the objective needs."""
        dataset, reference = self.train_dataset, self.objective.reference
        steps = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        epochs = self.args.max_steps / steps if self.args.max_steps > 0 else self.args.num_train_epochs
        drawn = {}

        def reading_order(draw):  # a stream is read once
            return draw.row is None, draw.position if dataset.streams_retain else draw.row

        for epoch in range(math.ceil(epochs)):
            dataset.set_epoch(epoch)
            for draw in sorted(self._get_train_sampler(), key=reading_order):
                for kind in self.objective.reference_kinds:
                    drawn[kind, dataset.key(kind, draw)] = None
        dataset.set_epoch(0)
        drawn, size = list(drawn), self.args.per_device_train_batch_size
        for begin in tqdm(
            range(0, len(drawn), size), desc="original model", disable=self.args.disable_tqdm, leave=False
        ):
            keys = drawn[begin : begin + size]
            batch = collate([dataset.row(*key) for key in keys], padding_id(self.processing_class))
            with self.compute_loss_context_manager():
                values = _reference_values(self.model, self._prepare_inputs(batch), reference)
            counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
            sizes = counts if reference == "divergence" else [1] * len(keys)
            for key, value in zip(keys, values.cpu().split(sizes), strict=True):
                dataset.references[key] = value.clone()
        if reference == "divergence":
            head = output_embedding(self.model)
            self._reference_head = tuple(
                None if p is None else p.detach().clone() for p in (head.weight, head.bias)
            )

    def _reference(self, model, inputs, concerned):
        """``_reference_values`` for the rows where ``concerned`` (B,) is true."""
        if "reference" in inputs:
            return inputs["reference"]
        peft_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if not isinstance(peft_model, PeftModel):
            raise ValueError(
                f"method {self.args.method!r} without an adapter needs the original model's values, which "
                "only train() has, for the rows that it draws"
            )
        tokens = {name: value[concerned] for name, value in model_tokens(inputs).items()}
        with reference_model(peft_model):
            return _reference_values(model, tokens, self.objective.reference)

    def _batch(self, model, inputs):
        """The ``Batch`` of a forward of the model, after one of the original where that is needed."""
        tokens, needed = model_tokens(inputs), self.objective.reference
        masks = {kind: inputs[f"is_{kind}"] for kind in self.objective.kinds}
        log_probability = divergence = None
        if needed is not None:
            concerned = torch.stack([masks[kind] for kind in self.objective.reference_kinds]).any(0)
            reference = self._reference(model, inputs, concerned)
        if needed == "divergence":
            triplet, counted, divergence = token_triplets_and_divergence(
                model,
                **tokens,
                diverging=concerned,
                reference_hidden=reference,
                reference_head=self._reference_head,
            )
        else:
            triplet, counted = token_triplets(model, **tokens)
        if needed == "log_probability":
            log_probability = torch.zeros_like(triplet[:, 0, 0]).masked_scatter(concerned, reference)
        values = (triplet, counted, log_probability, divergence)
        rows = {
            kind: Rows(*(None if value is None else value[mask] for value in values))
            for kind, mask in masks.items()
        }
        return Batch(**rows, beta=self.args.beta), triplet

    def _first_module_not_finite(self, inputs):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None  # a forward needs all processes, and only this one may have the NaN
        return first_module_not_finite(self.model, lambda: self._batch(self.model, inputs))

    def _get_train_sampler(self, train_dataset=None):
        size, config = self._train_batch_size, self.args.accelerator_config
        together = size if config.split_batches else size * self.accelerator.num_processes
        one = self.accelerator.num_processes == 1 or self.args.dataloader_drop_last
        return PairSampler(
            self.train_dataset,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            strategy=self.args.train_sampling_strategy,
            step=together * self.args.gradient_accumulation_steps,
            multiple=1 if one else together,
        )

    def _counts(self, counted):
        """What there is in a batch of all that is averaged, by its name in the log; counted: by kind."""
        rows = {f"{kind}_probability": counted[kind].any(1).sum() for kind in self.objective.kinds}
        return {**self.objective.counts(counted), **rows}

    def _get_num_items_in_batch(self, batch_samples, device):
        """``_counts`` of a step: summed over its micro-batches and over processes."""
        totals = 0
        for batch in batch_samples:
            counted = next_token_labels(batch["labels"]) != IGNORE_INDEX
            kinds = {kind: counted[batch[f"is_{kind}"]] for kind in self.objective.kinds}
            counts = self._counts(kinds)
            totals = totals + torch.stack(list(counts.values())).to(device)
        if not batch_samples:
            return None
        return dict(zip(counts, self.accelerator.reduce(totals, "sum"), strict=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's part of the loss of a step whose ``_counts`` are ``num_items_in_batch``.

        By default the step has no more than this batch. Added up over the step's micro-batches and averaged
        over processes, as DDP averages gradients, the parts are the loss of one batch with all rows.
        """
        if self._since is None:
            self._since = time.perf_counter()
        self._tokens.append(inputs["token_count"].sum())
        batch, triplet = self._batch(model, inputs)
        measured = self.objective.losses(batch)
        if model.training:
            self._loss_check.add(measured, inputs)
        with torch.no_grad():
            for kind in self.objective.kinds:
                rows = getattr(batch, kind)
                probability = answer_probability(rows.triplet.detach(), rows.counted)
                measured[f"{kind}_probability"] = reduce_loss(probability, rows.labelled(), "mean")
            counts = self._counts({kind: getattr(batch, kind).counted for kind in self.objective.kinds})
            totals = num_items_in_batch or counts
            shares = {name: counts[name].double() / totals[name].clamp(min=1) for name in measured}
            for name, value in measured.items():
                self._batch_metrics.setdefault(name, []).append(value.detach() * shares[name])
                self._batch_shares.setdefault(name, []).append(shares[name])
        loss = measured["forget_loss"] * shares["forget_loss"]
        if "retain_loss" in measured:
            loss = loss + self.args.retain_weight * (measured["retain_loss"] * shares["retain_loss"])
        if num_items_in_batch:
            loss = loss * self.accelerator.num_processes
        return (loss, {"triplet": triplet}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if self._batch_metrics:
            sums = [
                torch.stack([torch.stack(parts).sum() for parts in kept.values()])
                for kept in (self._batch_metrics, self._batch_shares)
            ]
            tokens = torch.stack(self._tokens).sum(dtype=torch.float64)
            *sums, tokens = self.accelerator.reduce([*sums, tokens], "sum")
            logs |= dict(zip(self._batch_metrics, (sums[0] / sums[1]).tolist(), strict=True))
            now, device = time.perf_counter(), self.args.device
            logs["tokens_per_second"] = tokens.item() / (now - self._since)
            peak = peak_device_memory() or peak_memory()
            peak = torch.tensor([peak], dtype=torch.float64, device=device)
            logs["peak_memory_gib"] = self.accelerator.gather(peak).max().item() / 2**30
            self._since = now
            for kept in (self._batch_metrics, self._batch_shares, self._tokens):
                kept.clear()
        super().log(logs, *args, **kwargs)

"""The training loop: ``transformers.Trainer`` on pairs of forget and retain rows."""

import math
import os
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from loku.callbacks import LossBar
from loku.checkpoints import ResumableTrainer
from loku.data import (
    IGNORE_INDEX,
    RefusalRows,
    collate,
    duplicate_rows,
    has_input_ids,
    infer_tokenizer,
    load_refusals,
    padding_id,
    tokenize_dataset,
)
from loku.fila import reference_model
from loku.finite import LossCheck, first_module_not_finite
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
from loku.objectives import OBJECTIVES, Batch, Rows, answer_probability
from loku.quantised import keep_differentiable_
from loku.streams import DrawnRows, StreamedRows, retain_rows
from loku.targets import TARGET_SWEEPS
from loku_kernels import reduce_loss


@dataclass
class UnlearnConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what unlearning adds to them.

    An epoch is one pass over the forget set; each of its rows comes with one retain row (and where the method
    asks for it one refusal), so a step sees ``per_device_train_batch_size`` rows of each.

    With the defaults of the learning rate and the retain weight, IHL and FILA end best on the embedded model
    (see README's experiments); a larger model may want a lower learning rate.

    Args:
        method: what is minimised, a key of ``loku.objectives.OBJECTIVES``: "ihl", "ga", "gd", "kl", "dpo",
            "npo" or "idk".
        tuning: "lora", or "full" for all parameters that require a gradient. Then ``init``, the LoRA fields
            and ``target_modules`` mean nothing.
        init: how LoRA starts. "fila" from the Fisher information of the two sets, "pissa" from the leading
            singular directions of the weights themselves, "default" as peft does.
        lora_rank, lora_alpha: of the adapter; its scaling is lora_alpha / lora_rank.
        target_modules: names of the modules to adapt, or a sweep of the paper's Figure 4: "qv" for query and
            value, "qkvo" for key and output as well, "ffn" for every MLP linear, "qv+ffn" (or None).
        retain_weight: of the retain loss beside the forget loss (1 in Eq. 3).
        beta: of DPO and NPO, the inverse temperature.
        refusals: for DPO and IDK, a list of strings or the path of a file with one on each line; None for
            TOFU's 100. Each epoch draws one for every forget row.
        max_length: tokens at which rows are cut; None for as long as they are.
        fisher_damping, fisher_damping_mode, fisher_samples, fisher_memory_budget, fisher_cache_dir: see
            ``loku.FilaConfig``.
        model_init_kwargs: for ``from_pretrained``, where the model is given by its path or name.
        train_sampling_strategy: the order of the forget rows in an epoch. "random", "sequential", or
            "group_by_length": random, but rows that are run together are of similar length. What is drawn
            for each does not depend on it.
    """

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    output_dir: str | None = field(default="loku-output")
    learning_rate: float = field(default=2e-3)
    num_train_epochs: float = field(default=10)
    save_strategy: str = field(default="no")
    report_to: list[str] | str | None = field(default="none")
    logging_steps: float = field(default=1)
    logging_nan_inf_filter: bool = field(default=False)  # UnlearnTrainer stops at the first of them

    method: str = field(default="ihl")
    tuning: Literal["lora", "full"] = field(default="lora")
    init: Literal["fila", "default", "pissa"] = field(default="fila")
    lora_rank: int = field(default=16)
    lora_alpha: float = field(default=32)
    target_modules: list[str] | str | None = field(default="qv+ffn")
    retain_weight: float = field(default=1.5)
    beta: float = field(default=0.1)
    refusals: list[str] | str | None = field(default=None)
    max_length: int | None = field(default=None)
    fisher_damping: float = field(default=1.0)
    fisher_damping_mode: Literal["relative", "absolute"] = field(default="relative")
    fisher_samples: int | None = field(default=None)
    fisher_memory_budget: int | str | None = field(default=None)
    fisher_cache_dir: str | None = field(default=None)
    model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = field(default="random")

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # the rows are pairs, not the model's arguments
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a forward uses all that is trained
        if self.method not in OBJECTIVES:
            raise ValueError(f"method must be one of {sorted(OBJECTIVES)}, got {self.method!r}")
        if self.tuning not in ("lora", "full"):
            raise ValueError(f'tuning must be "lora" or "full", got {self.tuning!r}')
        if self.init not in ("fila", "default", "pissa"):
            raise ValueError(f'init must be "fila", "default" or "pissa", got {self.init!r}')
        self.target_modules = self.target_modules or "qv+ffn"
        if isinstance(self.target_modules, str) and self.target_modules not in TARGET_SWEEPS:
            raise ValueError(
                f"target_modules must be a list of names or one of {list(TARGET_SWEEPS)}, got "
                f"{self.target_modules!r}"
            )
        if self.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                'train_sampling_strategy must be "random", "sequential" or "group_by_length", got '
                f"{self.train_sampling_strategy!r}"
            )
        if self.retain_weight < 0:
            raise ValueError(f"retain_weight must be >= 0, got {self.retain_weight}")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")


class PairedDataset(Dataset):
    """Row i of the forget set with a retain row and a refusal, both drawn anew each epoch.

    Retain rows come in a random order without repetition until all have been used. The draws depend on
    the seed, the epoch and i alone: not on batches, workers or processes. Row None has no labels: it fills up
    a batch and adds nothing to any loss.

    From a stream the retain rows come in its own order, as they are used. Then an item is (p, i), the forget
    row's place in the epoch's order and its index.

    Args:
        forget, retain: tokenised rows; retain may be ``loku.streams.StreamedRows``.
        seed: of the draws, >= 0.
        refusals: a ``loku.data.RefusalRows``, if ``kinds`` has "refusal".
        kinds: what an item has, in this order: "forget" row i, the same row with a "refusal", a "retain" row.
    """

    def __init__(self, forget, retain, seed, refusals=None, kinds=("forget", "retain")):
        self.forget, self.retain, self.refusals = forget, retain, refusals
        self.seed, self.kinds = seed, kinds
        self.streams_retain = isinstance(retain, StreamedRows)
        self.references = {}  # (kind, key) -> what is kept of the original model for that row
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self._epoch.fill_(epoch)
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch):
        self.epoch = epoch
        self._begin = epoch * len(self.forget)
        self._orders = {}
        if "refusal" in self.kinds:
            generator = np.random.default_rng((self.seed, epoch))
            self._refusal_indices = generator.integers(len(self.refusals.refusals), size=len(self.forget))

    def _retain_index(self, draw):
        lap, position = divmod(draw, len(self.retain))
        if lap not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + lap)
            self._orders[lap] = torch.randperm(len(self.retain), generator=generator)
        return int(self._orders[lap][position])

    def key(self, kind, index):
        """Which row item ``index`` has of a kind: an index into its set, for a refusal (row, refusal)."""
        if index is None:
            return None
        if self.streams_retain:
            position, index = index
            if kind == "retain":
                return self._begin + position
        if kind == "retain":
            return self._retain_index(self._begin + index)
        return index if kind == "forget" else (index, int(self._refusal_indices[index]))

    def row(self, kind, key):
        """A tokenised row, with its ``reference`` if there is one."""
        if key is None:
            row = {"input_ids": [0], "labels": [IGNORE_INDEX]}
        else:
            row = {"forget": self.forget, "retain": self.retain, "refusal": self.refusals}[kind][key]
        reference = self.references.get((kind, key))
        return row if reference is None else {**row, "reference": reference}

    def length(self, index):
        """Tokens of the longest row of an item; those of a stream are not known."""
        kinds = [kind for kind in self.kinds if not (kind == "retain" and self.streams_retain)]
        return max(len(self.row(kind, self.key(kind, index))["input_ids"]) for kind in kinds)

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        if self._epoch != self.epoch:  # in a worker: the training process has set it
            self._begin_epoch(self._epoch.item())
        return {kind: self.row(kind, self.key(kind, index)) for kind in self.kinds}


class PairSampler(Sampler):
    """The order of a ``PairedDataset``'s items in its epoch: of the seed and the epoch alone.

    Args:
        dataset: a ``PairedDataset``.
        seed: of the order, >= 0.
        strategy: see ``UnlearnConfig.train_sampling_strategy``.
        step: rows of an optimizer step, which "group_by_length" makes alike.
        multiple: the order is filled up to a multiple of this with None, the row without labels. With the
            rows that all processes take together, each has as many whole batches as the others, and no row
            counts twice (accelerate would repeat the first ones).
    """

    def __init__(self, dataset, seed, strategy="random", step=1, multiple=1):
        self.dataset, self.seed = dataset, seed
        self.strategy, self.step, self.multiple = strategy, step, multiple

    def __len__(self):
        return math.ceil(len(self.dataset) / self.multiple) * self.multiple

    def __iter__(self):
        order = self._order()
        yield from enumerate(order) if self.dataset.streams_retain else order
        yield from [None] * (len(self) - len(order))

    def _order(self):
        rows = range(len(self.dataset))
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        if self.strategy == "sequential":
            return rows
        if self.strategy == "group_by_length":
            lengths = [self.dataset.length((i, i) if self.dataset.streams_retain else i) for i in rows]
            return get_length_grouped_indices(lengths, self.step, generator=generator)
        return torch.randperm(len(rows), generator=generator).tolist()


def collate_pairs(pairs, pad_token_id):
    """One batch of all rows of the first kind, then of the second, ...

    ``is_forget`` (rows,), ``is_retain`` and ``is_refusal``, of the kinds that there are, tell them apart.
    ``token_count`` (rows,) is how many tokens each has.
    ``reference`` is what the rows bring of it, concatenated.
    """
    kinds = list(pairs[0])
    rows = [pair[kind] for kind in kinds for pair in pairs]
    batch = collate(rows, pad_token_id)
    for number, kind in enumerate(kinds):
        batch[f"is_{kind}"] = torch.arange(len(rows)) // len(pairs) == number
    batch["token_count"] = torch.tensor([len(row["input_ids"]) for row in rows])
    references = [row["reference"] for row in rows if "reference" in row]
    if references:
        batch["reference"] = torch.cat(references)
    return batch


class _SetEpoch(TrainerCallback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


def load_model(model, config):
    """The model itself, or the causal LM of that path or hub name."""
    if isinstance(model, (str, os.PathLike)):
        arguments = {"use_safetensors": True, **(config.model_init_kwargs or {})}  # never a pickle unasked
        return AutoModelForCausalLM.from_pretrained(model, **arguments)
    if config.model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is given by its path or name")
    return model


def prepare_data(model, forget, retain, config, tokenizer=None, refusals=None):
    """Tokenise what is not yet tokenised: (forget rows, retain rows, refusals or None, tokenizer or None).

    forget, retain: as for ``loku.unlearn``. tokenizer: by default the one saved beside the model, if needed.
    """
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
    return forget, retain, refusals, tokenizer


@torch.no_grad()
def _of_the_original(model, tokens, what):
    """What an objective's ``reference`` names, of a model that is, or can switch to, the original.

    "log_probability": (B,), of each row. "divergence": the hidden states (n, D) that it starts from.
    """
    training = model.training
    model.eval()
    try:
        if what == "divergence":
            return label_hidden_states(model, **tokens)
        return Rows(*token_triplets(model, **tokens)).log_probability()
    finally:
        model.train(training)


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
        forget, retain, refusals, processing_class = prepare_data(
            model, forget, retain, args, processing_class, refusals
        )
        self._check_data(model, args, forget, retain)
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

    def _check_data(self, model, args, forget, retain):
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
        dataset, what = self.train_dataset, self.objective.reference
        steps = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        epochs = self.args.max_steps / steps if self.args.max_steps > 0 else self.args.num_train_epochs
        drawn = {}
        for epoch in range(math.ceil(epochs)):
            dataset.set_epoch(epoch)
            for index in sorted(self._get_train_sampler(), key=lambda index: (index is None, index)):
                for kind in self.objective.reference_kinds:
                    drawn[kind, dataset.key(kind, index)] = None
        dataset.set_epoch(0)
        drawn, size = list(drawn), self.args.per_device_train_batch_size
        for begin in tqdm(
            range(0, len(drawn), size), desc="original model", disable=self.args.disable_tqdm, leave=False
        ):
            keys = drawn[begin : begin + size]
            batch = collate([dataset.row(*key) for key in keys], padding_id(self.processing_class))
            with self.compute_loss_context_manager():
                values = _of_the_original(self.model, self._prepare_inputs(batch), what)
            counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
            sizes = counts if what == "divergence" else [1] * len(keys)
            for key, value in zip(keys, values.cpu().split(sizes), strict=True):
                dataset.references[key] = value.clone()
        if what == "divergence":
            head = output_embedding(self.model)
            self._reference_head = tuple(
                None if p is None else p.detach().clone() for p in (head.weight, head.bias)
            )

    def _reference(self, model, inputs, concerned):
        """``_of_the_original`` for the rows where ``concerned`` (B,) is true."""
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
            return _of_the_original(model, tokens, self.objective.reference)

    def _batch(self, model, inputs):
        """The ``Batch`` of a forward of the model, after one of the original where that is needed."""
        tokens, what = model_tokens(inputs), self.objective.reference
        masks = {kind: inputs[f"is_{kind}"] for kind in self.objective.kinds}
        log_probability = divergence = None
        if what is not None:
            concerned = torch.stack([masks[kind] for kind in self.objective.reference_kinds]).any(0)
            reference = self._reference(model, inputs, concerned)
        if what == "divergence":
            triplet, counted, divergence = token_triplets_and_divergence(
                model,
                **tokens,
                diverging=concerned,
                reference_hidden=reference,
                reference_head=self._reference_head,
            )
        else:
            triplet, counted = token_triplets(model, **tokens)
        if what == "log_probability":
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

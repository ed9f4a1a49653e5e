"""The training loop: ``transformers.Trainer`` on pairs of forget and retain rows."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from loku.data import collate, padding_id
from loku.head import token_triplets
from loku.objectives import answer_probability, forget_loss, retain_loss


@dataclass
class UnlearnConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what unlearning adds to them.

    An epoch is one pass over the forget set; each of its rows comes with one retain row, so a step sees
    ``per_device_train_batch_size`` rows of each.

    Args:
        init: how LoRA starts. "fila" from the Fisher information of the two sets, "default" as peft does.
        lora_rank, lora_alpha: of the adapter; its scaling is lora_alpha / lora_rank.
        target_modules: names of the modules to adapt; None for query, value and every MLP linear.
        retain_weight: of the retain loss beside the forget loss (1 in Eq. 3).
        max_length: tokens at which rows are cut; None for as long as they are.
        fisher_damping, fisher_damping_mode, fisher_samples: see ``loku.FilaConfig``.
    """

    output_dir: str | None = field(default="loku-output")
    learning_rate: float = field(default=1e-3)
    num_train_epochs: float = field(default=10)
    save_strategy: str = field(default="no")
    report_to: str | list[str] | None = field(default="none")
    logging_steps: float = field(default=1)

    init: Literal["fila", "default"] = field(default="fila")
    lora_rank: int = field(default=16)
    lora_alpha: float = field(default=32)
    target_modules: list[str] | None = field(default=None)
    retain_weight: float = field(default=1.0)
    max_length: int | None = field(default=None)
    fisher_damping: float = field(default=1.0)
    fisher_damping_mode: Literal["relative", "absolute"] = field(default="relative")
    fisher_samples: int | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # the rows are pairs, not the model's arguments
        if self.init not in ("fila", "default"):
            raise ValueError(f'init must be "fila" or "default", got {self.init!r}')
        if self.retain_weight < 0:
            raise ValueError(f"retain_weight must be >= 0, got {self.retain_weight}")


class PairedDataset(Dataset):
    """Row i of the forget set with a retain row, drawn anew each epoch.

    Retain rows come in a random order without repetition until all have been used. The draw depends on
    the seed, the epoch and i alone: not on batches, workers or processes.
    """

    def __init__(self, forget, retain, seed):
        self.forget, self.retain, self.seed = forget, retain, seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self._begin = epoch * len(self.forget)
        self._orders = {}

    def _retain_index(self, draw):
        lap, position = divmod(draw, len(self.retain))
        if lap not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + lap)
            self._orders[lap] = torch.randperm(len(self.retain), generator=generator).tolist()
        return self._orders[lap][position]

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        return {"forget": self.forget[index], "retain": self.retain[self._retain_index(self._begin + index)]}


def collate_pairs(pairs, pad_token_id):
    """One batch of all forget rows and then all retain rows; ``is_forget`` (2B,) tells them apart."""
    rows = [pair["forget"] for pair in pairs] + [pair["retain"] for pair in pairs]
    is_forget = torch.arange(len(rows)) < len(pairs)
    return {**collate(rows, pad_token_id), "is_forget": is_forget}


class _SetEpoch(TrainerCallback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class UnlearnTrainer(Trainer):
    """Minimise the forget loss plus the retain loss of paired rows; never hold their logits.

    Args:
        model: a causal LM, usually a peft model.
        forget, retain: tokenised rows (``loku.data.tokenize_dataset``).
        args: an ``UnlearnConfig``.
        Everything else is ``transformers.Trainer``'s.

    Logs ``forget_loss``, ``retain_loss`` and the mean answer probabilities ``forget_probability`` and
    ``retain_probability`` of the batches since the last log.
    """

    def __init__(self, model, args, forget, retain, processing_class=None, **kwargs):
        dataset = PairedDataset(forget, retain, args.seed)
        collator = partial(collate_pairs, pad_token_id=padding_id(processing_class))
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_SetEpoch(dataset))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch
        self._batch_metrics = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        triplet, counted = token_triplets(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        )
        forget = inputs["is_forget"]
        losses = {
            "forget_loss": forget_loss(triplet[forget], counted[forget]),
            "retain_loss": retain_loss(triplet[~forget], counted[~forget]),
        }
        loss = losses["forget_loss"] + self.args.retain_weight * losses["retain_loss"]
        with torch.no_grad():
            probability = answer_probability(triplet.detach(), counted)
            metrics = {
                **losses,
                "forget_probability": probability[forget].mean(),
                "retain_probability": probability[~forget].mean(),
            }
            for name, value in metrics.items():
                self._batch_metrics.setdefault(name, []).append(value.detach())
        return (loss, {"triplet": triplet}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        for name, values in self._batch_metrics.items():
            logs[name] = torch.stack(values).mean().item()
        self._batch_metrics.clear()
        super().log(logs, *args, **kwargs)

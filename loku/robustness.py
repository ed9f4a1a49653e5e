"""Two attacks that may bring an unlearned text back: quantisation, and fine-tuning on a part of the text.

If either brings it back, unlearning has hidden the text and not removed it (Zhang et al., ICLR 2025, on
quantisation; Lynch et al., 2024, on relearning).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from loku.callbacks import ProbabilityGauge
from loku.counts import check_counts
from loku.data import (
    TOFU_TEMPLATE,
    QuestionTemplate,
    collate,
    padding_id,
    token_limits,
    tokenize_dataset,
)
from loku.data.rows import DataSet
from loku.models import model_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState


class _Curve(ProbabilityGauge):
    """A gauge that measures after the last step in any case."""

    def on_train_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.history[-1]["step"] != state.global_step:
            self._record(state, self.measure(model))


@torch.no_grad()
def round_weights_(model: PreTrainedModel, bits: int, group_size: int | None = None) -> None:
    """Round the weights of all layers but the embeddings to integers of a few bits, in place.

    Each group of weights is rounded symmetrically and to the nearest integer: w becomes round(w / s) s with
    s = max |w| / (2^(bits - 1) - 1). The weights keep their dtype. Plain round-to-nearest quantisers store
    the same weights. The outputs of better quantisers (GPTQ, AWQ) are nearer to those of the original
    weights.

    Args:
        model: The causal LM, without an adapter. All its layers with matrices are embeddings or linear, among
            them GPT-2's ``Conv1D``.
        bits: The number of bits of an integer, >= 2.
        group_size: The number of inputs of an output channel that share a scale s; None (default) gives each
            output channel one scale.

    Raises:
        ValueError: There are fewer than 2 bits; the model has an adapter, which must be merged first; or a
            matrix belongs to no linear layer, such as stacked experts.
    """
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    if isinstance(model, PeftModel):
        raise ValueError("the adapter would be rounded by itself; pass model.merge_and_unload()")
    head = model.get_output_embeddings()
    steps = 2 ** (bits - 1) - 1
    known: set[torch.Tensor] = {
        module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    if head is not None:
        known.add(head.weight)
    linear = {
        module.weight: module.weight.T if isinstance(module, Conv1D) else module.weight  # (outputs, inputs)
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    known |= linear.keys()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and weight not in known:
            raise ValueError(f"{name} is not the weight of a linear layer: how it is stored is not known")
    for matrix in linear.values():
        for group in matrix.split(group_size or matrix.shape[1], dim=1):
            scale = group.abs().amax(1, keepdim=True).float() / steps
            scale = scale.where(scale > 0, 1.0)
            group.copy_((group / scale).round() * scale)


def relearning_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    taught: DataSet,
    measured: Mapping[str, DataSet],
    *,
    steps: int = 20,
    every: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> list[dict[str, float]]:
    """Fine-tune a model on some rows and measure which other rows come back.

    All weights train, by the LM loss, with AdamW at a constant learning rate. The model is consumed: its
    weights stay as training leaves them.

    Args:
        model: The causal LM, without an adapter (``merge_and_unload()``), in float32.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        taught: The rows to fine-tune on, such as one half of the forget set.
        measured: The sets to measure, ``{name: rows}``, such as the other half and the retain set.
        steps: The number of optimizer steps, 20 by default.
        every: The number of steps between measurements, 1 by default.
        learning_rate: The learning rate, 1e-4 by default.
        batch_size: The number of rows in a step, 8 by default.
        seed: The seed of the rows' order, 0 by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        A dict for each measurement, the first before any step and the last after all steps: ``step``,
        ``epoch`` and the mean answer probability of each measured set, ``<name>_probability``, in [0, 1].

    Raises:
        ValueError: The model has an adapter, or ``steps``, ``every`` or ``batch_size`` is less than 1.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    check_counts(steps=steps, every=every, batch_size=batch_size)
    if isinstance(model, PeftModel):
        raise ValueError("only the adapter would train; pass model.merge_and_unload()")
    limits = token_limits(model)
    rows = tokenize_dataset(taught, tokenizer, name="taught", limits=limits, template=template)
    sets = {
        name: tokenize_dataset(data, tokenizer, name=name, limits=limits, template=template)
        for name, data in measured.items()
    }
    model.requires_grad_(True)
    gauge = _Curve(sets, every)
    with tempfile.TemporaryDirectory() as directory:
        options = TrainingArguments(
            output_dir=directory,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=model_device(model).type == "cpu",
        )
        options._n_gpu = min(1, options.n_gpu)  # or Trainer would put a replica on each GPU
        trainer = Trainer(
            model=model,
            args=options,
            train_dataset=rows,
            data_collator=partial(collate, pad_token_id=padding_id(tokenizer, model)),
            callbacks=[gauge],
        )
        trainer.remove_callback(PrinterCallback)  # it prints a summary, which is no part of the curve
        trainer.train()
    return gauge.history

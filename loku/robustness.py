"""What may bring an unlearned text back: quantisation and fine-tuning on a part of it.

Unlearning that either undoes has hidden the text and not removed it (Zhang et al., ICLR 2025, on
quantisation; Lynch et al., 2024, on relearning).
"""

import tempfile
from functools import partial

import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from loku.callbacks import ProbabilityGauge
from loku.data import collate, padding_id, tokenize_dataset


@torch.no_grad()
def round_weights_(model, bits, group_size=None):
    """Round the weights of all layers but the embeddings to ``bits``-bit integers, in place.

    Symmetric, to nearest: with s = max |w| / (2^(bits - 1) - 1) of an output channel, or of each
    ``group_size`` inputs of it, w becomes round(w / s) s. The weights keep their dtype. It is what plain
    round-to-nearest quantisers store; better ones (GPTQ, AWQ) are nearer to the original weights' outputs.

    Raises ``ValueError`` for fewer than 2 bits, for a model with an adapter: merge it first, and for weights
    that are not those of linear layers (GPT-2's ``Conv1D`` is one), such as stacked experts.
    """
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    if isinstance(model, PeftModel):
        raise ValueError("the adapter would be rounded by itself; pass model.merge_and_unload()")
    head = model.get_output_embeddings()
    steps = 2 ** (bits - 1) - 1
    known = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
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
    for weight in linear.values():
        for group in weight.split(group_size or weight.shape[1], dim=1):
            scale = group.abs().amax(1, keepdim=True).float() / steps
            scale = scale.where(scale > 0, 1.0)
            group.copy_((group / scale).round() * scale)


def relearning_curve(
    model, tokenizer, taught, measured, *, steps=20, every=1, learning_rate=1e-4, batch_size=8, seed=0
):
    """Fine-tune a model on some rows and see which others come back.

    All weights train, by the LM loss, with AdamW at a constant learning rate. The model is consumed: it is
    left as training leaves it.

    Args:
        model: a causal LM without an adapter (``merge_and_unload()``), in float32.
        taught: rows to fine-tune on, such as one half of the forget set.
        measured: ``{name: rows}``, such as the other half and the retain set.
        every: steps between measurements.

    Returns a list of dicts, one a measurement and the first before any step: ``step``, ``epoch`` and the mean
    answer probability of each measured set, ``<name>_probability``.
    """
    from transformers import Trainer, TrainingArguments

    if isinstance(model, PeftModel):
        raise ValueError("only the adapter would train; pass model.merge_and_unload()")
    model.requires_grad_(True)
    gauge = ProbabilityGauge(measured, every)
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
        )
        Trainer(
            model=model,
            args=options,
            train_dataset=tokenize_dataset(taught, tokenizer, name="taught"),
            data_collator=partial(collate, pad_token_id=padding_id(tokenizer)),
            processing_class=tokenizer,
            callbacks=[gauge],
        ).train()
    return gauge.history

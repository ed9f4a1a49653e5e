"""Loading a causal LM, looking inside its wrappers, and the modes it can be put into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from loku.config import UnlearnConfig


def load_model(model: PreTrainedModel | str | os.PathLike, config: UnlearnConfig) -> PreTrainedModel:
    """The model itself, or the causal LM of that path or hub name, read from safetensors."""
    if isinstance(model, (str, os.PathLike)):
        arguments = {"use_safetensors": True, **(config.model_init_kwargs or {})}  # never a pickle unasked
        return AutoModelForCausalLM.from_pretrained(model, **arguments)
    if config.model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is given by its path or name")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal LM inside the wrappers of DDP and peft."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, where its batches go."""
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had.

    It is not inference mode: caches that grow inside, such as rotary tables, must stay usable in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def keep_differentiable_(model: nn.Module) -> None:
    """Keep 4-bit weights of bitsandbytes in the layout that they are trained with.

    On CPUs with AVX512-BF16, bitsandbytes repacks such weights for inference at the first forward in
    evaluation mode. Its product with those has no gradient, so the adapters below would silently not train.
    Nothing happens to other models.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # has the side effect of undoing it
            module.support_avx512bf16_for_cpu = False

"""Causal LMs: how they are given, their wrappers, their device and their modes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from loku.adapter_folders import load_causal_lm
from loku.adapters import unwrapped as unwrapped  # it has moved
from loku.interrupts import uninterrupted_context

if TYPE_CHECKING:
    from peft import PeftModel


CausalLM: TypeAlias = "PreTrainedModel | PeftModel"


def load_model(
    model: CausalLM | str | os.PathLike, model_init_kwargs: Mapping[str, Any] | None = None
) -> CausalLM:
    """Return a model, loaded from safetensors if it is given by its path or hub name.

    No code of its repository runs, unless ``model_init_kwargs`` has ``trust_remote_code=True``. An adapter
    that is given by its path or hub name is merged into its base, which the log says. The folder of a
    residual save counts as its adapter on its base.

    Args:
        model: The model itself, which is returned as it is; or the path or hub name of a causal LM or of an
            adapter of one.
        model_init_kwargs: Arguments of ``from_pretrained``, none by default.

    Raises:
        ValueError: There are ``model_init_kwargs`` for a model that is loaded already. Or the path is that of
            an adapter that cannot be merged into its base (``loku.adapter_folders.load_merged``). Or the
            repository needs code of its own, or has no safetensors (``loku.trust``).
    """
    if isinstance(model, (str, os.PathLike)):
        return load_causal_lm(model, model_init_kwargs or {})
    if model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is given by its path or name")
    return model


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; its batches go there."""
    return next(model.parameters()).device


@uninterrupted_context
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and then every module back into its own mode.

    It is not inference mode: caches that grow inside, such as rotary tables, must stay usable in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def keep_differentiable_(model: nn.Module) -> None:
    """Keep 4-bit weights of bitsandbytes in the layout that they are trained with.

    On CPUs with AVX512-BF16, bitsandbytes repacks such weights for inference at the first forward in
    evaluation mode. Its product with repacked weights has no gradient, so the adapters in earlier layers
    would silently not train. Other models are left alone.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # its side effect undoes the repacking
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # nn.Module types no such field

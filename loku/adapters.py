"""The LoRA layers and factors of a peft model, and its reference: the original model.

FILA keeps the initial factors as a second, frozen adapter. The base then holds the residual, and the residual
with the initial factors computes as the original model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

REFERENCE_ADAPTER = "reference"  # the frozen initial factors


def adapter_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers that have an adapter, by their module names in the base model."""
    return {
        name: layer
        for name, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }


def linear_weight(module: Any) -> Tensor:
    """The weight W (d, k) of a linear module, y = x W^T + b, as a view of the stored weight.

    transformers' Conv1D (GPT-2) stores the transpose (k, d). Writing into the view writes the stored weight.

    Args:
        module: A ``torch.nn.Linear``, a quantised relative of it, or a Conv1D.
    """
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def base_weight(layer: Any) -> Tensor:
    """The weight W (d, k) of the base layer in a LoRA layer, as ``linear_weight`` gives it."""
    return linear_weight(layer.get_base_layer())


def adapter_factors(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The factors B (d, rank) and A (rank, k) of an adapter in a LoRA layer."""
    return layer.lora_B[adapter_name].weight, layer.lora_A[adapter_name].weight


def reference_layers(peft_model: PeftModel) -> dict[str, LoraLinear]:
    layers = adapter_layers(peft_model, REFERENCE_ADAPTER)
    return {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}


def reference_factors(peft_model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The initial factors B (d, rank), A (rank, k) by module name in the base model; empty without FILA."""
    factors = {}
    for name, layer in reference_layers(peft_model).items():
        B, A = adapter_factors(layer, REFERENCE_ADAPTER)
        factors[name] = B.detach(), A.detach()
    return factors


@contextmanager
def active_adapters(peft_model: PeftModel, names: list[str]) -> Iterator[None]:
    """A context in which these adapters are active; [] is the base model alone.

    peft's own switches also rewrite ``requires_grad``.
    """
    modules: list[Any] = [
        m for m in peft_model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    if any(getattr(module, "merged", False) for module in modules):
        raise ValueError("an adapter is merged into the base weights; call unmerge_adapter() first")
    saved = [(module, module._active_adapter, module._disable_adapters) for module in modules]
    try:
        for module in modules:
            module._active_adapter, module._disable_adapters = list(names), not names
        yield
    finally:
        for module, active, disabled in saved:
            module._active_adapter, module._disable_adapters = active, disabled


@contextmanager
def reference_model(peft_model: PeftModel) -> Iterator[PeftModel]:
    """A context in which ``peft_model`` computes as the original model: the reference of NPO, DPO and KL.

    It selects the frozen initial factors on the residual base after FILA. It selects no adapter after default
    LoRA initialisation. Gradients are off inside. The ``requires_grad`` of every parameter and the active
    adapters are afterwards as before.

    Args:
        peft_model: The model with its adapters.

    Yields:
        ``peft_model``.

    Raises:
        ValueError: An adapter is merged.
    """
    names = [REFERENCE_ADAPTER] if REFERENCE_ADAPTER in peft_model.peft_config else []
    with active_adapters(peft_model, names), torch.no_grad():
        yield peft_model

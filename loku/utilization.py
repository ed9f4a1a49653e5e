"""Model FLOP utilisation: the share of a card's peak that a training step's model FLOPs reach.

A weight of a linear takes 2 floating-point operations a token in the forward, and 2 in the backward for the
gradient of the input. A trained weight takes 2 more for its own gradient. So a step has

    FLOPs = tokens * (4 N_frozen + 6 N_trained) + labels * (4 H_frozen + 6 H_trained)

N is the number of weights of the linears that every token passes, the active adapters among them. H is that
of the output embedding, which only the tokens before a label pass. Attention's products, embeddings, norms
and padding are left out. So are the original model's forwards and recomputed activations. The utilisation is

    FLOPs / (seconds * peak of a card * number of cards)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from loku.models import unwrapped

# The peak of dense products of bfloat16 or float16 with float32 sums, in operations a second, from the data
# sheets. The keys are the names that CUDA gives. The name of a part of a card (MIG) is another.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L40S": 362e12,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ModelFlops(NamedTuple):
    """The floating-point operations of a training step, forward and backward.

    Args:
        token: The operations for a token.
        label: The further operations for a token before a label.
    """

    token: int
    label: int


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a device's peak of dense products, in operations a second, or None if it is not known.

    Args:
        device: The device.
        dtype: The dtype of the products. Only the peaks of bfloat16 and float16 are known.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def device_count(model: nn.Module, device: torch.device) -> int:
    """Count the devices of a process that share the work on a model. A device map spreads its layers.

    Args:
        model: The model.
        device: The device of the batches. The CPU beside a GPU does not count.
    """
    return max(1, len({p.device for p in model.parameters() if p.device.type == device.type}))


def _size(module: nn.Module) -> int:
    """The number of weights of a linear, also of a quantised one; 0 for other modules."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0] * sizes[1]
    weight: Any = getattr(module, "weight", None)
    return weight.numel() if type(module).__name__ == "Conv1D" else 0


def _active_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """The one module of a wrapper that its forward runs: the copy of the active adapter, or the original."""
    names: Any = () if wrapper.disable_adapters else wrapper.active_adapters
    module: nn.Module = wrapper.modules_to_save[names[0]] if names else wrapper.original_module
    return module


def _linear_flops(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return _size(module) * (6 if getattr(weight, "requires_grad", False) else 4)


def model_flops(model: nn.Module) -> ModelFlops | None:
    """Count the operations of a model's training step, by the formula of this module.

    Args:
        model: The causal LM, with the wrappers of peft and DDP or without.

    Returns:
        The operations, or None for a mixture of experts, whose tokens do not pass all weights.
    """
    base: Any = unwrapped(model)
    config = getattr(base, "config", None)
    config = config if config is None else config.get_text_config()
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return None
    left_out: set[Any] = set()
    for layer in base.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            left_out |= {layer, *layer.modules()} - set(_active_module(layer).modules())
        elif isinstance(layer, BaseTunerLayer):
            left_out.add(layer)  # it has the sizes of its base layer
        if isinstance(layer, LoraLayer):
            for factors in (layer.lora_A, layer.lora_B):
                left_out |= {factor for name, factor in factors.items() if name not in layer.active_adapters}
    head = set(base.get_output_embeddings().modules())
    token = sum(_linear_flops(module) for module in base.modules() if module not in left_out | head)
    return ModelFlops(token, sum(_linear_flops(module) for module in head - left_out))

"""The modules that FILA initialises, and those that it refuses."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loku.adapters import REFERENCE_ADAPTER, adapter_layers, linear_weight
from loku.distributed import is_sharded

# FILA refuses the modules and options below by name, before it changes a weight.

_REFUSED_OPTIONS = {
    "lora_dropout": "dropout acts on B A but not on the residual, so the outputs would change; set it to 0",
    "use_dora": "DoRA rescales the residual by its row norms, so the outputs would change; set it to False",
    "lora_bias": "the reference model and the portable adapter have no such bias; set it to False",
    "modules_to_save": "fully trained modules have no frozen reference; train them apart, without FILA",
    "trainable_token_indices": "trained embeddings have no frozen reference; train them apart, without FILA",
    "layer_replication": "replicated layers share one weight, which can have one residual; leave it unset",
}


def _check_config(config: Any) -> None:
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"FILA initialises LoRA adapters, got {config.peft_type}; use a LoraConfig")
    for option, reason in _REFUSED_OPTIONS.items():
        value = getattr(config, option, None)
        if value:
            raise ValueError(f"{option}={value!r} cannot be used with FILA: {reason}")
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} cannot be used with FILA: trained biases of the base model have no frozen "
            'reference; use bias="none"'
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} cannot be used with FILA: it may already have "
            "changed the base weights; use init_lora_weights=True"
        )


def _storage(parameter: Tensor) -> Hashable:
    """A key that parameters have in common if they share their memory."""
    return id(parameter) if is_sharded(parameter) else (parameter.device, parameter.data_ptr())


@torch.no_grad()
def _computes_as_linear(base: Any) -> bool:
    """Whether a subclass of nn.Linear or Conv1D computes x W^T + b. It is tried if its forward is its own.

    FSDP2 replaces the type of a module by a class of its own, which has the forward of the old one.
    """
    if type(base).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if is_sharded(base.weight):
        return False
    weight = linear_weight(base)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1], generator=generator, dtype=torch.float32)
    x = x.to(weight.device, weight.dtype)
    try:
        actual = type(base).forward(base, x)
    except Exception:
        return False
    expected = nn.functional.linear(x, weight, base.bias)
    close = 1e-2 if weight.dtype.itemsize == 2 else 1e-5
    return isinstance(actual, Tensor) and torch.allclose(actual, expected, rtol=close, atol=close)


def _check_layer(name: str, layer: LoraLayer, adapter_name: str, owners: dict[Hashable, list[str]]) -> None:
    base: Any = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    kind = type(base).__name__
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name}: DeepSpeed ZeRO-3 has partitioned its weight; load the model before the UnlearnConfig "
            "is made, so that it is whole until training starts"
        )
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            f"{name}: its weight is on the meta device (offloaded or not loaded); load the model without "
            "offloading"
        )
    plain = isinstance(base, (nn.Linear, Conv1D)) and (type(weight) is nn.Parameter or is_sharded(weight))
    if not plain or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        dtype = f" with a {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"{name}: FILA needs a plain nn.Linear or Conv1D with a floating-point weight, got {kind}{dtype}"
            "; where the base is quantised, initialise on the unquantised base and then quantise the "
            'residual, or use default LoRA initialisation (init="default")'
        )
    if not _computes_as_linear(base):
        raise ValueError(
            f"{name}: a {kind} computes something else than x W^T + b, so the outputs would change; leave it "
            'out of target_modules, or use default LoRA initialisation (init="default")'
        )
    if not isinstance(layer, LoraLinear) or adapter_name in layer.lora_variant:
        raise ValueError(
            f"{name}: FILA needs peft's plain LoRA linear layer, got {type(layer).__name__} with variant "
            f"{type(layer.lora_variant.get(adapter_name)).__name__}; use a LoraConfig without variants"
        )
    shared = [other for other in owners[_storage(weight)] if other != name]
    if shared:
        raise ValueError(
            f"{name}: its weight is also that of {', '.join(shared)}, which would silently become the "
            "residual; leave it out of target_modules or untie the weights"
        )
    if layer.merged:
        raise ValueError(f"{name}: an adapter is merged into its weight; call unmerge_adapter() first")
    if not layer.scaling[adapter_name] > 0:
        raise ValueError(
            f"{name}: scaling is {layer.scaling[adapter_name]}, but must be > 0; set lora_alpha > 0"
        )


def fila_targets(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLinear]:
    """The LoRA layers of an adapter, which FILA can initialise.

    They are the linear modules. The other layers of the adapter, those of bare parameters
    (``target_parameters``, such as the experts of a mixture), keep peft's default initialisation: B is 0
    there, so the outputs do not change. The check changes nothing. It may run before the Fishers are
    measured, to refuse early.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter, "default" by default.

    Returns:
        The layers by their module names in the base model.

    Raises:
        ValueError: FILA cannot initialise the adapter. The message names the module or option, the reason and
            a way round. FILA refuses ``lora_dropout`` > 0, DoRA and other LoRA variants, ``lora_bias``, and
            trained biases or modules. It refuses initialisations that change the base, such as PiSSA. It
            refuses further adapters, merged adapters, and quantised or offloaded weights. It refuses weights
            that are shared with another module, and an adapter without a linear module.
    """
    if not isinstance(peft_model, PeftModel):
        raise ValueError(f"FILA needs a PeftModel, got {type(peft_model).__name__}; use peft.get_peft_model")
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"no adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}")
    if REFERENCE_ADAPTER in peft_model.peft_config:
        raise ValueError(
            f"the adapter {REFERENCE_ADAPTER!r} exists: FILA has already initialised this model; call "
            "restore_base_ and start again from the base model"
        )
    others = sorted(set(peft_model.peft_config) - {adapter_name})
    if others:
        raise ValueError(
            f"the model has other adapters {others}, which would no longer fit the residual base; delete "
            "them first"
        )
    _check_config(peft_model.peft_config[adapter_name])

    owners: dict[Hashable, list[str]] = {}
    for name, parameter in peft_model.get_base_model().named_parameters(remove_duplicate=False):
        module = name.removesuffix(".weight").removesuffix(".base_layer")
        owners.setdefault(_storage(parameter), []).append(module)
    layers = {
        name: layer
        for name, layer in adapter_layers(peft_model, adapter_name).items()
        if not isinstance(layer, ParamWrapper)
    }
    if not layers:
        raise ValueError(
            "FILA initialises linear modules, and the adapter has none; add some to target_modules, or use "
            'default LoRA initialisation (init="default")'
        )
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name, owners)
    return layers

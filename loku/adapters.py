"""The LoRA layers and factors of a peft model, and its reference: the original model.

FILA keeps the initial factors as a second, frozen adapter. The base then holds the residual, and the residual
with the initial factors computes as the original model. An adapter that was trained before it is given to
``UnlearnTrainer`` is itself a part of the original model. A frozen copy of it is the reference while a method
that compares with the original model trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loku.distributed import full_tensor
from loku.interrupts import uninterrupted_context

REFERENCE_ADAPTER = "reference"  # the frozen initial factors
# The attribute of a causal LM that keeps the adapter which was merged into it (loku.adapter_folders,
# loku.saving.residual_base).
MERGED_ADAPTER = "_loku_merged_adapter"
# The attribute of a peft model that keeps the weights which FILA overwrote, in CPU memory.
BASE_COPY = "_loku_base_weights"
SNAPSHOT_ADAPTER = "loku_snapshot"  # a frozen copy of a trained adapter, for the time of training


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError if a model carries an adapter, whatever put it there.

    A further adapter would reset or overwrite the present one, or the present one would be taken for a part
    of the original weights.

    Args:
        model: The model that is to get an adapter or to be trained itself.

    Raises:
        ValueError: The model is a peft model, or one of its modules is an adapter layer. The message says how
            to merge the adapter.
    """
    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            "model is a PeftModel already; merge its adapter first: model.merge_and_unload() returns a plain "
            "model. Save that too, unless the PeftModel is a result of loku: a portable adapter that "
            "is trained on it fits no other"
        )
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    name = next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)
    if name is None:
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{name} of the model has an adapter, which transformers put there: pass the adapter's folder as "
            "the model, and it is merged; or load it by PeftModel.from_pretrained(base, folder) and pass "
            "what its merge_and_unload() returns"
        )
    raise ValueError(
        f"{name} of the model has an adapter of an earlier PeftModel, such as the result of an earlier "
        "unlearn: pass what the merge_and_unload() of that PeftModel returns, or load the model anew"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the causal LM inside the wrappers of DDP and peft."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    base: Any = getattr(model, "get_base_model", None)
    return model if base is None else base()


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


def changes_base(config: PeftConfig | None) -> bool:
    """Whether peft changes the base weights when it puts in an adapter of this config, as for PiSSA."""
    initialisation = str(getattr(config, "init_lora_weights", None)).lower()
    return initialisation.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def has_residual_base(peft_model: PeftModel) -> bool:
    """Whether the base weights are those of the untouched base less the initial factors, as after FILA.

    The portable adapter is then the difference from the adapter "reference". peft's own initialisations that
    change the base (PiSSA, OLoRA) are not meant: peft repeats them when it loads such an adapter.
    """
    return REFERENCE_ADAPTER in peft_model.peft_config


def stands_for_another_base(peft_model: PeftModel) -> bool:
    """Whether an adapter of this model, saved as it is, would load wrongly on the base that it names.

    That is so on a residual base, and on a base into which an adapter was merged.
    """
    return has_residual_base(peft_model) or hasattr(peft_model.get_base_model(), MERGED_ADAPTER)


def _products_not_zero(layers: Mapping[str, Any], adapter_name: str) -> list[str]:
    """The names of the layers in which an adapter adds something: neither B nor A is all zeros."""
    names, flags = [], []
    for name, layer in layers.items():
        if adapter_name in layer.lora_A:
            B, A = adapter_factors(layer, adapter_name)
        elif adapter_name in layer.lora_embedding_A:
            B, A = layer.lora_embedding_B[adapter_name], layer.lora_embedding_A[adapter_name]
        else:
            continue
        names.append(name)
        flags.append(full_tensor(B.detach()).any() & full_tensor(A.detach()).any())
    if not names:
        return []
    device = flags[0].device
    nonzero = torch.stack([flag.to(device) for flag in flags]).tolist()  # one transfer
    return [name for name, flag in zip(names, nonzero, strict=True) if flag]


def refuse_trained_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise ValueError if a LoRA adapter already changes the outputs, which an initialisation would undo.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter.

    Raises:
        ValueError: B A is not 0 in a layer: the adapter was trained or loaded, or peft's
            ``init_lora_weights`` made it so.
    """
    changing = _products_not_zero(adapter_layers(peft_model, adapter_name), adapter_name)
    if changing:
        raise ValueError(
            f"{changing[0]}: the adapter {adapter_name!r} already changes the outputs (its B A is not 0 in "
            f"{len(changing)} modules), and an initialisation would throw that away: merge it "
            "(model.merge_and_unload()) and give the merged model a fresh adapter by peft.get_peft_model, "
            "with init_lora_weights=True"
        )


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


@uninterrupted_context
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


def add_frozen_adapter(
    peft_model: PeftModel, name: str, like: str, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Add a frozen LoRA adapter with given factors, whole in each process. Active adapters stay.

    Args:
        peft_model: The model.
        name: The name of the new adapter.
        like: The name of the adapter whose config it gets.
        factors: B (d, rank) and A (rank, k) of each linear module that gets the adapter, by the module's
            name in the base model. They are copied.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    config: Any = copy.deepcopy(peft_model.peft_config[like])
    config.inference_mode = True
    config.init_lora_weights = True  # others may change the base weights
    config.target_parameters = None  # bare parameters start from B = 0, so they need no frozen factors
    try:
        # low_cpu_mem_usage puts the adapter on the meta device. Random weights would advance the caller's
        # generator for nothing.
        peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
        for module, layer in adapter_layers(peft_model, name).items():
            for factor, value in zip((layer.lora_B, layer.lora_A), factors[module], strict=True):
                factor[name].weight = nn.Parameter(full_tensor(value.detach()).clone(), requires_grad=False)
    finally:
        for parameter, flag in flags:  # some versions of peft reset these for the earlier adapters
            parameter.requires_grad_(flag)


def remove_adapter(peft_model: PeftModel, name: str) -> None:
    """Remove an adapter that is not active; the ``requires_grad`` of the others stays."""
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    PeftModel.delete_adapter(peft_model, name)  # a residual base's own method refuses "reference"
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


class Reference(NamedTuple):
    """What makes a peft model compute as it did when it was given, from ``snapshot_reference``.

    Args:
        adapter: The name of the adapter that was copied, or None: the base alone, or the base with the
            adapter "reference", computes as the given model.
        factors: The copies of its factors B (d, rank) and A (rank, k), by module name in the base model.
    """

    adapter: str | None
    factors: dict[str, tuple[Tensor, Tensor]]


# What an adapter may train beside the factors of its layers. A second adapter does not copy it.
_BESIDE_FACTORS = ("trainable_token_indices", "lora_bias", "layer_replication")


def _fully_trained_modules_are_fresh(peft_model: PeftModel, adapter_name: str) -> bool:
    """Whether each copy that ``modules_to_save`` trains still equals the original module."""
    for module in peft_model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = getattr(module, "modules_to_save", {})
            if adapter_name not in copies:
                return False
            theirs = module.original_module.state_dict()
            ours = copies[adapter_name].state_dict()
            if not all(torch.equal(full_tensor(ours[n]), full_tensor(theirs[n])) for n in theirs):
                return False
    return True


def snapshot_reference(model: nn.Module) -> Reference | None:
    """Copy what a peft model needs to compute as it does now, while its active adapter trains.

    A fresh adapter adds nothing, so the base alone is the given model, and nothing is copied. The same holds
    for an adapter whose factors are FILA's initial ones. Of a trained LoRA adapter the factors are copied.
    All processes of torch.distributed must call this.

    Args:
        model: The model. A resumed run must call this before it loads the trained factors.

    Returns:
        The reference; ``reference_adapter`` makes use of it. It is None if no second adapter would do: for
        a model that is no peft model, several or no active adapters, other tuners than LoRA, DoRA and other
        variants, trained biases, and fully trained modules or tokens that differ from the base's.
    """
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        return None
    name = model.active_adapters[0]
    config: Any = model.peft_config[name]
    if config.peft_type != PeftType.LORA or config.bias != "none":
        return None
    layers = adapter_layers(model, name)
    if any(getattr(config, option, None) for option in _BESIDE_FACTORS):
        return None
    if any(name in layer.lora_variant for layer in layers.values()):
        return None
    if not _fully_trained_modules_are_fresh(model, name):
        return None
    initial = reference_factors(model)
    others = {module: layer for module, layer in layers.items() if module not in initial}
    fresh = not _products_not_zero(others, name) and all(
        torch.equal(full_tensor(ours.detach()), full_tensor(theirs))
        for module, factors in initial.items()
        for ours, theirs in zip(adapter_factors(layers[module], name), factors, strict=True)
    )
    if fresh:
        return Reference(None, {})
    if config.modules_to_save or getattr(config, "target_parameters", None):
        return None
    if not all(name in layer.lora_A for layer in layers.values()):  # embeddings
        return None
    factors = {
        module: tuple(full_tensor(factor.detach()).clone() for factor in adapter_factors(layer, name))
        for module, layer in layers.items()
    }
    return Reference(name, factors)  # type: ignore[arg-type]  # pairs


@uninterrupted_context
def reference_adapter(peft_model: PeftModel, reference: Reference) -> Iterator[None]:
    """A context in which ``reference_model`` computes as the given model did at ``snapshot_reference``.

    Outside the context ``reference_model`` is the model that ``loku.unlearn`` was given.

    Args:
        peft_model: The model.
        reference: The result of ``snapshot_reference``.
    """
    if reference.adapter is None:
        yield
        return
    add_frozen_adapter(peft_model, SNAPSHOT_ADAPTER, reference.adapter, reference.factors)
    try:
        yield
    finally:
        remove_adapter(peft_model, SNAPSHOT_ADAPTER)


@uninterrupted_context
def reference_model(peft_model: PeftModel) -> Iterator[PeftModel]:
    """A context in which ``peft_model`` computes as the original model: the reference of NPO, DPO and KL.

    It selects the frozen initial factors on the residual base after FILA. It selects no adapter after default
    LoRA initialisation. While ``UnlearnTrainer`` trains an adapter that was trained before, it selects the
    frozen copy of that adapter. Gradients are off inside. The ``requires_grad`` of every parameter and the
    active adapters are afterwards as before.

    Args:
        peft_model: The model with its adapters.

    Yields:
        ``peft_model``.

    Raises:
        ValueError: An adapter is merged.
    """
    frozen = [name for name in (SNAPSHOT_ADAPTER, REFERENCE_ADAPTER) if name in peft_model.peft_config]
    names = frozen[:1]
    with active_adapters(peft_model, names), torch.no_grad():
        yield peft_model

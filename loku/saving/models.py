"""Saves that hold a whole model: the residual base with its adapters, and the merged model.

``loku.save_portable_adapter`` is the default, and much smaller. The merged model is for tools that take no
adapter. The residual model keeps the plain adapter of rank r: quantise the residual base and train on it. All
processes of torch.distributed must call these functions. The main process writes.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.adapters import MERGED_ADAPTER, REFERENCE_ADAPTER, adapter_layers
from loku.data.rows import infer_tokenizer
from loku.distributed import full_tensor, is_main_process, is_sharded, reshard_, wait_for_all_processes
from loku.saving.adapter import base_name, check_saved_adapter, loaded_from, plain_adapter
from loku.saving.adapter_files import write_adapter
from loku.saving.destinations import destination

_log = logging.getLogger(__name__)


def _adapted_parameter(layer: Any) -> tuple[str, Tensor]:
    """The name and the parameter of the base layer that an adapter changes, as stored."""
    name = getattr(layer, "parameter_name", "weight")  # experts keep theirs under other names
    return name, getattr(layer.get_base_layer(), name)


def check_residual(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Check that a base can be written as a plain model, with its adapter beside it.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: There is no such LoRA adapter, the base is quantised, an adapter is merged into it, the
            adapter is DoRA or another variant, or it trains what cannot be merged.
    """
    check_saved_adapter(peft_model, adapter_name)
    base: Any = peft_model.get_base_model()
    for name, layer in adapter_layers(peft_model, adapter_name).items():
        if not hasattr(layer, "get_delta_weight") or not hasattr(
            layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        ):
            raise ValueError(
                f"{name}: the adapter of a {type(layer.get_base_layer()).__name__} cannot be merged; save "
                "the portable adapter"
            )
        _, weight = _adapted_parameter(layer)
        if not weight.is_floating_point() or not (type(weight) is nn.Parameter or is_sharded(weight)):
            raise ValueError(
                f"{name}: its weight is a quantised {type(weight).__name__}, which cannot be merged into "
                "or written as a plain model; save the portable adapter and load it on the unquantised base"
            )
        if layer.merged:
            raise ValueError(f"{name}: an adapter is merged into its weight; call unmerge_adapter() first")
        if adapter_name in layer.lora_variant or layer.lora_bias.get(adapter_name):
            variant = layer.lora_variant.get(adapter_name)
            what = "LoRA with a bias (lora_bias)" if variant is None else f"a {type(variant).__name__}"
            raise ValueError(f"{name}: its adapter is {what}; merge it by peft's merge_and_unload()")
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(f"{name}: {type(module).__name__} is merged by peft's merge_and_unload() alone")


def check_merged(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Check that a peft model can be written as a merged model.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: The errors of ``check_residual``. Or an adapter changes one of two modules with one
            weight, which are not the two embeddings.
    """
    check_residual(peft_model, adapter_name)
    _takes_ties_apart(peft_model.get_base_model(), _tensors(peft_model, adapter_name))


class _Stored(NamedTuple):
    """A tensor of the base model, the one to store in its place, and the layer that changes it, or None."""

    own: Tensor
    tensor: Tensor
    layer: Any


def _tensors(peft_model: PeftModel, merged: str | None) -> dict[str, _Stored]:
    """The tensors of the base model by their names in a model without adapters.

    Args:
        peft_model: The model.
        merged: The adapter to merge into the weights, or None.
    """
    base = peft_model.get_base_model()
    beside, changed, trained = [], {}, {}
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            beside += [f"{name}.{part}." for part in (*module.adapter_layer_names, *module.other_param_names)]
            if merged is not None and merged in getattr(module, "scaling", {}):
                parameter, tensor = _adapted_parameter(module)
                changed[_plain_name(f"{name}.{parameter}"), id(tensor)] = module
        elif isinstance(module, ModulesToSaveWrapper):
            beside.append(f"{name}.modules_to_save.")
            if merged is not None and merged in module.modules_to_save:
                copied = module.modules_to_save[merged].state_dict(keep_vars=True)
                trained.update({f"{name}.{key}": value for key, value in copied.items()})
    stored = {}
    for name, own in base.state_dict(keep_vars=True).items():
        if not name.startswith(tuple(beside)):
            name = _plain_name(name)
            stored[name] = _Stored(own, trained.get(name, own), changed.get((name, id(own))))
    return stored


def _plain_name(name: str) -> str:
    """The name of a tensor in a model without adapters; wrappers of several parameters are nested."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


def _takes_ties_apart(base: Any, tensors: dict[str, _Stored]) -> bool:
    """Whether a merge takes tied embeddings apart. ValueError if it takes another shared weight apart."""
    sharing: dict[int, list[str]] = {}
    for name, stored in tensors.items():
        sharing.setdefault(id(stored.own), []).append(name)
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    apart = False
    for names in sharing.values():
        if len({(id(tensors[name].tensor), id(tensors[name].layer)) for name in names}) == 1:
            continue
        apart = True
        for name in names:
            if all(base.get_submodule(name.rpartition(".")[0]) is not module for module in embeddings):
                raise ValueError(
                    f"{name} is shared with {', '.join(names)}, which an adapter changes apart from it; a "
                    "merged model cannot hold that: save the portable adapter"
                )
    return apart


def _base_state(tensors: dict[str, _Stored], merged: str | None) -> dict[str, Tensor]:
    """The whole tensors by name, with the adapter merged; an empty dict in processes that do not write."""
    main = is_main_process()
    found: dict[Any, Tensor] = {}  # tied weights and the modules of several places have one tensor
    for _, tensor, layer in tensors.values():
        key, sharded = (id(tensor), id(layer)), is_sharded(tensor)
        if key in found or not (main or sharded):
            continue
        value = full_tensor(tensor.detach())
        if layer is not None:
            wide = torch.promote_types(value.dtype, torch.float32)
            delta = full_tensor(layer.get_delta_weight(merged)).to(wide)
            value = delta.add_(value).to(value.dtype)
        # All processes gather a shard together. Only one keeps the whole, in memory of the host.
        found[key] = (value.cpu() if sharded else value) if main else torch.empty(0, dtype=torch.float32)
    if not main:
        return {}
    return {name: found[id(tensor), id(layer)] for name, (_, tensor, layer) in tensors.items()}


def _tokenizer_beside(model: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model without adapters, with its chat template, where the model was loaded from.

    The log says if there is none.
    """
    if not (getattr(model, MERGED_ADAPTER, None) or {}).get("tokenizer") and not model.name_or_path:
        return None  # made in memory
    try:
        return infer_tokenizer(model)
    except ValueError as error:
        _log.warning("the merged model is saved without a tokenizer: %s", error)
        return None


def _save_model(
    model: Any, directory: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    model.save_pretrained(directory, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@torch.no_grad()
def save_merged_model(
    peft_model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save the model with an adapter merged into it: ``AutoModelForCausalLM.from_pretrained(path)``.

    Every target weight is W + scaling * B A, in float32 and rounded once to its dtype. peft rounds the
    product B A of experts, too. Where an adapter changes one of two tied embeddings, the saved model has two,
    and ``tie_word_embeddings`` is false. The dtype and the generation config are those of the base. The model
    is not changed. The target weights exist twice until they are written.

    Args:
        peft_model: The model with the adapter. Its weights may be sharded (FSDP2). The main process then
            holds the whole model in the memory of the host.
        path: The directory. A new one is written under another name and renamed. In a directory that exists
            the last save makes way, and the other files stay (``loku.saving.destinations``).
        adapter_name: The name of the adapter, "default" by default.
        tokenizer: The tokenizer to save beside the model. None (default) saves the one of the base, which
            lies where the base was loaded from; the log says if there is none. Its chat template is saved
            with it.

    Raises:
        ValueError: The model cannot be merged (see ``check_merged``), or ``path`` is refused
            (``loku.saving.destinations.check_destination``).
        OSError: ``path`` cannot be written.
    """
    check_merged(peft_model, adapter_name)
    reshard_(peft_model)
    base, tensors = peft_model.get_base_model(), _tensors(peft_model, adapter_name)
    state = _base_state(tensors, adapter_name)
    if is_main_process():
        with destination(path, "merged", sources=loaded_from(peft_model)) as directory:
            _save_model(base, directory, state, tokenizer or _tokenizer_beside(base))
            if _takes_ties_apart(base, tensors):
                _untie(directory / "config.json")
    wait_for_all_processes()


def _untie(file: Path) -> None:
    def untied(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {
            name: False if name == "tie_word_embeddings" else untied(value) for name, value in config.items()
        }

    config = {**json.loads(file.read_text(encoding="utf-8")), "tie_word_embeddings": False}
    file.write_text(json.dumps(untied(config), indent=2), encoding="utf-8")


@torch.no_grad()
def save_residual_model(
    peft_model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save the base model as it is and the adapter as it is: ``path/base`` and ``path/adapter``.

    After FILA the base is the residual. The adapter of rank r fits it, and does not fit the original base.
    ``path/reference`` then holds the initial factors. ``load_adapter`` loads them as the adapter "reference",
    which ``loku.reference_model`` and ``loku.save_portable_adapter`` need. The model is loaded by:

        base = AutoModelForCausalLM.from_pretrained(path + "/base")
        model = PeftModel.from_pretrained(base, path + "/adapter")

    Args:
        peft_model: The model with the adapter, as for ``save_merged_model``.
        path: The directory, as for ``save_merged_model``. ``AutoPeftModelForCausalLM`` finds the base by its
            absolute path, which is in the configs of the adapters.
        adapter_name: The name of the adapter, "default" by default.
        tokenizer: The tokenizer to save beside the base; None (default) saves none.

    Raises:
        ValueError: The errors of ``save_merged_model``.
        OSError: ``path`` cannot be written.
    """
    check_residual(peft_model, adapter_name)
    reshard_(peft_model)
    state = _base_state(_tensors(peft_model, None), None)
    names = {"adapter": adapter_name}
    if REFERENCE_ADAPTER in peft_model.peft_config:
        names["reference"] = REFERENCE_ADAPTER
    adapters = {folder: plain_adapter(peft_model, name) for folder, name in names.items()}
    for _, tensors in adapters.values():
        tensors.update({name: full_tensor(tensor) for name, tensor in tensors.items()})
    if is_main_process():
        untouched = base_name(peft_model, peft_model.peft_config[adapter_name])
        sources = loaded_from(peft_model)
        with destination(path, "residual", sources=sources, untouched=untouched) as directory:
            _save_model(peft_model.get_base_model(), directory / "base", state, tokenizer)
            for folder, (config, tensors) in adapters.items():
                (directory / folder).mkdir()
                config.init_lora_weights = True  # peft would repeat any other on the residual that is saved
                config.base_model_name_or_path = os.path.abspath(os.path.join(path, "base"))
                write_adapter(peft_model, config, tensors, directory / folder)
    wait_for_all_processes()


def save_whole_model(
    model: PreTrainedModel, path: str | os.PathLike, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save a model without an adapter by ``model.save_pretrained(path)``, whole or not at all.

    Args:
        model: The model, which may be sharded.
        path: The directory, as for ``save_merged_model``.
        tokenizer: The tokenizer to save beside the model, as for ``save_merged_model``.

    Raises:
        ValueError: ``path`` is refused (``loku.saving.destinations.check_destination``).
        OSError: ``path`` cannot be written.
    """
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    if is_main_process():
        with destination(path, "merged", sources=loaded_from(model)) as directory:
            _save_model(model, directory, state, tokenizer or _tokenizer_beside(model))
    wait_for_all_processes()

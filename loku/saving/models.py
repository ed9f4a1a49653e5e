"""Saves that hold a whole model: the residual base with its adapters, and the merged model.

``loku.save_portable_adapter`` is the default, and much smaller. The merged model is for tools that take no
adapter. The residual model keeps the plain adapter of rank r: quantise the residual base and train on it. All
processes of torch.distributed must call these functions. The main process writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.adapters import REFERENCE_ADAPTER, adapter_layers, base_weight
from loku.distributed import full_tensor, is_main_process, is_sharded, wait_for_all_processes
from loku.saving.adapter import check_saved_adapter, plain_adapter, write_adapter
from loku.saving.directories import whole_directory

# Entries of an earlier save, which would be loaded instead of the new one or with it.
_EARLIER = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",
    "adapter_model.*",
    "base",
    "adapter",
    "reference",
)


def _plain_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The layers that have an adapter. It raises ValueError unless they can be written as a plain model."""
    check_saved_adapter(peft_model, adapter_name)
    layers = adapter_layers(peft_model, adapter_name)
    for name, layer in layers.items():
        weight = base_weight(layer)
        if is_sharded(weight):
            raise ValueError(
                f"{name}: its weight is sharded (FSDP2); save the portable adapter, and merge it into the "
                "base model in one process"
            )
        if not weight.is_floating_point() or type(weight) is not torch.nn.Parameter:
            raise ValueError(
                f"{name}: its weight is a quantised {type(weight).__name__}, which cannot be merged into "
                "or written as a plain model; save the portable adapter and load it on the unquantised base"
            )
        if layer.merged:
            raise ValueError(f"{name}: an adapter is merged into its weight; call unmerge_adapter() first")
        if adapter_name in layer.lora_variant:
            raise ValueError(
                f"{name}: its adapter is a {type(layer.lora_variant[adapter_name]).__name__}; merge it by "
                "peft's merge_and_unload()"
            )
    return layers


def _base_state(peft_model: PeftModel, layers: dict[str, Any]) -> dict[str, Tensor]:
    """The base model's state dict, with the names of a model without LoRA layers."""
    wrapped = tuple(f"{name}." for name in layers)
    state = {}
    for name, tensor in peft_model.get_base_model().state_dict().items():
        if name.startswith(wrapped):
            if ".base_layer." not in name:
                continue
            name = name.replace(".base_layer.", ".")
        state[name] = tensor
    return state


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

    Every target weight is W + scaling * B A, in float32 and rounded once to its dtype. The model is not
    changed. The target weights exist twice until they are written.

    Args:
        peft_model: The model with the adapter.
        path: The directory. A new one is written under another name and renamed. In a directory that exists
            any model and adapter is replaced, and the other files stay.
        adapter_name: The name of the adapter, "default" by default.
        tokenizer: The tokenizer to save beside the model; None (default) saves none.

    Raises:
        ValueError: There is no such LoRA adapter, the base is quantised or sharded, an adapter is merged into
            it, or the adapter is DoRA or another variant. Or ``path`` is a file.
        OSError: ``path`` cannot be written.
    """
    layers = _plain_layers(peft_model, adapter_name)
    if is_main_process():
        with whole_directory(path, key="config.json", replaced=_EARLIER) as directory:
            state = _base_state(peft_model, layers)
            for name, layer in layers.items():
                weight = base_weight(layer)
                wide = torch.promote_types(weight.dtype, torch.float32)
                delta = layer.get_delta_weight(adapter_name).to(wide)
                state[f"{name}.weight"] = delta.add_(weight).to(weight.dtype)
            _save_model(peft_model.get_base_model(), directory, state, tokenizer)
    wait_for_all_processes()


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
        peft_model: The model with the adapter.
        path: The directory, as for ``save_merged_model``.
        adapter_name: The name of the adapter, "default" by default.
        tokenizer: The tokenizer to save beside the base; None (default) saves none.

    Raises:
        ValueError: The errors of ``save_merged_model``.
        OSError: ``path`` cannot be written.
    """
    layers = _plain_layers(peft_model, adapter_name)
    if is_main_process():
        with whole_directory(path, key="adapter", replaced=_EARLIER) as directory:
            _save_model(
                peft_model.get_base_model(), directory / "base", _base_state(peft_model, layers), tokenizer
            )
            names = {"adapter": adapter_name}
            if REFERENCE_ADAPTER in peft_model.peft_config:
                names["reference"] = REFERENCE_ADAPTER
            for folder, name in names.items():
                (directory / folder).mkdir()
                config, state = plain_adapter(peft_model, name)
                config.base_model_name_or_path = os.path.join(path, "base")
                write_adapter(peft_model, config, state, directory / folder)
    wait_for_all_processes()


def save_whole_model(
    model: PreTrainedModel, path: str | os.PathLike, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save a model without an adapter by ``model.save_pretrained(path)``, whole or not at all.

    Args:
        model: The model, which may be sharded.
        path: The directory, as for ``save_merged_model``.
        tokenizer: The tokenizer to save beside the model; None (default) saves none.

    Raises:
        ValueError: ``path`` is a file.
        OSError: ``path`` cannot be written.
    """
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    if is_main_process():
        with whole_directory(path, key="config.json", replaced=_EARLIER) as directory:
            _save_model(model, directory, state, tokenizer)
    wait_for_all_processes()

"""The default save: a plain LoRA adapter for the untouched base, whatever the initialisation was."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from loku.distributed import full_tensor, is_main_process, wait_for_all_processes
from loku.fila.targets import REFERENCE_ADAPTER
from loku.saving.directories import whole_directory


def _difference(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """scaling * (B A - B0 A0), exactly, as B2 (d, 2r) A2 (2r, k) in float32."""
    A, B = (full_tensor(f[adapter_name].weight).float() for f in (layer.lora_A, layer.lora_B))
    A0, B0 = (f[REFERENCE_ADAPTER].weight.float() for f in (layer.lora_A, layer.lora_B))
    # (B - B0) A + B0 (A - A0): what is small is subtracted before anything is multiplied or rounded.
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1) * layer.scaling[adapter_name]


def _difference_adapter(peft_model: PeftModel, adapter_name: str):
    """(config, state dict) of a rank-2r adapter of the difference from the reference, with scaling 1."""
    config = copy.deepcopy(peft_model.peft_config[adapter_name])
    config.r *= 2
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()}
    # alpha = rank in every module: the old scaling, that of rsLoRA too, is in B2.
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    state = {}
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
            A, B = _difference(layer, adapter_name)
            state[f"base_model.model.{name}.lora_A.weight"] = A
            state[f"base_model.model.{name}.lora_B.weight"] = B
    return config, state


def _auto_mapping(peft_model: PeftModel, config) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def check_saved_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """ValueError unless it is a LoRA adapter, and not that of the original model on the residual base."""
    config = peft_model.peft_config.get(adapter_name)
    if config is None or config.peft_type != PeftType.LORA:
        raise ValueError(f"no LoRA adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}")
    if adapter_name == REFERENCE_ADAPTER:
        raise ValueError(
            f"{adapter_name!r} is the original model's adapter on the residual base; save another"
        )


def plain_adapter(peft_model: PeftModel, adapter_name: str):
    """(config, state dict) of an adapter as it is."""
    # "auto" would look the base model up on the hub, to see whether its vocabulary has grown.
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    return copy.deepcopy(peft_model.peft_config[adapter_name]), state


def write_adapter(peft_model: PeftModel, config, state: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter's two files."""
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(peft_model.get_base_model(), "name_or_path", None) or None
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(directory, auto_mapping_dict=_auto_mapping(peft_model, config))


@torch.no_grad()
def save_portable_adapter(
    peft_model: PeftModel, path: str | os.PathLike, adapter_name: str = "default"
) -> None:
    """Save a plain LoRA adapter for the *untouched* base: `PeftModel.from_pretrained(base, path)`.

    After FILA the base holds the residual. What is saved is the exact difference from the original model,

        scaling * (B A - B0 A0) = scaling * ((B - B0) A + B0 (A - A0)),

    of rank 2r, subtracted and stored in float32, with lora_alpha = r (scaling 1), `use_rslora=False` and
    `init_lora_weights=True`; `rank_pattern` and `alpha_pattern` are respected. After default LoRA
    initialisation the adapter is saved as it is. The model is not changed; the reference is not saved.

    path: a directory, made if need be: written under another name and renamed. Where it exists its other
    files stay, and an adapter in it is replaced file by file, the config last.

    Where torch.distributed is set up all processes must call this; the main one writes.

    ValueError: no such LoRA adapter, or `path` is a file.
    """
    check_saved_adapter(peft_model, adapter_name)
    portable = _difference_adapter if REFERENCE_ADAPTER in peft_model.peft_config else plain_adapter
    config, state = portable(peft_model, adapter_name)
    state = {name: full_tensor(tensor) for name, tensor in state.items()}
    if is_main_process():
        replaced = ("adapter_config.json", "adapter_model.*")
        with whole_directory(path, key=CONFIG_NAME, replaced=replaced) as directory:
            write_adapter(peft_model, config, state, directory)
    wait_for_all_processes()

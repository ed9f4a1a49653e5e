"""The default save: a plain LoRA adapter for the untouched base, whatever the initialisation was."""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from pathlib import Path

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from loku.processes import full_tensor, is_main_process, wait_for_all_processes
from loku.targets import REFERENCE_ADAPTER


def _difference(layer: LoraLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
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
        if isinstance(layer, LoraLinear) and adapter_name in layer.lora_A:
            A, B = _difference(layer, adapter_name)
            state[f"base_model.model.{name}.lora_A.weight"] = A
            state[f"base_model.model.{name}.lora_B.weight"] = B
    return config, state


def _auto_mapping(peft_model: PeftModel, config) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _replace_files(source: Path, path: Path) -> None:
    """Move an adapter's files into an existing directory, which at no time holds a mixture that loads."""
    # Without its config an adapter does not load, so the old config goes first and the new one comes last.
    (path / CONFIG_NAME).unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        os.replace(file, path / file.name)


def _write(path: Path, tensors: dict[str, Tensor], config, auto_mapping) -> None:
    exists = path.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of `path`, which may be a mount point.
    unfinished = (path if exists else path.parent) / f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished"
    unfinished.mkdir()
    try:
        save_file(tensors, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(unfinished, auto_mapping_dict=auto_mapping)
        if exists:
            _replace_files(unfinished, path)
        else:
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
    path = Path(path)
    config = peft_model.peft_config.get(adapter_name)
    if config is None or config.peft_type != PeftType.LORA:
        raise ValueError(f"no LoRA adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}")
    if adapter_name == REFERENCE_ADAPTER:
        raise ValueError(
            f"{adapter_name!r} is the original model's adapter on the residual base; save another"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass a directory")
    if REFERENCE_ADAPTER in peft_model.peft_config:
        config, state = _difference_adapter(peft_model, adapter_name)
    else:
        config = copy.deepcopy(config)
        # "auto" would look the base model up on the hub, to see whether its vocabulary has grown.
        state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(peft_model.get_base_model(), "name_or_path", None) or None

    tensors = {
        name: full_tensor(tensor.detach()).cpu().contiguous().clone() for name, tensor in state.items()
    }
    if is_main_process():
        _write(path, tensors, config, _auto_mapping(peft_model, config))
    wait_for_all_processes()

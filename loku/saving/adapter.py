"""The default save: a plain LoRA adapter for the untouched base, after any initialisation."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from loku.adapters import REFERENCE_ADAPTER, adapter_factors, adapter_layers
from loku.distributed import full_tensor, is_main_process, wait_for_all_processes
from loku.saving.directories import whole_directory


def _difference(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A2 (2r, k) and B2 (d, 2r), float32, whose product B2 A2 is exactly scaling * (B A - B0 A0)."""
    B, A = (full_tensor(factor).float() for factor in adapter_factors(layer, adapter_name))
    B0, A0 = (factor.float() for factor in adapter_factors(layer, REFERENCE_ADAPTER))
    # (B - B0) A + B0 (A - A0): the small differences are taken before any product or rounding.
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1) * layer.scaling[adapter_name]


def _difference_adapter(peft_model: PeftModel, adapter_name: str) -> tuple[Any, dict[str, Tensor]]:
    """The config and state dict of the difference from the reference: an adapter of rank 2r and scaling 1."""
    config: Any = copy.deepcopy(peft_model.peft_config[adapter_name])
    config.r *= 2
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()}
    # alpha = rank in every module, because B2 includes the old scaling, of rsLoRA too.
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    state = {}
    for name, layer in adapter_layers(peft_model, adapter_name).items():
        A, B = _difference(layer, adapter_name)
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    return config, state


def _auto_mapping(peft_model: PeftModel, config: Any) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def check_saved_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Check that an adapter can be saved.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter.

    Raises:
        ValueError: It is no LoRA adapter, or it is the adapter "reference" of the original model on the
            residual base.
    """
    config = peft_model.peft_config.get(adapter_name)
    if config is None or config.peft_type != PeftType.LORA:
        raise ValueError(f"no LoRA adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}")
    if adapter_name == REFERENCE_ADAPTER:
        raise ValueError(
            f"{adapter_name!r} is the original model's adapter on the residual base; save another"
        )


def plain_adapter(peft_model: PeftModel, adapter_name: str) -> tuple[Any, dict[str, Tensor]]:
    """The config and state dict of an adapter as it is."""
    # "auto" would look the base model up on the hub, to see whether its vocabulary has grown.
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    return copy.deepcopy(peft_model.peft_config[adapter_name]), state


def write_adapter(peft_model: PeftModel, config: Any, state: dict[str, Tensor], directory: Path) -> None:
    """Write an adapter's two files.

    Args:
        peft_model: The model with the adapter; its base model's name goes into the config.
        config: The adapter's ``peft.LoraConfig``, which is changed.
        state: The adapter's state dict.
        directory: The directory, which exists.
    """
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
    """Save a plain LoRA adapter for the *untouched* base: ``PeftModel.from_pretrained(base, path)``.

    After FILA the base holds the residual. The saved adapter is the exact difference from the original model,

        scaling * (B A - B0 A0) = scaling * ((B - B0) A + B0 (A - A0)).

    It has rank 2r, and it is subtracted and stored in float32. Its config has lora_alpha = r (scaling 1),
    ``use_rslora=False`` and ``init_lora_weights=True``. ``rank_pattern`` and ``alpha_pattern`` are respected.
    After default LoRA initialisation the adapter is saved as it is. The model is not changed, and the
    reference is not saved.

    All processes of torch.distributed must call this. The main process writes.

    Args:
        peft_model: The model with the adapter.
        path: The directory. A new one is written under another name and renamed. In a directory that exists
            an adapter is replaced file by file, the config last, and the other files stay.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: There is no such LoRA adapter, or ``path`` is a file.
        OSError: ``path`` cannot be written.
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

"""The two files of a LoRA adapter: the config that every tool reads, and the tensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from loku.adapters import stands_for_another_base

# The fields of a LoRA adapter's config in peft 0.19, the oldest version that is supported.
STANDARD_FIELDS = frozenset(
    (
        *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping"),
        *("base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias"),
        *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora"),
        *("use_dora", "use_qalora", "use_rslora"),
    )
)
_PATTERNS = ("rank_pattern", "alpha_pattern")  # the first key that matches a module counts


def unusual_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that peft 0.19 does not know and that are not at their defaults."""
    plain = LoraConfig()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in STANDARD_FIELDS | {"runtime_config"}
        and getattr(config, field.name) != getattr(plain, field.name, None)
    }


def unit_scaling_(config: Any, ranks: Mapping[str, int]) -> None:
    """Give a config the ranks of factors that include the scaling: alpha is the rank in every module.

    Args:
        config: The ``peft.LoraConfig``.
        ranks: The rank of each module by its whole name, of a bare parameter by the parameter's name.
    """
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights, config.eva_config = True, None


def _whole_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def standardise_configs_(directory: str | os.PathLike, peft_model: PeftModel) -> None:
    """Rewrite the configs that ``PeftModel.save_pretrained`` has written, by ``standardise_config_``.

    Args:
        directory: The directory that it has written to.
        peft_model: The model with the adapters. Those that were not written are passed over.
    """
    for name, config in peft_model.peft_config.items():
        file = Path(directory, "" if name == "default" else name, CONFIG_NAME)
        if file.is_file() and not stands_for_another_base(peft_model):
            standardise_config_(file, config)


def standardise_config_(file: Path, config: Any = None) -> None:
    """Rewrite the config of a LoRA adapter that peft wrote, so that every tool reads it and bytes repeat.

    Newer versions of peft write fields that older ones and other tools do not know. Such a field goes if it
    has its default, and stays otherwise. ``lora_alpha`` and the values of ``alpha_pattern`` become integers
    where they are whole. peft writes the modules in the order of a set, which differs from process to
    process; they are sorted. peft sorts the keys of the patterns, of which the first that matches counts;
    they keep the order of ``config``.

    Args:
        file: The file. The config of another kind of adapter stays as it is.
        config: The ``peft.LoraConfig`` that was written; None (default) leaves the patterns sorted.
    """
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("peft_type") != "LORA":
        return
    plain = LoraConfig().to_dict()
    fields = {
        name: value
        for name, value in sorted(fields.items())
        if name in STANDARD_FIELDS or value != plain.get(name)
    }
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(name), list):
            fields[name] = sorted(fields[name])
    for name in _PATTERNS:
        if config is not None:
            fields[name] = dict(getattr(config, name) or {})
    fields["lora_alpha"] = _whole_number(fields["lora_alpha"])
    alphas = fields.get("alpha_pattern") or {}
    fields["alpha_pattern"] = {key: _whole_number(value) for key, value in alphas.items()}
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def _auto_mapping(peft_model: PeftModel, config: Any) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def write_adapter(
    peft_model: PeftModel | None,
    config: Any,
    state: dict[str, Tensor],
    directory: Path,
    *,
    safe_serialization: bool = True,
) -> None:
    """Write an adapter's two files. The config has the fields of ``standardise_config_``.

    Args:
        peft_model: The model with the adapter. None is for an adapter that was read from a file: its config
            has ``auto_mapping`` already.
        config: The adapter's ``peft.LoraConfig``, which is changed.
        state: The adapter's state dict.
        directory: The directory, which exists.
        safe_serialization: Whether to write safetensors (default) or a pickle.
    """
    config.inference_mode = True
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if safe_serialization:
        save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        torch.save(tensors, directory / WEIGHTS_NAME)
    mapping = config.auto_mapping if peft_model is None else _auto_mapping(peft_model, config)
    config.save_pretrained(directory, auto_mapping_dict=mapping)
    standardise_config_(directory / CONFIG_NAME, config)

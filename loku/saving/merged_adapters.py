"""What a model remembers of an adapter that was merged into it: its factors, and the untouched base."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loku.adapters import (
    MERGED_ADAPTER,
    REFERENCE_ADAPTER,
    adapter_layers,
    changes_base,
    has_residual_base,
    unwrapped,
)
from loku.fingerprints import parameters_fingerprint
from loku.saving.adapter import (
    check_portable,
    merged_adapter,
    plain_adapter,
    sum_adapter,
    untouched_base,
)


def refresh_merged_adapter_(model: nn.Module) -> None:
    """Forget the factors of an adapter that was merged into a model, if its weights were changed since.

    No LoRA adapter of the untouched base is then known to hold the model, and ``check_portable`` says so.

    Args:
        model: The model before an adapter or a training changes it. A residual base is left alone.
    """
    base: Any = unwrapped(model)
    given = getattr(base, MERGED_ADAPTER, None)
    if given is None or (isinstance(model, PeftModel) and has_residual_base(model)):
        return
    if given["factors"] is not None and given.get("weights") != parameters_fingerprint(base):
        setattr(base, MERGED_ADAPTER, {**given, "factors": None})


def remember_merged_adapter_(base: nn.Module, facts: dict[str, Any] | None) -> None:
    """Keep the result of ``merged_adapter_facts`` in the base, after the merge."""
    if facts is not None:
        setattr(base, MERGED_ADAPTER, {**facts, "weights": parameters_fingerprint(base)})


@torch.no_grad()
def merged_adapter_facts(peft_model: PeftModel, adapter_names: list[str]) -> dict[str, Any] | None:
    """What a model must remember of adapters that are about to be merged into its base.

    Args:
        peft_model: The model with the adapters.
        adapter_names: The names of the adapters that will be merged.

    Returns:
        A dict as ``loku.adapter_folders.load_merged`` keeps it, without ``weights``. ``factors`` is None if
        no plain LoRA adapter of the untouched base holds the merged model. The result is None if the merged
        model is the untouched base itself.
    """
    given = merged_adapter(peft_model)
    if list(adapter_names) == [REFERENCE_ADAPTER]:
        return given
    first = peft_model.peft_config[adapter_names[0]]
    untouched = untouched_base(peft_model, first)
    facts = {
        "base_model_name_or_path": untouched,
        "factors": None,
        "tokenizer": untouched if given is None else given.get("tokenizer"),
    }
    try:
        check_portable(peft_model, adapter_names[0])
    except ValueError:
        return facts
    layers = adapter_layers(peft_model, adapter_names[0])
    plain = not any(
        hasattr(layer, "parameter_name")
        or adapter_names[0] in layer.lora_variant
        or layer.lora_bias.get(adapter_names[0])
        for layer in layers.values()
    )
    if len(adapter_names) > 1 or changes_base(first) or not plain:
        return facts
    _, own = plain_adapter(peft_model, adapter_names[0])
    if not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in own):
        return facts
    _, state = sum_adapter(peft_model, adapter_names[0], own, None)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    facts["factors"] = {
        name.removeprefix("base_model.model."): tuple(
            state[f"{name}.lora_{letter}.weight"].detach().float().cpu().clone() for letter in "BA"
        )
        for name in names
    }
    return facts

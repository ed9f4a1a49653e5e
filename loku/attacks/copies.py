"""Copies of an attacked model, which an attack may change, and what cannot be copied."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from loku.adapters import BASE_COPY, REFERENCE_ADAPTER
from loku.distributed import rank_and_size
from loku.models import CausalLM, unwrapped


def check_one_process(attack: str) -> None:
    """Check that an attack runs in one process alone.

    Args:
        attack: The name of the attack in the message.

    Raises:
        ValueError: torch.distributed runs with several processes.
    """
    size = rank_and_size()[1]
    if size > 1:
        raise ValueError(f"{attack} runs in one process, and there are {size}: run it without torchrun")


def reason_not_copied(model: CausalLM) -> str | None:
    """Return the reason why a model has no merged copy in floating point; None if it has one.

    Args:
        model: The causal LM.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(unwrapped(model), "is_quantized", False):
        return "the base is quantised, so its weights are neither trained nor rounded again"
    if isinstance(model, PeftModel):
        if not hasattr(model.base_model, "merge_and_unload"):
            return "the adapter is no change of weights, so it cannot be merged into the base"
        if REFERENCE_ADAPTER in model.active_adapters:
            return "the adapter 'reference' of the initial factors is active; activate the trained one"
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return "the model has an adapter without its PeftModel; pass the PeftModel, or merge the adapter"
    return None


def merged_copy(model: CausalLM, dtype: torch.dtype | None = None) -> Any:
    """Copy a model, and merge its active adapter into the copy.

    The memory of a second model is needed, and for the time of the merging that of the adapter, too.

    Args:
        model: The causal LM, which stays as it is. ``reason_not_copied`` has returned None for it.
        dtype: The dtype of the copy, to which it is cast before the merging; None (default) keeps that of the
            model. In half precision the merged weights are rounded, as in a merged model that is served.
    """
    memo: dict[int, Any] = {}
    originals = getattr(model, BASE_COPY, None)
    if originals is not None:  # the untouched weights, which FILA keeps for the end of the adapter
        memo[id(originals)] = {}
    copied: Any = copy.deepcopy(model, memo)
    if dtype is not None:
        copied = copied.to(dtype)
    return copied.merge_and_unload() if isinstance(copied, PeftModel) else copied


def plain_figures(measures: Mapping[str, float]) -> dict[str, float | None]:
    """Return measures with None in the place of NaN and infinities, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}

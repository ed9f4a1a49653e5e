"""The default save: a plain LoRA adapter for the untouched base, after any initialisation."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import Embedding as LoraEmbedding
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loku.adapters import (
    MERGED_ADAPTER,
    REFERENCE_ADAPTER,
    adapter_layers,
    changes_base,
    has_residual_base,
    stands_for_another_base,
    unwrapped,
)
from loku.counts import check_counts
from loku.distributed import full_tensor, is_main_process, wait_for_all_processes
from loku.saving.adapter_files import unit_scaling_, write_adapter
from loku.saving.compression import Compression, check_compressible, compressed_adapter, loss_facts
from loku.saving.destinations import destination, residual_save

# peft's initialisations of the base weights that differ each time, as from random numbers or gradients.
_NOT_REPEATED = ("pissa_niter", "corda", "lora_ga")


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


def merged_adapter(peft_model: PeftModel) -> dict[str, Any] | None:
    """The name of the untouched base and the factors of an adapter that was merged into it, or None.

    ``loku.adapter_folders.load_merged`` and ``merge_and_unload`` of a result keep them. The untouched base is
    the model under that adapter.
    """
    return getattr(peft_model.get_base_model(), MERGED_ADAPTER, None)


def check_portable(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Check that ``save_portable_adapter`` can save an adapter.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: There is no such LoRA adapter, or it has no plain factors that could be added to those of
            another adapter.
    """
    check_saved_adapter(peft_model, adapter_name)
    base, given = base_name(peft_model, peft_model.peft_config[adapter_name]), merged_adapter(peft_model)
    if given is None and residual_save(base) is not None and not has_residual_base(peft_model):
        folder = Path(str(base)).with_name(REFERENCE_ADAPTER)
        raise ValueError(
            f"the base, {base}, is a residual, and the initial factors are not loaded: call "
            f"load_adapter({str(folder)!r}, {REFERENCE_ADAPTER!r}) of the peft model first"
        )
    if given is not None and given["factors"] is None:
        raise ValueError(
            "the given model was an adapter that is no plain LoRA, or its weights were changed after an "
            "adapter was merged into it. So no LoRA adapter of its base "
            f'{given["base_model_name_or_path"]!r} is known to hold it; choose the kind of save "merged" '
            '(save_kind="merged", or --save merged)'
        )
    initialisation = str(getattr(peft_model.peft_config[adapter_name], "init_lora_weights", None)).lower()
    if not has_residual_base(peft_model) and initialisation.startswith(_NOT_REPEATED):
        raise ValueError(
            f"init_lora_weights={initialisation!r} changed the base weights by random numbers or by data, so "
            "peft cannot repeat it when it loads the adapter on the untouched base; choose the kind of save "
            '"residual" or "merged", or init_lora_weights="pissa"'
        )
    if not stands_for_another_base(peft_model):
        return  # the adapter is saved as it is
    if given is not None and changes_base(peft_model.peft_config[adapter_name]):
        raise ValueError(
            "peft's initialisation changed the base weights, so this adapter cannot be added to the one that "
            'was merged before it; choose the kind of save "merged", or init_lora_weights=True'
        )
    for name, layer in adapter_layers(peft_model, adapter_name).items():
        added = given is not None and name in given["factors"]
        if adapter_name in layer.lora_variant or layer.lora_bias.get(adapter_name):
            what = "has a bias (lora_bias)" if layer.lora_bias.get(adapter_name) else "is a LoRA variant"
        elif isinstance(layer, LoraEmbedding) and (added or REFERENCE_ADAPTER in layer.scaling):
            what = "is that of an embedding"
        else:
            continue
        raise ValueError(
            f"{name}: its adapter {what}, and no plain LoRA adapter is its difference from the untouched "
            'base; choose the kind of save "merged", or a plain LoraConfig'
        )


def check_rank(peft_model: PeftModel, rank: int, adapter_name: str = "default") -> None:
    """Check that ``save_portable_adapter`` can save an adapter at a rank.

    Args:
        peft_model: The model with the adapter.
        rank: The rank.
        adapter_name: The name of the adapter, "default" by default.

    Raises:
        ValueError: The rank is no positive integer, or the adapter cannot be compressed
            (``loku.saving.compression.check_compressible``).
    """
    check_counts(rank=rank)
    check_saved_adapter(peft_model, adapter_name)
    config: Any = copy.copy(peft_model.peft_config[adapter_name])
    if has_residual_base(peft_model):
        config.init_lora_weights = True  # the portable adapter is a difference
    check_compressible(config)


class _Factors:
    """The factors of adapters, from a state dict where it has them, and otherwise from the layers."""

    def __init__(self, state_dict: Mapping[str, Tensor] | None) -> None:
        self.state = state_dict or {}

    def __call__(self, name: str, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
        """B (d, r, E) and A (E, r, k), float32, of a layer with E experts; E is 1 for a linear layer."""
        found = {}
        for letter in "BA":
            key = f"base_model.model.{name}.lora_{letter}.{adapter_name}.weight"
            value = self.state.get(key)
            if value is None:
                value = full_tensor(getattr(layer, f"lora_{letter}")[adapter_name].weight)
            found[letter] = value.detach().float().cpu()
        B, A, experts, rank = found["B"], found["A"], getattr(layer, "num_experts", 1), layer.r[adapter_name]
        if [B.numel(), A.numel()] != [
            experts * rank * layer.out_features,
            experts * rank * layer.in_features,
        ]:
            raise ValueError(
                f"{name}: its factors are partitioned (DeepSpeed ZeRO-3), B {tuple(B.shape)} and A "
                f"{tuple(A.shape)}; gather them before the save, by deepspeed.zero.GatheredParameters"
            )
        return B.view(-1, rank, experts), A.view(experts, rank, -1)


def _terms(
    name: str, layer: Any, adapter_name: str, factors: _Factors, residual: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pairs B (d, r, E), A (E, r, k), whose products add up to what a layer adds to the untouched base."""
    held = [adapter_name] if adapter_name in layer.scaling else []
    if residual and REFERENCE_ADAPTER in layer.scaling:
        held.append(REFERENCE_ADAPTER)
    pairs = {adapter: factors(name, layer, adapter) for adapter in held}
    scaling = layer.scaling.get(adapter_name)
    if len(held) == 1 and held[0] == adapter_name:
        ((B, A),) = pairs.values()
        return [(B * scaling, A)]
    B0, A0 = pairs[REFERENCE_ADAPTER]
    if len(held) == 1:
        return [(-layer.scaling[REFERENCE_ADAPTER] * B0, A0)]
    B, A = pairs[adapter_name]
    if B.shape != B0.shape or scaling != layer.scaling[REFERENCE_ADAPTER]:
        return [(B * scaling, A), (-layer.scaling[REFERENCE_ADAPTER] * B0, A0)]
    # scaling * (B A - B0 A0), and the small differences are taken before any product or rounding.
    return [((B - B0) * scaling, A), (B0 * scaling, A - A0)]


def _pattern_key(name: str, layer: Any) -> str:
    """The name by which peft looks up the rank of a layer in ``rank_pattern``."""
    name = name.replace(".base_layer", "")  # wrappers of several parameters of one module are nested
    parameter = getattr(layer, "parameter_name", None)
    return f"{name}.{parameter}" if parameter else name


def sum_adapter(
    peft_model: PeftModel,
    adapter_name: str,
    plain: dict[str, Tensor],
    state_dict: Mapping[str, Tensor] | None,
) -> tuple[Any, dict[str, Tensor]]:
    """The config and state dict of an adapter of scaling 1 that takes the untouched base to the model."""
    given = merged_adapter(peft_model)
    given_factors: dict[str, tuple[Tensor, Tensor]] = {} if given is None else dict(given["factors"])
    residual, factors = has_residual_base(peft_model), _Factors(state_dict)
    layers = adapter_layers(peft_model, adapter_name)
    own_layers = list(layers)
    if residual:
        layers = {**adapter_layers(peft_model, REFERENCE_ADAPTER), **layers}
    state, ranks = {key: value for key, value in plain.items() if ".lora_" not in key}, {}
    for name, layer in layers.items():
        prefix = f"base_model.model.{name}"
        if isinstance(layer, LoraEmbedding):  # alone, by check_portable
            for letter, factor in (("A", 1.0), ("B", layer.scaling[adapter_name])):
                key = f"{prefix}.lora_embedding_{letter}"
                state[key] = full_tensor(plain[key]).float() * factor
            ranks[_pattern_key(name, layer)] = layer.r[adapter_name]
            continue
        terms = _terms(name, layer, adapter_name, factors, residual)
        if name in given_factors:
            B, A = (factor.float().cpu() for factor in given_factors.pop(name))
            terms.append((B[:, :, None], A[None]))
        B, A = (torch.cat(parts, dim=1) for parts in zip(*terms, strict=True))
        state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"] = A.flatten(0, 1), B.flatten(1)
        ranks[_pattern_key(name, layer)] = A.shape[1]
    for name, (B, A) in given_factors.items():
        prefix = f"base_model.model.{name}"
        state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"] = A.float(), B.float()
        ranks[name] = len(A)

    config: Any = copy.deepcopy(peft_model.peft_config[adapter_name])
    unit_scaling_(config, ranks)  # B includes the old scaling, of rsLoRA too
    modules = [name for name in [*layers, *given_factors] if not hasattr(layers.get(name), "parameter_name")]
    if len(own_layers) < len(layers) or given_factors:  # modules beside those that the config names
        config.target_modules = set(modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config, state


def plain_adapter(
    peft_model: PeftModel,
    adapter_name: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | str = False,
) -> tuple[Any, dict[str, Tensor]]:
    """The config and state dict of an adapter as it is.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter.
        state_dict: The state dict of ``peft_model``; None (default) reads the model.
        save_embedding_layers: As in ``PeftModel.save_pretrained``. "auto" would look the base model up on the
            hub, to see whether its vocabulary has grown, so False is the default.
    """
    state = get_peft_model_state_dict(
        peft_model,
        state_dict=state_dict,
        adapter_name=adapter_name,
        save_embedding_layers=save_embedding_layers,  # type: ignore[arg-type]  # True, False or "auto"
    )
    return copy.deepcopy(peft_model.peft_config[adapter_name]), state


@torch.no_grad()
def portable_adapter(
    peft_model: PeftModel,
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | str = False,
) -> tuple[Any, dict[str, Tensor]]:
    """The config and state dict of an adapter for the untouched base; see ``save_portable_adapter``.

    Args:
        peft_model: The model with the adapter.
        adapter_name: The name of the adapter, "default" by default.
        state_dict: The state dict of ``peft_model``, as for ``plain_adapter``.
        save_embedding_layers: As for ``plain_adapter``.

    Returns:
        The ``peft.LoraConfig`` and the tensors by their names in the file, float32 for a difference.

    Raises:
        ValueError: The errors of ``check_portable``, or a factor is partitioned by DeepSpeed ZeRO-3.
    """
    check_portable(peft_model, adapter_name)
    config, state = plain_adapter(
        peft_model, adapter_name, state_dict=state_dict, save_embedding_layers=save_embedding_layers
    )
    if not state:
        raise ValueError(
            f"the model has no layer with the adapter {adapter_name!r} any more; it was taken off"
        )
    if stands_for_another_base(peft_model):
        config, state = sum_adapter(peft_model, adapter_name, state, state_dict)
    config.base_model_name_or_path = untouched_base(peft_model, config)
    return config, {name: full_tensor(tensor) for name, tensor in state.items()}


def untouched_base(peft_model: PeftModel, config: Any) -> str | None:
    """The name of the model that the portable adapter fits, or None if it is not known."""
    given = merged_adapter(peft_model)
    if given is not None:
        return given["base_model_name_or_path"]
    name = base_name(peft_model, config)
    residual = residual_save(name)
    return name if residual is None else residual["untouched"]


def base_name(peft_model: PeftModel, config: Any) -> str | None:
    """The name or path that the base model was loaded by, or None.

    Args:
        peft_model: The model.
        config: The config of its adapter.
    """
    return (
        config.base_model_name_or_path or getattr(peft_model.get_base_model(), "name_or_path", None) or None
    )


def loaded_from(model: nn.Module) -> dict[str, str | None]:
    """The names or paths that a model, its adapter's base and the adapter merged into it were loaded by.

    Args:
        model: The model, with or without an adapter.

    Returns:
        The names by what they are, for ``loku.saving.destinations.refuse_overlap``.
    """
    base: Any = unwrapped(model)
    if isinstance(model, PeftModel):
        base = model.get_base_model()
    config: Any = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    given = getattr(base, MERGED_ADAPTER, None) or {}
    return {
        "model": getattr(base, "name_or_path", None),
        "base_of_the_adapter": getattr(config, "base_model_name_or_path", None),
        "base_of_the_given_adapter": given.get("base_model_name_or_path"),
        "given_adapter": given.get("adapter"),
    }


def save_portable_adapter(
    peft_model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rank: int | None = None,
) -> Compression | None:
    """Save a plain LoRA adapter for the *untouched* base: ``PeftModel.from_pretrained(base, path)``.

    After FILA the base holds the residual. The saved adapter is the difference from the original model,

        scaling * (B A - B0 A0) = scaling * ((B - B0) A + B0 (A - A0)).

    It has rank 2r, and it is subtracted and stored in float32. Its config has lora_alpha = r (scaling 1),
    ``use_rslora=False`` and ``init_lora_weights=True``. ``rank_pattern`` and ``alpha_pattern`` are respected.
    A module without a residual keeps its rank: default LoRA on the experts beside FILA on the attention. If
    the given model was an adapter that ``loku.unlearn`` merged, its factors come on top, and the untouched
    base is the model under it. After default LoRA initialisation the adapter is saved as it is. The model is
    not changed, and the reference is not saved.

    The loaded model computes with the original weights W, and the model in memory with the residual,
    fl(W - scaling * B0 A0), as rounded to the dtype of W. So they differ by that rounding E, which is at most
    half a unit in the last place of the residual: |E| <= eps / 2 * |residual| for each weight, where eps is
    2^-7 for bfloat16, 2^-10 for float16 and 2^-23 for float32. E is noise of full rank, and no adapter of low
    rank holds it.

    All processes of torch.distributed must call this. The main process writes.

    Args:
        peft_model: The model with the adapter.
        path: The directory. A new one is written under another name and renamed. In a directory that exists
            the last save makes way, and the other files stay (``loku.saving.destinations``).
        adapter_name: The name of the adapter, "default" by default.
        tokenizer: The tokenizer to save beside the adapter; None (default) saves none.
        rank: The rank of the saved adapter, the best approximation of the exact one
            (``loku.saving.compression``). None (default) saves the exact adapter, and so does a rank that is
            not below its rank.

    Returns:
        What the smaller rank lost, or None without a ``rank``.

    Raises:
        ValueError: There is no such LoRA adapter, it cannot be saved so (``check_portable``), or not at a
            smaller rank (``check_rank``). Or ``path`` is refused
            (``loku.saving.destinations.check_destination``).
        OSError: ``path`` cannot be written.
    """
    if rank is not None:
        check_rank(peft_model, rank, adapter_name)
    config, state = portable_adapter(peft_model, adapter_name)
    lost = None
    if rank is not None:
        names = {
            name: layer.parameter_name
            for name, layer in adapter_layers(peft_model, adapter_name).items()
            if hasattr(layer, "parameter_name")
        }
        config, state, lost = compressed_adapter(config, state, rank, parameter_names=names)
    facts: Any = loss_facts(lost)
    if is_main_process():
        with destination(path, "portable", sources=loaded_from(peft_model), **facts) as directory:
            write_adapter(peft_model, config, state, directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
    wait_for_all_processes()
    return lost

"""A folder with an adapter that is given as the model: the adapter is merged into its base.

transformers would put the adapter's layers into the base. A second adapter would then reset the first one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from loku.adapters import MERGED_ADAPTER, REFERENCE_ADAPTER, adapter_factors, adapter_layers, changes_base
from loku.saving.destinations import residual_save
from loku.saving.merged_adapters import remember_merged_adapter_
from loku.trust import (
    HUB_ARGUMENTS,
    TRUSTED,
    check_adapter,
    check_base,
    find_file,
    loading,
    trusts_code,
)

_log = logging.getLogger(__name__)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
# Adapters that put learnt tokens before each row.
_LEARNT_TOKENS = (PeftType.PROMPT_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.P_TUNING, PeftType.CPT)


def find_adapter(model: str | os.PathLike, arguments: Mapping[str, Any]) -> str | None:
    """Find the adapter that a path or hub name stands for.

    Args:
        model: The folder or hub name of an adapter or of a model; or the folder of a residual save, which
            has the folders ``base`` and ``adapter``.
        arguments: The arguments of ``from_pretrained``; those that say where a repository is count.

    Returns:
        The folder or hub name of the adapter, or None if ``model`` is a model.

    Raises:
        ValueError: A folder holds an adapter and the weights of a model.
    """
    name = os.fspath(model)
    folder = Path(name)
    if not folder.is_dir():
        hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
        return name if find_adapter_config_file(name, **hub) else None
    folder /= arguments.get("subfolder", "")
    if not (folder / CONFIG_NAME).is_file():
        parts = (folder / "adapter" / CONFIG_NAME, folder / "base" / "config.json")
        residual = all(part.is_file() for part in parts) and not (folder / "config.json").is_file()
        return str(folder / "adapter") if residual else None
    if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise ValueError(
            f"{folder} holds an adapter ({CONFIG_NAME}) and the weights of a model: pass a folder that holds "
            "one of them"
        )
    return str(folder)


def _base_of(adapter: str, config: Any) -> str:
    """The path or hub name of an adapter's base."""
    sibling = Path(adapter).parent / "base"
    recorded = config.base_model_name_or_path
    if (sibling / "config.json").is_file() and Path(recorded or "base").name == "base":
        return str(sibling)  # a residual save, which may have been moved as a whole
    if not recorded:
        raise ValueError(
            f"{adapter} is an adapter that does not name its base: write base_model_name_or_path into its "
            f"{CONFIG_NAME}, or load and merge the adapter by peft and pass the model"
        )
    if Path(recorded).is_dir() and Path(recorded).resolve() == Path(adapter).resolve():
        raise ValueError(f"{adapter} is an adapter that names itself as its base ({CONFIG_NAME})")
    return recorded


def _tokenizer_place(adapter: str, base: str, hub: Mapping[str, Any]) -> str:
    """Where the tokenizer of a merged model lies: beside the adapter, as trainers save it, or the base."""
    return adapter if find_file(adapter, "tokenizer_config.json", hub) else base


def _check_tensors(adapter: str, loaded: Any, base: str) -> None:
    """Raise ValueError unless an adapter's file has every tensor of its config on this base, and no other."""
    strangers, missing = list(loaded.unexpected_keys), list(loaded.missing_keys)
    if strangers or missing:
        problem = (
            f"{len(strangers)} of its tensors have no place there"
            if strangers
            else (f"{len(missing)} tensors that belong there are not in its file")
        )
        raise ValueError(
            f"{adapter} does not fit its base {base}: {problem}, the first {(strangers or missing)[0]}"
        )


def _plain_factors(
    peft_model: PeftModel, stored: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """B (d, rank) with the scaling, and A (rank, k), float32, by module; None unless that is all."""
    config: Any = peft_model.peft_config["default"]
    if config.peft_type != PeftType.LORA or changes_base(config):
        return None
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored):
        return None
    layers = adapter_layers(peft_model, "default")
    if config.target_parameters or any("default" in layer.lora_variant for layer in layers.values()):
        return None
    factors = {}
    for name, layer in layers.items():
        B, A = (factor.detach().float().cpu() for factor in adapter_factors(layer, "default"))
        factors[name] = (B * layer.scaling["default"], A.clone())
    return factors


def _without_initial_factors(
    factors: dict[str, tuple[Tensor, Tensor]] | None, peft_model: PeftModel, reference: Path
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors less the initial ones in ``reference``: what takes the untouched base to the model."""
    if factors is None:
        return None
    read_adapter_config(str(reference))  # peft reads it again
    peft_model.load_adapter(str(reference), REFERENCE_ADAPTER)
    joined = dict(factors)
    for name, layer in adapter_layers(peft_model, REFERENCE_ADAPTER).items():
        B0, A0 = (factor.detach().float().cpu() for factor in adapter_factors(layer, REFERENCE_ADAPTER))
        B, A = joined.get(name, (B0[:, :0], A0[:0]))
        joined[name] = torch.cat([B, B0 * -layer.scaling[REFERENCE_ADAPTER]], dim=1), torch.cat([A, A0])
    return joined


def _with_earlier(
    factors: dict[str, tuple[Tensor, Tensor]] | None, earlier: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors of an adapter and of the one that was merged before it, as one adapter."""
    if factors is None or earlier["factors"] is None:
        return None
    joined = dict(earlier["factors"])
    for name, (B, A) in factors.items():
        if name in joined:
            B, A = torch.cat([joined[name][0], B], dim=1), torch.cat([joined[name][1], A])
        joined[name] = B, A
    return joined


def _check_quantised(adapter: str, peft_model: PeftModel) -> None:
    for name, parameter in peft_model.get_base_model().named_parameters():
        if name.endswith(".base_layer.weight") and not parameter.is_floating_point():
            raise ValueError(
                f"{adapter} cannot be merged into the quantised {name.removesuffix('.base_layer.weight')} "
                "without a loss: load the base unquantised, merge, save the merged model, and quantise that"
            )


def read_adapter_config(
    adapter: str, hub: Mapping[str, Any] | None = None, *, use_safetensors: bool = True
) -> PeftConfig:
    """Read an adapter's config, and refuse an adapter that is not to be loaded (``loku.trust``).

    Args:
        adapter: The folder or hub name of the adapter.
        hub: The arguments of ``from_pretrained`` that say where the adapter is; None (default) for none.
        use_safetensors: Whether the weights must be safetensors, True by default.

    Raises:
        ValueError: The config is none, or the adapter is refused.
    """
    try:
        config = PeftConfig.from_pretrained(adapter, **(hub or {}))
        named = config.base_model_name_or_path
        if named is not None and not isinstance(named, str):
            raise TypeError(f"base_model_name_or_path is {named!r}")
    except (AttributeError, KeyError, RecursionError, TypeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{adapter}/{CONFIG_NAME} is not the config of an adapter: {error}") from error
    check_adapter(adapter, config, hub or {}, use_safetensors=use_safetensors)
    return config


def read_adapter(
    adapter: str, hub: Mapping[str, Any] | None = None, *, use_safetensors: bool = True
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Read an adapter's config and its tensors, without its base.

    Args:
        adapter: The folder or hub name of the adapter.
        hub: As for ``read_adapter_config``.
        use_safetensors: As for ``read_adapter_config``.

    Returns:
        The config, and the tensors by their names in the file, on the CPU.

    Raises:
        ValueError: The errors of ``read_adapter_config``, or the file is damaged.
    """
    config = read_adapter_config(adapter, hub, use_safetensors=use_safetensors)
    with loading(adapter):
        return config, load_peft_weights(adapter, "cpu", **(hub or {}))


def put_adapter(
    base: PreTrainedModel,
    adapter: str,
    base_name: str,
    config: PeftConfig,
    hub: Mapping[str, Any] | None = None,
) -> PeftModel:
    """Put an adapter on its base, unmerged.

    Args:
        base: The base.
        adapter: The folder or hub name of the adapter.
        base_name: The name of the base in messages.
        config: The adapter's config, by ``read_adapter_config``.
        hub: The arguments of ``from_pretrained`` that say where the adapter is; None (default) for none.

    Raises:
        ValueError: The adapter does not fit the base, puts tokens of its own before a row, or its file is
            damaged.
    """
    if config.peft_type in _LEARNT_TOKENS:  # its logits would have more tokens than the row
        raise ValueError(
            f"{adapter} is a {config.peft_type} adapter, which puts learnt tokens before each row: it can be "
            "neither measured nor merged into its base"
        )
    hub = hub or {}
    with loading(adapter):
        peft_model: Any = PeftModel.from_pretrained(base, adapter, config=config, **hub)
        if hasattr(peft_model.base_model, "merge_and_unload"):  # not a learnt prompt
            # A second time, because only load_adapter says which tensors found no place.
            _check_tensors(adapter, peft_model.load_adapter(adapter, "default", **hub), base_name)
    return peft_model


def load_on_base(adapter: str, arguments: Mapping[str, Any]) -> tuple[PeftModel, str]:
    """Load the base of an adapter, and put the adapter on it, unmerged.

    A base that is an adapter itself is merged into its own base first.

    Args:
        adapter: The folder or hub name of the adapter.
        arguments: The arguments of ``from_pretrained`` for the base. ``revision`` and ``subfolder`` are those
            of the adapter.

    Returns:
        The model with the adapter, and the path or hub name of the base.

    Raises:
        ValueError: The base is not named or cannot be loaded, or the adapter is refused or does not fit it.
    """
    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    # False is the user's own choice of pickles.
    safetensors = arguments.get("use_safetensors") is not False
    config = read_adapter_config(adapter, hub, use_safetensors=safetensors)
    base_name = _base_of(adapter, config)
    elsewhere = ("revision", "subfolder")
    base_arguments = {key: value for key, value in arguments.items() if key not in elsewhere}
    if getattr(config, "revision", None):
        base_arguments["revision"] = config.revision
    try:
        base = load_causal_lm(base_name, base_arguments)
    except OSError as error:
        raise ValueError(
            f"{adapter} is an adapter for {base_name!r}, which cannot be loaded ({error}): correct "
            f"base_model_name_or_path in its {CONFIG_NAME}, or merge it by peft and pass the merged model"
        ) from error
    return put_adapter(base, adapter, base_name, config, hub), base_name


def load_merged(adapter: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Load the base of an adapter and merge the adapter into it. The log says so.

    A base that is an adapter itself is merged into its own base first. The merged weights are rounded once to
    the dtype of the base.

    Args:
        adapter: The folder or hub name of the adapter.
        arguments: The arguments of ``from_pretrained`` for the base. ``revision`` and ``subfolder`` are those
            of the adapter.

    Returns:
        The merged model. Its attribute ``_loku_merged_adapter`` is a dict. ``adapter`` is the folder or hub
        name of the adapter. ``base_model_name_or_path`` is the untouched base, or None for the residual save
        of a model without a name. ``factors`` are B (d, rank) with the scaling multiplied in and A (rank, k),
        both float32, by module name; None if the adapter has more than LoRA factors. ``tokenizer`` is the
        folder or hub name of the tokenizer. ``weights`` is the fingerprint of the merged weights, for which
        the factors are right.

    Raises:
        ValueError: The base is not named or cannot be loaded, or the adapter does not fit it or cannot be
            merged into it.
    """
    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    peft_model: Any
    peft_model, base_name = load_on_base(adapter, arguments)
    base: Any = peft_model.get_base_model()
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kind = peft_model.peft_config["default"].peft_type
        raise ValueError(f"{adapter} is a {kind} adapter, which cannot be merged into its base")
    _check_quantised(adapter, peft_model)
    earlier = getattr(base, MERGED_ADAPTER, None)
    factors = _plain_factors(peft_model, load_peft_weights(adapter, "cpu", **hub))
    untouched, residual = base_name, residual_save(base_name)
    reference = Path(adapter).with_name(REFERENCE_ADAPTER)
    if residual is not None and reference.is_dir():
        untouched = residual["untouched"]
        factors = _without_initial_factors(factors, peft_model, reference)
    if earlier is not None:
        untouched, factors = earlier["base_model_name_or_path"], _with_earlier(factors, earlier)
    merged = peft_model.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():  # peft froze them
        parameter.requires_grad_(parameter.is_floating_point())
    facts = {
        "adapter": adapter,
        "base_model_name_or_path": untouched,
        "factors": factors,
        "tokenizer": _tokenizer_place(adapter, base_name if earlier is None else earlier["tokenizer"], hub),
    }
    remember_merged_adapter_(merged, facts)
    _log.warning("%s is an adapter: it was merged into its base %s", adapter, base_name)
    return merged


def load_causal_lm(model: str | os.PathLike, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Load a causal LM, or the base of an adapter with the adapter merged into it.

    Weights are read from safetensors, and no code of the repository runs, unless the arguments say otherwise.

    Args:
        model: The folder or hub name of a model or of an adapter.
        arguments: The arguments of ``from_pretrained``.

    Raises:
        ValueError: The model is an encoder-decoder, is refused (``loku.trust``), or its files are damaged or
            lack weights. Or the errors of ``find_adapter`` and ``load_merged``.
    """
    arguments = {"use_safetensors": True, **arguments, "trust_remote_code": trusts_code(arguments)}
    adapter = find_adapter(model, arguments)
    if adapter is not None:
        if Path(adapter).is_dir():  # it includes the subfolder
            arguments = {name: value for name, value in arguments.items() if name != "subfolder"}
        return load_merged(adapter, arguments)
    if "subfolder" in arguments:  # transformers would follow an adapter in the folder above
        if (Path(model) / CONFIG_NAME).is_file():
            model = Path(model) / arguments.pop("subfolder")
        else:
            arguments.setdefault("adapter_kwargs", {"subfolder": arguments["subfolder"]})
    trusted = arguments.pop("trust_remote_code")
    with loading(model):
        loaded, report = _auto_class(model, arguments, trusted).from_pretrained(
            model, trust_remote_code=trusted, output_loading_info=True, **arguments
        )
        # transformers draws them at random. Quantised weights are stored under other names.
        missing = sorted(report["missing_keys"])
        if missing and getattr(loaded, "hf_quantizer", None) is None:
            raise ValueError(
                f"{model} cannot be loaded: its files lack {len(missing)} weights that its config asks for, "
                f"the first {missing[0]}. Copy the model again, or pass a causal LM with all its weights"
            )
    if trusted:
        setattr(loaded, TRUSTED, True)
    return loaded


def _auto_class(model: str | os.PathLike, arguments: Mapping[str, Any], trusted: bool) -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText for a class such as Llava that it does not have.

    Raises:
        ValueError: The model is an encoder-decoder, which neither of them has as a causal LM. Or it is
            refused (``check_base``).
    """
    if "config" in arguments:
        return AutoModelForCausalLM
    places = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    config = AutoConfig.from_pretrained(model, trust_remote_code=trusted, **places)
    check_base(model, config, arguments)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{model} is a {config.model_type} model, which is an encoder-decoder; pass a decoder-only "
            "causal LM, as transformers.AutoModelForCausalLM loads"
        )
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM

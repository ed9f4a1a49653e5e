"""What a model computes with beside its weights: its config, and each module's class, settings and hooks.

Two models of equal weights may compute differently: by the epsilon of a norm, a dropout, an activation or a
hook. The description of a model names these, and does not change from one process to the next. It leaves out
adapters, paths, placement, modes and counters that grow in a forward.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig

from loku.adapters import unwrapped

# Entries of a config that change no output in training: places, versions, and what a save or a trainer sets.
# The dtypes of the weights count with the weights.
_FREE_CONFIG_ENTRIES = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Attributes of modules that are no settings: modes, places, and lengths that grow in a forward.
_FREE_ATTRIBUTES = {"training", "gradient_checkpointing", "max_seq_len_cached", "name_or_path"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Hooks of these packages follow the settings of a run, or place and measure modules.
_OWN_PACKAGES = {"accelerate", "loku", "peft", "torch", "transformers"}


def function_name(function: Any) -> str:
    """The name of a function or class: the last part of its module's name, and its qualified name."""
    module = (getattr(function, "__module__", None) or "").rpartition(".")[2]
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def plain(value: Any) -> Any:
    """A value as JSON holds it, the same in every process.

    Args:
        value: None, a bool, number, text, path, dtype, device or enumeration member; a list, tuple, set,
            mapping or dataclass of such values; a class; or a function that a module defines.

    Returns:
        None, bools, numbers, texts, lists and dicts with text keys.

    Raises:
        TypeError: The value is or has something else, such as a lambda, whose content has no name.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in sorted((str(key), item) for key, item in value.items())}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=json.dumps)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, functools.partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    name = function_name(value) if callable(value) and hasattr(value, "__qualname__") else "<"
    if "<" in name:  # <lambda>, <locals>
        raise TypeError(f"a {type(value).__name__} has no form that another process can compare")
    return name


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a causal LM, by the names that they have in it without adapters.

    Args:
        model: The causal LM, with wrappers and adapters or without.

    Yields:
        The name and the module, each module once, in the order of ``named_modules``. A module that has an
        adapter stands in the place of its adapter layer.
    """
    seen: set[int] = set()

    def walk(name: str, module: Any) -> Iterator[tuple[str, nn.Module]]:
        while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer: Any = module
            module = layer.get_base_layer() if isinstance(module, BaseTunerLayer) else layer.original_module
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", unwrapped(model))


def _without_free_entries(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_free_entries(v) for k, v in value.items() if k not in _FREE_CONFIG_ENTRIES}
    return [_without_free_entries(item) for item in value] if isinstance(value, list) else value


def _attention(config: Any) -> Any:
    """The attention implementations of a config and of the configs in it."""
    parts = {name: _attention(c) for name, c in vars(config).items() if isinstance(c, PreTrainedConfig)}
    return [getattr(config, "_attn_implementation", None), parts]


def config_description(model: nn.Module) -> str:
    """The configs of a causal LM and of its modules, as JSON, without places and versions.

    Args:
        model: The causal LM, with wrappers and adapters or without.
    """
    found = {}
    for _, module in base_modules(model):
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                found[id(value)] = value
    texts = set()
    for config in found.values():
        entries = _described(_without_free_entries(config.to_dict()))
        texts.add(json.dumps([type(config).__name__, entries, _attention(config)], sort_keys=True))
    return json.dumps(sorted(texts))


def _described(value: Any) -> Any:
    """``plain``, or the name of the type of a value that has no plain form."""
    if isinstance(value, dict):
        return {str(key): _described(item) for key, item in value.items()}
    try:
        return plain(value)
    except TypeError:
        return function_name(type(value))


def _class_of(module: nn.Module) -> str:
    kind = type(module)
    if hasattr(module, "reshard") and len(kind.__bases__) > 1:  # FSDP2 gives a class of its own
        kind = kind.__bases__[1]
    return function_name(kind)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The public attributes of a module that are numbers, texts, dtypes, functions or sequences of them."""
    kinds = (numbers.Number, str, type(None), Enum, torch.dtype, tuple, list)
    return {
        name: _described(value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in _FREE_ATTRIBUTES
        and (isinstance(value, kinds) or callable(value))
        and not (name == "forward" and not _patched(module))
    }


def _patched(module: nn.Module) -> bool:
    """Whether someone put another ``forward`` on a module, other than accelerate (placement, autocast)."""
    attributes = vars(module)
    return "forward" in attributes and not attributes.keys() & {"_hf_hook", "_original_forward"}


def _global_hooks() -> list[Any]:
    """The hooks of all modules, by ``torch.nn.modules.module.register_module_forward_hook`` and its like."""
    return [hook for kind in _HOOKS for hook in getattr(nn.modules.module, f"_global{kind}").values()]


def _hooks(module: nn.Module) -> list[str]:
    """The names of the functions that are hooked to a module, without those of the libraries."""
    return _names_of_hooks([hook for kind in _HOOKS for hook in getattr(module, kind).values()])


def _names_of_hooks(hooks: list[Any]) -> list[str]:
    names = []
    for hook in hooks:
        function = hook.func if isinstance(hook, functools.partial) else hook
        package = (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]
        if package not in _OWN_PACKAGES:
            names.append(function_name(function))
    return names


def modules_description(model: nn.Module) -> str:
    """The name, class, settings and hooks of each module of a causal LM, as JSON.

    A setting is a public attribute of a module that is a number, a text, a dtype or a function. The content
    of a hook or a function cannot be compared; its name is.

    Args:
        model: The causal LM, with wrappers and adapters or without.
    """
    described = [
        [name, _class_of(module), _settings(module), _hooks(module)] for name, module in base_modules(model)
    ]
    return json.dumps([_names_of_hooks(_global_hooks()), described], sort_keys=True)


def without_description(model: nn.Module) -> str | None:
    """The first thing by which a model computes and whose content no description has.

    Args:
        model: The causal LM, with wrappers and adapters or without.

    Returns:
        Its name in a message: a hook, or a ``forward`` that was put on a module. None if there is none.
    """
    if hooks := _names_of_hooks(_global_hooks()):
        return f"all modules have the hook {hooks[0]}"
    for name, module in base_modules(model):
        where = name or "the model"
        if _patched(module):
            return f"{where} has a forward of its own"
        if hooks := _hooks(module):
            return f"{where} has the hook {hooks[0]}"
    return None

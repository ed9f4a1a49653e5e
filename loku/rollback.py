"""All or nothing: a model is as it was after an exception in a context.

The context keeps what costs next to nothing: every module object with its class, attributes, hooks and mode,
the flags of every parameter, and the contents of the configs. So adapters go, whatever injected them, and
hooks, patched forwards and changed settings go with them. Weights that were overwritten in place are put back
by whoever overwrote them.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from loku.distributed import is_sharded

_CONFIGS = (PreTrainedConfig, GenerationConfig)
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def _configs(modules: list[nn.Module]) -> list[Any]:
    """The configs of modules and the configs inside them, each once."""
    found: dict[int, Any] = {}
    waiting = [value for module in modules for value in vars(module).values() if isinstance(value, _CONFIGS)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting.extend(value for value in vars(config).values() if isinstance(value, _CONFIGS))
    return list(found.values())


def _copied(value: Any) -> Any:
    if isinstance(value, _CONFIGS):
        return value  # it has a copy of its own, and stays the same object
    try:
        return copy.deepcopy(value)
    except Exception:  # an object of the user that cannot be copied
        return value


def _refill(container: Any, content: Any) -> None:
    """Give a container its earlier content in place: handles of hooks refer to the container itself."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


class _Module:
    """The class, the attributes and the flags of a module."""

    def __init__(self, module: nn.Module, keep_weights: bool) -> None:
        self.module, self.kind, self.training = module, type(module), module.training
        # Parameters are referred to weakly: FSDP2 replaces them, and must be able to free them.
        self.parameters = {
            name: None if parameter is None else _Parameter(parameter, keep_weights)
            for name, parameter in module._parameters.items()
        }
        self.attributes = dict(vars(module))
        self.contents = {
            name: value.copy()
            for name, value in self.attributes.items()
            if name != "_parameters" and type(value) in _CONTAINERS
        }

    def restore_(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        current = vars(self.module)
        for name in current.keys() - self.attributes.keys():
            del current[name]
        current.update(self.attributes)
        for name, content in self.contents.items():
            _refill(current[name], content)
        parameters = {
            name: None if kept is None else kept.restored() for name, kept in self.parameters.items()
        }
        for name, kept in self.parameters.items():
            if kept is not None and parameters[name] is None:  # gone: the model holds another in its place
                parameters[name] = self.module._parameters.get(name)
        self.module._parameters.clear()
        self.module._parameters.update(parameters)

    def restore_flags_(self) -> None:
        self.module.training = self.training
        for name, kept in self.parameters.items():
            parameter = self.module._parameters.get(name)
            if kept is not None and parameter is not None:
                parameter.requires_grad_(kept.requires_grad)


class _Parameter:
    """The flags of a parameter and, if weights are kept, a copy of its values."""

    def __init__(self, parameter: nn.Parameter, keep_weights: bool) -> None:
        self.reference = weakref.ref(parameter)
        self.requires_grad, self.device = parameter.requires_grad, parameter.device
        self.had_grad = parameter.grad is not None
        self.copy = parameter.detach().to("cpu", copy=True) if keep_weights else None

    def restored(self) -> nn.Parameter | None:
        parameter = self.reference()
        if parameter is None:
            return None
        if parameter.device != self.device and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(self.device)
        if self.copy is not None:
            with torch.no_grad():
                parameter.copy_(self.copy)
        parameter.requires_grad_(self.requires_grad)
        if not self.had_grad:
            parameter.grad = None
        return parameter


def _sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


@contextmanager
def all_or_nothing(model: nn.Module, *, keep_weights: bool = False) -> Iterator[None]:
    """A context after which a model is as before, if the block raises any exception.

    These are put back: every module under its name, its class, attributes, hooks, buffers and mode; the
    parameter objects, their ``requires_grad`` and device, and no ``grad`` where there was none; the contents
    of ``config`` and ``generation_config``.

    A model that FSDP2 has sharded meanwhile stays sharded. Then flags, modes and configs are put back.

    Args:
        model: The model.
        keep_weights: Whether to copy every weight into CPU memory and put the values back. False (default)
            leaves weights that were overwritten to whoever overwrote them.
    """
    modules = list(model.modules())
    kept = [_Module(module, keep_weights) for module in modules]
    configs = [
        (config, {name: _copied(value) for name, value in vars(config).items()})
        for config in _configs(modules)
    ]
    try:
        yield
    except BaseException:
        sharded = _sharded(model)
        for module in kept:
            if sharded:
                module.restore_flags_()
            else:
                module.restore_()
        for config, content in configs:
            vars(config).clear()
            vars(config).update(content)
        raise

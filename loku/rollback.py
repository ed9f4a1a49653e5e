"""A model is as it was: all of it after an exception, and after success what a run changed for its own sake.

``all_or_nothing`` owns the changes that a call makes to a given model. It keeps what costs next to nothing:
every module object with its class, attributes, hooks and mode, the flags of every parameter, and the contents
of the configs. So adapters go, whatever injected them, and hooks, patched forwards and changed settings go
with them. Weights that were overwritten in place are put back by whoever overwrote them, who registers that
with the context. No signal interrupts the restoring (``loku.interrupts``).

``settings_kept`` puts back the modes, the configs, gradient checkpointing and the wrapper of autocast after
success, too.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from loku.distributed import is_sharded
from loku.interrupts import raise_waiting, uninterrupted_context

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


class _Configs:
    """The contents of the configs of modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.contents = [
            (config, {name: _copied(value) for name, value in vars(config).items()})
            for config in _configs(modules)
        ]

    def restore_(self) -> None:
        for config, content in self.contents:
            vars(config).clear()
            vars(config).update(content)


class _Given:
    """A model as it was given."""

    def __init__(self, model: nn.Module, keep_weights: bool) -> None:
        modules = list(model.modules())
        self.model, self.configs = model, _Configs(modules)
        self.modules = [_Module(module, keep_weights) for module in modules]

    def restore_(self) -> None:
        sharded = _sharded(self.model)
        with ExitStack() as stack:  # a module that cannot be restored does not keep the others from it
            stack.callback(self.configs.restore_)
            for module in self.modules:
                stack.callback(module.restore_flags_ if sharded else module.restore_)


def all_or_nothing(
    model: nn.Module, *, keep_weights: bool = False
) -> AbstractContextManager[ExitStack[bool | None]]:
    """A context after which a model is as before, if the block raises any exception.

    These are put back: every module under its name, its class, attributes, hooks, buffers and mode; the
    parameter objects, their ``requires_grad`` and device, and no ``grad`` where there was none; the contents
    of ``config`` and ``generation_config``.

    A model that FSDP2 has sharded meanwhile stays sharded. Then flags, modes and configs are put back.

    The context yields an ``ExitStack``. Its callbacks run after an exception alone, in reverse order and
    before the model is put back. A block registers there what the context does not put back by itself,
    before it makes the change.

    Args:
        model: The model.
        keep_weights: Whether to copy every weight into CPU memory and put the values back. False (default)
            leaves weights that were overwritten to whoever overwrote them.
    """
    given = _Given(model, keep_weights)  # outside of the context: copies of weights take long
    return _undone_on_failure(given)


@uninterrupted_context
def _undone_on_failure(given: _Given) -> Iterator[ExitStack[bool | None]]:
    with ExitStack() as undo:
        undo.callback(given.restore_)
        yield undo
        raise_waiting()
        undo.pop_all()


# What a training run of transformers and accelerate sets in a module: gradient checkpointing, its hook at the
# embeddings, the forward inside autocast, and marks. One mark keeps accelerate from preparing a model again.
_RUN_ATTRIBUTES = (
    "forward",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_is_accelerate_prepared",
    "_is_torch_compile",
    "_original_forward",
    "_require_grads_hook",
    "_require_grads_hooks",
)
_HOOKS = "_require_grads_hooks"


class _Settings:
    """The modes, configs and run attributes of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.model, self.configs = model, _Configs(modules)
        self.modes = {module: module.training for module in modules}
        self.attributes = {module: self._attributes(module) for module in modules}

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, Any]:
        return {name: vars(module)[name] for name in _RUN_ATTRIBUTES if name in vars(module)}

    def restore_(self) -> None:
        sharded = _sharded(self.model)  # FSDP2 and accelerate go on from what they have prepared
        for module, attributes in self.attributes.items():
            if sharded:
                continue
            kept = [handle.id for handle in attributes.get(_HOOKS, [])]
            for handle in vars(module).get(_HOOKS, []):
                if handle.id not in kept:
                    handle.remove()
            for name in self._attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for module, training in self.modes.items():
            module.training = training
        self.configs.restore_()


def settings_kept(model: nn.Module) -> AbstractContextManager[None]:
    """A context after which the settings of a model are as before, whether the block fails or not.

    These are the mode of each module, the contents of the configs, gradient checkpointing, and the forward
    that accelerate has wrapped for ``bf16`` and ``fp16``. A model that FSDP2 has sharded keeps the forward
    and gradient checkpointing of its training.

    Args:
        model: The model.
    """
    return _restored(_Settings(model))


@uninterrupted_context
def _restored(settings: _Settings) -> Iterator[None]:
    try:
        yield
    finally:
        settings.restore_()


def inherit_modes_(model: nn.Module, modes: Mapping[nn.Module, bool], inherited: bool) -> None:
    """Put modules that were added to a model into the mode of what they wrap, else of what they are in.

    Args:
        model: The model with the added modules.
        modes: The modes of the modules that were there before.
        inherited: The mode for modules that neither wrap nor are in a module of ``modes``.
    """
    wrapped = model
    while wrapped not in modes and isinstance(getattr(wrapped, "base_layer", None), nn.Module):
        wrapped = wrapped.base_layer  # type: ignore[assignment]  # as the line above says
    model.training = modes.get(wrapped, inherited)
    for module in model.children():
        inherit_modes_(module, modes, model.training)

"""The layers of a causal LM's text decoder, by their numbers or by their names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from loku.text_decoder import text_modules


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the text decoder, in their order, by their names in the model.

    They are the numbered modules of the one list that has ``num_hidden_layers`` of them.

    Args:
        model: The causal LM, without the wrappers of DDP and peft.

    Raises:
        ValueError: There is no such list, or more than one.
    """
    lists: dict[str, dict[str, nn.Module]] = {}
    for name, module in text_modules(model).items():
        parent, _, last = name.rpartition(".")
        if last.isdecimal() and not any(part.isdecimal() for part in parent.split(".")):
            lists.setdefault(parent, {})[name] = module
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    fitting = [layers for layers in lists.values() if len(layers) == count]
    if len(fitting) != 1:
        found = ", ".join(f"{len(layers)} under {parent!r}" for parent, layers in lists.items()) or "none"
        raise ValueError(
            f"the layers of {type(model).__name__} cannot be numbered: its config has "
            f"num_hidden_layers={count}, and its numbered modules are {found}. Name the layer by a regular "
            r'expression of module names, such as "model\.layers\.7"'
        )
    return fitting[0]


def find_layer(model: nn.Module, layer: int | str) -> nn.Module:
    """Find the module whose output counts as a layer's activations.

    Args:
        model: The causal LM, without the wrappers of DDP and peft.
        layer: The number of a decoder layer, from 0, or a regular expression that matches the whole name of
            one module.

    Raises:
        ValueError: The number is that of no layer, or the expression matches no module or several.
    """
    if isinstance(layer, str):
        matching = [name for name, _ in model.named_modules() if re.fullmatch(layer, name)]
        if len(matching) != 1:
            found = f"{len(matching)} modules, the first of them {matching[0]!r}" if matching else "no module"
            raise ValueError(
                f"the layer {layer!r} must match one module of {type(model).__name__}, it matches {found}"
            )
        return model.get_submodule(matching[0])
    layers = list(decoder_layers(model).values())
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"there is no layer {layer}: {type(model).__name__} has the layers 0 to {len(layers) - 1}"
        )
    return layers[layer]

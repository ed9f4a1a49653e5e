"""What a model is: the facts that a failure must leave as they were."""

import copy

from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _plain_attributes(module):
    return {name: value for name, value in vars(module).items() if not isinstance(value, nn.Module)}


def facts(model):
    """The facts of a model by their names, with the weights copied."""
    modules = dict(model.named_modules())
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "mode": {name: module.training for name, module in modules.items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation config": copy.deepcopy(model.generation_config.to_dict()),
        "hooks": {
            (name, kind): list(vars(module).get(kind, {}).items())
            for name, module in modules.items()
            for kind in HOOKS
        },
        "gradient checkpointing": {
            name: module.gradient_checkpointing
            for name, module in modules.items()
            if hasattr(module, "gradient_checkpointing")
        },
        "modules and classes": {name: (id(module), type(module)) for name, module in modules.items()},
        "attributes": {name: sorted(_plain_attributes(module)) for name, module in modules.items()},
        "gradients": {name: p.grad is not None for name, p in model.named_parameters()},
    }


def same_facts(before, after):
    """Whether each fact is as before, by its name."""
    same = {name: before[name] == after[name] for name in before if name != "weights"}
    weights = before["weights"].keys() == after["weights"].keys() and all(
        before["weights"][name].equal(after["weights"][name]) for name in before["weights"]
    )
    return {"weights": weights, **same}

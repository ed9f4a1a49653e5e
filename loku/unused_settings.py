"""Settings without effect are refused: who gives one expects an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loku.objectives import Objective
from loku.objectives.retain_weight import RetainWeight

if TYPE_CHECKING:
    from loku.config import UnlearnConfig

# Without FILA no row scales are measured. The memory of measuring and its cache may stay, because they never
# change a result.
_FISHER = ("fisher_damping", "fisher_damping_mode", "fisher_samples")
_UNUSED_BY_INIT = {"default": (*_FISHER, "fila_balance"), "pissa": _FISHER}


def refuse_unused_settings(config: UnlearnConfig, objective: Objective) -> None:
    """Refuse settings that a run has no use for.

    A setting counts as given by ``is_given``. ``tuning="full"`` ignores the settings of
    adapters, as trainers do, so that one set of settings serves both.

    Args:
        config: The settings.
        objective: The method with its arguments.

    Raises:
        ValueError: The message names the setting, and what makes it useless.
    """
    method = f"method {config.method!r}"
    if objective.retain is None and is_given(config, "retain_weight"):
        raise ValueError(
            f"retain_weight={config.retain_weight!r} has no effect with {method}, which has no retain loss: "
            "leave it out"
        )
    if "retain" not in objective.kinds and is_given(config, "retain_sampling"):
        raise ValueError(
            f"retain_sampling={config.retain_sampling!r} draws retain rows, and {method} runs none: leave it "
            "out"
        )
    over_tokens = objective.forget_over == "tokens" and objective.retain_over == "tokens"
    if config.loss_mean == "joint" and (objective.retain is None or not over_tokens):
        raise ValueError(
            'loss_mean="joint" is one mean over the labelled tokens of two losses, and those of '
            f"{method} are no two means over tokens: leave it out"
        )
    stays = objective.retain_weight is RetainWeight  # another kind may grow from 0
    if config.forget_weight == 0 and (objective.retain is None or (config.retain_weight == 0 and stays)):
        raise ValueError("forget_weight=0 leaves no loss to train by: give it or retain_weight another value")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if config.load_best_model_at_end and not evaluates:
        raise ValueError(
            'load_best_model_at_end=True chooses among evaluations, and eval_strategy="no" makes none: set '
            "eval_strategy and save_strategy, or leave it out"
        )
    if config.tuning == "full":
        return
    for name in _UNUSED_BY_INIT.get(config.init, ()):
        if is_given(config, name):
            raise ValueError(
                f'{name}={getattr(config, name)!r} has no effect with init="{config.init}", which measures '
                'no row scales: leave it out, or use init="fila"'
            )
    if config.init == "pissa" and config.fila_balance == "paper":
        raise ValueError(
            'fila_balance="paper" has no effect with init="pissa", which measures no row scales: leave it '
            "out, or give a number"
        )


def is_given(config: UnlearnConfig, name: str) -> bool:
    """Whether a setting is none of the defaults of the class and of those that it derives from."""
    classes = [cls for cls in type(config).__mro__ if name in vars(cls)]
    return all(getattr(config, name) != vars(cls)[name] for cls in classes)

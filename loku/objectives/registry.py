"""``OBJECTIVES``, the methods by their names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loku.objectives.arguments import Argument
from loku.objectives.losses import (
    dpo_loss,
    gradient_ascent_loss,
    inverted_hinge_loss,
    npo_loss,
    refusal_loss,
    retain_divergence,
)
from loku.objectives.objective import Objective
from loku.objectives.quantities import Divergence, OriginalLogProbability
from loku.objectives.rmu import RMU
from loku.objectives.undial import LoweredDivergence, undial_loss

_ORIGINAL = (OriginalLogProbability(),)
_DIVERGENCE_OVER = {
    "divergence_over": Argument.choice(
        "label",
        'The positions of the KL divergence: those that predict a "label", or those of all "tokens".',
        ("label", "tokens"),
    )
}


def _over_positions(objective: Objective, values: Mapping[str, Any]) -> Objective:
    """Give the divergence of the retain loss the positions ``divergence_over``."""
    over = {"retain": (Divergence(values["divergence_over"]),)}
    return replace(objective, quantities={**objective.quantities, **over})


_DIVERGENCE: dict[str, Any] = {
    "retain": retain_divergence,
    "retain_over": "divergence",
    "arguments": _DIVERGENCE_OVER,
    "configure": _over_positions,
}


def _lowered_by_beta(objective: Objective, values: Mapping[str, Any]) -> Objective:
    return replace(objective, quantities={"forget": (LoweredDivergence(values["beta"]),)})


OBJECTIVES: dict[str, Objective] = {
    "ihl": Objective(
        inverted_hinge_loss, summary="Inverted Hinge Loss; LM loss on retain rows (Cha et al., 2025)"
    ),
    "ga": Objective(
        gradient_ascent_loss, retain=None, summary="gradient ascent, no retain loss (Jang et al., 2023)"
    ),
    "gd": Objective(
        gradient_ascent_loss, summary="gradient ascent; LM loss on retain rows (Liu et al., 2022)"
    ),
    "kl": Objective(
        gradient_ascent_loss,
        quantities={"retain": (Divergence(),)},
        summary="gradient ascent; KL from the original on retain rows (Maini et al., 2024)",
        **_DIVERGENCE,
    ),
    "dpo": Objective(
        dpo_loss,
        rows=("forget", "refusal"),
        quantities={"forget": _ORIGINAL, "refusal": _ORIGINAL},
        forget_over="rows",
        beta=0.1,
        summary="refusals preferred to the true answers; LM loss on retain rows (Rafailov et al., 2023)",
    ),
    "npo": Objective(
        npo_loss,
        quantities={"forget": _ORIGINAL},
        forget_over="rows",
        beta=0.1,
        summary="negative preference optimisation; LM loss on retain rows (Zhang et al., 2024)",
    ),
    "idk": Objective(
        refusal_loss,
        rows=("refusal",),
        summary="LM loss of refusals; LM loss on retain rows (Maini et al., 2024)",
    ),
    "undial": Objective(
        undial_loss,
        quantities={"forget": (LoweredDivergence(),)},
        beta=10.0,
        configure=_lowered_by_beta,
        summary="KL from the original with lowered labels; LM loss on retain rows (Dong et al., 2025)",
    ),
    "rmu": RMU,
}


def described_methods() -> str:
    """Return one line about each method: its name, its losses, its beta and its arguments."""
    lines = []
    for name, objective in OBJECTIVES.items():
        settings = [] if objective.beta is None else [f"beta {objective.beta:g}"]
        settings += [f"{key} {argument.default}" for key, argument in objective.arguments.items()]
        shown = f" [{', '.join(settings)}]" if settings else ""
        lines.append(f"  {name:<8} {objective.summary}{shown}")
    return "\n".join(lines)

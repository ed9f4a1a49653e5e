"""``OBJECTIVES``, the methods by their names."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from loku.objectives.arguments import Argument
from loku.objectives.losses import (
    after_first,
    altpo_loss,
    ceu_loss,
    dpo_loss,
    forget_divergence,
    gradient_ascent_loss,
    inverted_hinge_loss,
    npo_loss,
    refusal_loss,
    retain_divergence,
    satimp_loss,
    simnpo_loss,
    tnpo_loss,
    wga_loss,
)
from loku.objectives.objective import Objective
from loku.objectives.pdu import PDU
from loku.objectives.quantities import Divergence, OriginalLogProbability
from loku.objectives.rmu import RMU
from loku.objectives.undial import LoweredDivergence, undial_loss

_ORIGINAL = (OriginalLogProbability(),)
_DIVERGENCE_OVER = Argument.choice(
    "label",
    'The positions of the KL divergence: those that predict a "label", or those of all "tokens".',
    ("label", "tokens"),
)


def with_divergence(objective: Objective, kind: str = "retain", **changes: Any) -> Objective:
    """Return a method with KL(original || model) in the place of its retain loss.

    Args:
        objective: The method. It gets the argument ``divergence_over``.
        kind: The rows of the divergence, "retain" (default) or "forget".
        changes: Other fields of ``Objective``, such as its ``summary``.
    """
    inner = objective.configure

    def configured(given: Objective, values: Mapping[str, Any]) -> Objective:
        given = given if inner is None else inner(given, values)
        others = tuple(q for q in given.quantities.get(kind, ()) if not isinstance(q, Divergence))
        found = (*others, Divergence(values["divergence_over"]))
        return replace(given, quantities={**given.quantities, kind: found})

    # A loss that is a mean over a quantity's positions needs the quantity, before it is configured too.
    quantities = {**objective.quantities, kind: (*objective.quantities.get(kind, ()), Divergence())}
    return replace(
        objective,
        retain=retain_divergence if kind == "retain" else forget_divergence,
        retain_on=kind,
        retain_over="divergence",
        quantities=quantities,
        arguments={**objective.arguments, "divergence_over": _DIVERGENCE_OVER},
        configure=configured,
        **changes,
    )


_ASCENT = Objective(
    gradient_ascent_loss, summary="gradient ascent; LM loss on retain rows (Liu et al., 2022)"
)
_DPO = Objective(
    dpo_loss,
    rows=("forget", "refusal"),
    quantities={"forget": _ORIGINAL, "refusal": _ORIGINAL},
    forget_over="rows",
    beta=0.1,
    summary="refusals preferred to the true answers; LM loss on retain rows (Rafailov et al., 2023)",
)
_NPO = Objective(
    npo_loss,
    quantities={"forget": _ORIGINAL},
    forget_over="rows",
    beta=0.1,
    summary="negative preference optimisation; LM loss on retain rows (Zhang et al., 2024)",
)
_FIRST = "ignore_first_n_answer_tokens"


def _without_first(objective: Objective, values: Mapping[str, Any]) -> Objective:
    """Let CE-U be a mean over the counted tokens but the first of each row."""
    return replace(objective, forget_over=partial(after_first, number=values[_FIRST]))


def _lowered_by_beta(objective: Objective, values: Mapping[str, Any]) -> Objective:
    return replace(objective, quantities={"forget": (LoweredDivergence(values["beta"]),)})


OBJECTIVES: dict[str, Objective] = {
    "ihl": Objective(
        inverted_hinge_loss, summary="Inverted Hinge Loss; LM loss on retain rows (Cha et al., 2025)"
    ),
    "ga": Objective(
        gradient_ascent_loss, retain=None, summary="gradient ascent, no retain loss (Jang et al., 2023)"
    ),
    "gd": _ASCENT,
    "kl": with_divergence(
        _ASCENT, summary="gradient ascent; KL from the original on retain rows (Maini et al., 2024)"
    ),
    "ga_kl": with_divergence(
        _ASCENT, "forget", summary="gradient ascent; KL from the original on forget rows (Zhang et al., 2024)"
    ),
    "dpo": _DPO,
    "dpo_kl": with_divergence(
        _DPO,
        summary="refusals preferred to the true answers; KL from the original on retain rows "
        "(Zhang et al., 2024)",
    ),
    "altpo": replace(
        _DPO,
        forget=altpo_loss,
        alternates=True,
        summary="alternates preferred to the true answers; LM loss on retain rows (Mekala et al., 2025)",
    ),
    "npo": _NPO,
    "npo_kl": with_divergence(
        _NPO,
        summary="negative preference optimisation; KL from the original on retain rows (Zhang et al., 2024)",
    ),
    "simnpo": Objective(
        simnpo_loss,
        forget_over="rows",
        beta=4.5,
        arguments={"delta": Argument.number(0.0, "The margin of the mean negative log-likelihood, in nats.")},
        summary="NPO of mean log-likelihoods without the original; LM loss on retain rows (Fan et al., 2024)",
    ),
    "wga": Objective(
        wga_loss,
        beta=1.0,
        summary="gradient ascent weighted by p^beta; LM loss on retain rows (Wang et al., 2025)",
    ),
    "satimp": Objective(
        satimp_loss,
        arguments={
            "beta1": Argument.number(5.0, "The power of p in the weight.", 0.0),
            "beta2": Argument.number(1.0, "The power of 1 - p in the weight.", 0.0),
        },
        summary="gradient ascent weighted by p^beta1 (1 - p)^beta2; LM loss on retain rows "
        "(Yang et al., 2025)",
    ),
    "tnpo": Objective(
        tnpo_loss,
        quantities={"forget": _ORIGINAL},
        beta=4.0,
        arguments={
            "epsilon": Argument.number(0.0, "A number in the denominator of the weight, beside p^beta.", 0.0)
        },
        summary="NPO of each token; LM loss on retain rows (Wang et al., 2025)",
    ),
    "ceu": Objective(
        ceu_loss,
        retain=None,
        arguments={
            _FIRST: Argument.count(1, "The number of answer tokens of each row that do not count, its first.")
        },
        configure=_without_first,
        summary="cross entropy with the distribution without the token, no retain loss (Yang, 2025)",
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
    "pdu": PDU,
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

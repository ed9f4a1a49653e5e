"""Methods: losses, the quantities that they need, and ``OBJECTIVES``, the registry.

A loss takes a ``Batch`` and returns a scalar. A method is an ``Objective``: a loss to forget, a loss to
retain, and the rows and quantities that they need. A new method is a function and a line::

    OBJECTIVES["mine"] = Objective(my_loss)

``UnlearnConfig(method="mine")`` then minimises ``my_loss(batch)`` + retain_weight x LM loss. A loss that is a
mean over rows instead of tokens says so: ``Objective(my_loss, forget_over="rows")``.
"""

from loku.objectives.arguments import Argument, resolved
from loku.objectives.losses import (
    after_first,
    altpo_loss,
    answer_probability,
    ceu_loss,
    dpo_loss,
    forget_divergence,
    gradient_ascent_loss,
    inverted_hinge_loss,
    lm_loss,
    npo_loss,
    refusal_loss,
    retain_divergence,
    retain_loss,
    satimp_loss,
    simnpo_loss,
    tnpo_loss,
    wga_loss,
)
from loku.objectives.objective import Objective
from loku.objectives.pdu import DualRetainWeight, MeanLogit, pdu_loss
from loku.objectives.quantities import At, Divergence, OriginalLogProbability, Quantity
from loku.objectives.registry import OBJECTIVES, described_methods, with_divergence
from loku.objectives.retain_weight import RetainWeight
from loku.objectives.rmu import (
    ActivationChange,
    SteeringDistance,
    retained_activations_loss,
    rmu_loss,
    steering_vector,
)
from loku.objectives.rows import Batch, Rows
from loku.objectives.undial import LoweredDivergence, undial_loss
from loku_kernels import cross_entropy, inverted_hinge, reduce_loss  # for losses of others

__all__ = [
    "OBJECTIVES",
    "ActivationChange",
    "Argument",
    "At",
    "Batch",
    "Divergence",
    "DualRetainWeight",
    "LoweredDivergence",
    "MeanLogit",
    "Objective",
    "OriginalLogProbability",
    "Quantity",
    "RetainWeight",
    "Rows",
    "SteeringDistance",
    "after_first",
    "altpo_loss",
    "answer_probability",
    "ceu_loss",
    "cross_entropy",
    "described_methods",
    "dpo_loss",
    "forget_divergence",
    "gradient_ascent_loss",
    "inverted_hinge",
    "inverted_hinge_loss",
    "lm_loss",
    "npo_loss",
    "pdu_loss",
    "reduce_loss",
    "refusal_loss",
    "resolved",
    "retain_divergence",
    "retain_loss",
    "retained_activations_loss",
    "rmu_loss",
    "satimp_loss",
    "simnpo_loss",
    "steering_vector",
    "tnpo_loss",
    "undial_loss",
    "wga_loss",
    "with_divergence",
]

"""Methods: losses, the quantities that they need, and ``OBJECTIVES``, the registry.

A loss takes a ``Batch`` and returns a scalar. A method is an ``Objective``: a loss to forget, a loss to
retain, and the rows and quantities that they need. A new method is a function and a line::

    OBJECTIVES["mine"] = Objective(my_loss)

``UnlearnConfig(method="mine")`` then minimises ``my_loss(batch)`` + retain_weight x LM loss. A loss that is a
mean over rows instead of tokens says so: ``Objective(my_loss, forget_over="rows")``.
"""

from loku.objectives.arguments import Argument, resolved
from loku.objectives.losses import (
    answer_probability,
    dpo_loss,
    gradient_ascent_loss,
    inverted_hinge_loss,
    lm_loss,
    npo_loss,
    refusal_loss,
    retain_divergence,
    retain_loss,
)
from loku.objectives.objective import Objective
from loku.objectives.quantities import At, Divergence, OriginalLogProbability, Quantity
from loku.objectives.registry import OBJECTIVES, described_methods
from loku.objectives.rows import Batch, Rows
from loku_kernels import inverted_hinge  # for losses of others, from where it always was

__all__ = [
    "OBJECTIVES",
    "Argument",
    "At",
    "Batch",
    "Divergence",
    "Objective",
    "OriginalLogProbability",
    "Quantity",
    "Rows",
    "answer_probability",
    "described_methods",
    "dpo_loss",
    "gradient_ascent_loss",
    "inverted_hinge",
    "inverted_hinge_loss",
    "lm_loss",
    "npo_loss",
    "refusal_loss",
    "resolved",
    "retain_divergence",
    "retain_loss",
]

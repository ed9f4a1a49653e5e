"""UNDIAL: the model learns the original's distribution with the logit of the label lowered."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loku.objectives.quantities import At, Quantity, divergence_from
from loku.objectives.rows import Batch
from loku_kernels import reduce_loss


@dataclass(frozen=True)
class LoweredDivergence(Quantity):
    """KL(lowered original || model), in nats, of the prediction of each label.

    The lowered original has the softmax of the original model's logits after ``lowering`` is subtracted from
    that of the label.

    Args:
        lowering: The number that is subtracted, in nats.
    """

    name: ClassVar[str] = "lowered_divergence"
    compares: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True

    lowering: float = 10.0

    def of_original(self, at: At) -> Tensor:
        """The last hidden states (n, D)."""
        return at.hidden

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The divergences (n,)."""
        assert original is not None
        return divergence_from(original, at, self.lowering)


def undial_loss(batch: Batch) -> Tensor:
    """UNDIAL: the mean over the forget tokens of KL(lowered original || model), in nats (Dong et al., 2025).

    beta is the lowering. UNDIAL's cross entropy is this and the entropy of the lowered original, which has no
    gradient. So this loss is 0 at its target.
    """
    rows, name = batch.forget, LoweredDivergence.name
    return reduce_loss(rows.values[name], rows.positions[name], "mean")

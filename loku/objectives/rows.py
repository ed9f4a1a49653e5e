"""What a loss gets: the rows of a batch as the model predicts them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loku_kernels import cross_entropy


@dataclass(frozen=True)
class Rows:
    """The rows of one kind in a batch, as the model predicts them.

    Args:
        triplet: The softmax triplets (B, T, 3), float64, of ``loku.head.token_triplets``.
        counted: The mask (B, T), bool, of the positions that predict a label.
        values: The quantities (B, T), float64, that the method asks for, by ``Quantity.name``; 0 at other
            positions than theirs. None by default.
        positions: The mask (B, T), bool, of the positions of each quantity, by the same names.
    """

    triplet: Tensor
    counted: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Mapping[str, Tensor] = field(default_factory=dict)

    def token_log_probability(self) -> Tensor:
        """Log-probability (B, T), in nats, of each counted token; 0 at other positions."""
        return -cross_entropy(self.triplet).where(self.counted, 0.0)

    def log_probability(self) -> Tensor:
        """Log-probability (B,), in nats, of each row: the sum over its counted tokens, not the mean."""
        return -cross_entropy(self.triplet).where(self.counted, 0.0).sum(1)

    def labelled(self) -> Tensor:
        """The mask (B,), bool, of the rows with a counted token. Rows that only fill up a batch have none."""
        return self.counted.any(1)

    def log_ratio(self) -> Tensor:
        """log(pi / ref) (B,), in nats, of each row's probabilities under the model and the original model.

        The method must ask for ``OriginalLogProbability``.
        """
        return self.log_probability() - self.values["original_log_probability"].sum(1)


@dataclass(frozen=True)
class Batch:
    """The rows of one batch. A kind of rows is None if the method does not ask for it.

    Args:
        forget: The rows of the forget set with their true answers.
        refusal: The same rows, in the same order, with refusals for answers.
        retain: The rows of the retain set.
        beta: The ``UnlearnConfig.beta`` of the method, or ``Objective.beta``; 0.1 by default.
        arguments: The other arguments of the method, by their names in ``Objective.arguments``; none by
            default.
    """

    # An Objective gives its losses every kind that it asks for. So the types leave None out.
    forget: Rows = None  # type: ignore[assignment]
    refusal: Rows = None  # type: ignore[assignment]
    retain: Rows = None  # type: ignore[assignment]
    beta: float = 0.1
    arguments: Mapping[str, Any] = field(default_factory=dict)

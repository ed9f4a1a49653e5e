"""The factor of the retain loss in a run."""

from torch import Tensor
from transformers import TrainerCallback


class RetainWeight(TrainerCallback):
    """A factor that stays as it is. A subclass changes ``value`` between two steps, in all processes alike.

    Args:
        value: The factor, ``UnlearnConfig.retain_weight``.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def add(self, part: Tensor) -> None:
        """Take the part of a step's retain loss that a micro-batch of this process has.

        Args:
            part: A 0-dimensional tensor. The parts of all micro-batches and processes add up to the loss.
        """

    def logged(self) -> dict[str, float]:
        """The entries of the log; none for a factor that stays."""
        return {}

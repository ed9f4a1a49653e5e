"""RMU: the activations of a layer are steered to a random vector on forget rows, and kept on retain rows.

Both losses are means over rows of means over the labelled tokens of a row, of mean squared differences of the
activations at these tokens. The layers after the steered one take no part, so their adapters do not change.
"""

import functools
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loku.data.tokens import IGNORE_INDEX
from loku.decoder_layers import find_layer
from loku.objectives.arguments import Argument
from loku.objectives.objective import Objective
from loku.objectives.quantities import At, Quantity
from loku.objectives.rows import Batch, Rows
from loku_kernels import reduce_loss


@functools.cache
def steering_vector(size: int, seed: int) -> Tensor:
    """Return a random vector (size,), float32, of norm 1, whose entries are not negative.

    Args:
        size: The number of entries.
        seed: The seed of the generator, >= 0. The vector follows from both numbers alone.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
    return vector / vector.norm()


def _mean_squares(difference: Tensor) -> Tensor:
    """Compute the mean squares (n,) of differences (n, D)."""
    return difference.square().mean(-1)


def _wide(output: Tensor | None) -> Tensor:
    """Return the activations (n, D) in float32, or in float64 if they are."""
    assert output is not None  # both quantities have a module
    return output.to(torch.promote_types(output.dtype, torch.float32))


@dataclass(frozen=True)
class _OfActivations(Quantity):
    """A number for each labelled token, from the activations of a layer at the token itself.

    Args:
        layer: The layer, as for ``loku.decoder_layers.find_layer``.
    """

    layer: int | str = 7

    def positions(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mask (B, T), bool, of the labelled tokens."""
        return labels != IGNORE_INDEX

    def module(self, model: nn.Module) -> nn.Module:
        """The layer."""
        try:
            return find_layer(model, self.layer)
        except ValueError as error:
            raise ValueError(f'{error}. Choose one by method_args={{"layer": ...}}') from None


@dataclass(frozen=True)
class SteeringDistance(_OfActivations):
    """The mean squared difference of the activations from the steering vector.

    Args:
        layer: The layer.
        coefficient: The norm of the steering vector.
        seed: The seed of its direction.
    """

    name: ClassVar[str] = "steering_distance"

    coefficient: float = 2.0
    seed: int = 0

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The mean squares (n,)."""
        activations = _wide(at.output)
        vector = steering_vector(activations.shape[-1], self.seed).to(activations)
        return _mean_squares(activations - self.coefficient * vector)


@dataclass(frozen=True)
class ActivationChange(_OfActivations):
    """The mean squared difference of the activations from those of the original model.

    Args:
        layer: The layer.
    """

    name: ClassVar[str] = "activation_change"
    compares: ClassVar[bool] = True

    def of_original(self, at: At) -> Tensor:
        """The activations (n, D)."""
        assert at.output is not None
        return at.output

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The mean squares (n,)."""
        assert original is not None
        activations = _wide(at.output)
        return _mean_squares(activations - original.to(activations.dtype))


def _mean_of_row_means(quantity: str, rows: Rows) -> Tensor:
    """Compute the mean over labelled rows of the quantity's mean over their positions."""
    means = rows.values[quantity].sum(1) / rows.positions[quantity].sum(1).clamp(min=1)
    return reduce_loss(means, rows.labelled(), "mean")


def rmu_loss(batch: Batch) -> Tensor:
    """RMU: the mean squared difference of forget activations from c u (Li et al., WMDP, ICML 2024).

    u is a random vector of norm 1, and c the steering coefficient. The mean is over the labelled tokens of a
    row, then over rows.
    """
    return _mean_of_row_means(SteeringDistance.name, batch.forget)


def retained_activations_loss(batch: Batch) -> Tensor:
    """RMU's retain loss: the mean squared difference of retain activations from the original model's.

    The means are those of ``rmu_loss``.
    """
    return _mean_of_row_means(ActivationChange.name, batch.retain)


def _is_layer(value: Any) -> bool:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error:
            return False
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _with_layer(objective: Objective, values: Mapping[str, Any]) -> Objective:
    """Give the quantities the layer and the steering vector."""
    steering = SteeringDistance(values["layer"], values["steering_coeff"], values["steering_seed"])
    return replace(
        objective, quantities={"forget": (steering,), "retain": (ActivationChange(values["layer"]),)}
    )


RMU = Objective(
    rmu_loss,
    retained_activations_loss,
    quantities={"forget": (SteeringDistance(),), "retain": (ActivationChange(),)},
    forget_over="rows",
    retain_over="rows",
    summary="activations of a layer to a random vector; the original's on retain rows (Li et al., 2024)",
    arguments={
        "layer": Argument(
            7,
            "The layer: the number of a decoder layer, from 0, or a regular expression of one module's name.",
            _is_layer,
            "an integer >= 0 or a regular expression",
        ),
        "steering_coeff": Argument.number(2.0, "The norm of the steering vector.", 0.0),
        "steering_seed": Argument.count(0, "The seed of the steering vector."),
    },
    configure=_with_layer,
)

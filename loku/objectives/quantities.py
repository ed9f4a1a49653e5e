"""Quantities: numbers of tokens that a loss needs beside the triplets.

A quantity is a number for each of some positions of a row. The model's one forward computes it, from the last
hidden states and the output embedding, or from the output of another module. Some quantities compare with the
original model. They say what of its forward is kept. ``loku.token_values`` runs both forwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from loku.data.tokens import IGNORE_INDEX
from loku.head import next_token_labels
from loku_kernels import cross_entropy, linear_kl_divergence_loss, linear_softmax_triplet


@dataclass(frozen=True)
class At:
    """A model at the n positions of a quantity, row by row.

    Args:
        hidden: The inputs (n, D) of the output embedding.
        labels: The next tokens' labels (n,), int64; -100 where none is labelled.
        weight: The weight (V, D) of the output embedding.
        bias: Its bias (V,), or None.
        postprocessing: The ``softcap`` and the ``logit_scale`` of the model, for the operators of
            ``loku_kernels``; none if the logits are those of the output embedding.
        output: The output (n, D') of ``Quantity.module``, or None if there is no such module.
        original_head: The weight and the bias of the original model's output embedding, if
            ``Quantity.needs_head``; ``weight`` and ``bias`` if the model's own has not changed.
    """

    hidden: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    postprocessing: Mapping[str, Any]
    output: Tensor | None
    original_head: tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Quantity:
    """A number for each of some positions of a row. A subclass is a frozen dataclass with its parameters.

    Class attributes:
        name: The name in ``Rows.values``.
        compares: Whether the original model is needed, False by default. If so, ``of_original`` is called.
        needs_head: Whether ``At.original_head`` is needed, False by default. A model that changes in place
            then keeps a copy of its output embedding.
    """

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False

    def positions(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mask (B, T), bool, of the positions that have a number: by default those that predict a label.

        Args:
            labels: The labels (B, T), int64, aligned with the tokens; -100 is ignored.
            attention_mask: The mask (B, T), int64, that is 0 in the padding. None for packed rows.

        Raises:
            ValueError: The positions of packed rows are not known.
        """
        return next_token_labels(labels) != IGNORE_INDEX

    def module(self, model: nn.Module) -> nn.Module | None:
        """The module of a causal LM whose output is needed; None (default) for none.

        The output must be a tensor (B, T, D'), or a tuple whose first item is one.

        Args:
            model: The causal LM without the wrappers of peft and of sharding.
        """
        return None

    def check(self, model: nn.Module) -> None:
        """Check that the quantity can be computed on a causal LM, before anything is changed.

        Args:
            model: The causal LM without the wrappers of peft and of sharding.

        Raises:
            ValueError: It cannot.
        """
        self.module(model)

    def of_original(self, at: At) -> Tensor:
        """What is kept of the original model, (n, ...), one item for each position; without gradients.

        Args:
            at: The original model at the positions.
        """
        raise NotImplementedError

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The numbers (n,), differentiable.

        Args:
            at: The model at the positions.
            original: The result of ``of_original`` at the same positions, or None if nothing compares.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OriginalLogProbability(Quantity):
    """The log-probability of each counted token under the original model, in nats."""

    name: ClassVar[str] = "original_log_probability"
    compares: ClassVar[bool] = True

    def of_original(self, at: At) -> Tensor:
        """The log-probabilities (n,), float64."""
        triplet, _ = linear_softmax_triplet(at.hidden, at.weight, at.labels, at.bias, **at.postprocessing)
        return -cross_entropy(triplet)

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The original's, as they are."""
        assert original is not None
        return original


def divergence_from(original: Tensor, at: At, lowering: float = 0.0) -> Tensor:
    """Compute KL(original || model) (n,), in nats, of the predictions at the positions of a quantity.

    Args:
        original: The original model's inputs (n, D) of its output embedding.
        at: The model at the positions. Each has a label if ``lowering`` is not 0.
        lowering: The number, in nats, that is subtracted from the original's logit of the label; 0 by
            default.
    """
    weight, bias = at.original_head
    return linear_kl_divergence_loss(
        at.hidden,
        at.weight,
        original,
        at.labels if lowering else None,  # without labels all positions count, those of prompts too
        at.bias,
        reference_weight=weight,
        reference_bias=bias,
        reduction="none",
        lowering=lowering,
        **at.postprocessing,
    )


@dataclass(frozen=True)
class Divergence(Quantity):
    """KL(original || model), in nats, of the predictions at each position.

    Args:
        over: The positions: those that predict a "label" (default), or those of all "tokens", prompts
            included.
    """

    name: ClassVar[str] = "divergence"
    compares: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True

    over: Literal["label", "tokens"] = "label"

    def positions(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mask (B, T), bool, of the positions that have a number.

        Raises:
            ValueError: All tokens of packed rows are asked for.
        """
        if self.over == "label":
            return super().positions(labels, attention_mask)
        if attention_mask is None:
            raise ValueError(
                'divergence_over="tokens" takes rows of one document: packed rows do not mark their padding. '
                "Give each document a row"
            )
        return attention_mask.bool()

    def of_original(self, at: At) -> Tensor:
        """The last hidden states (n, D). The distributions would be V numbers each."""
        return at.hidden

    def of_model(self, at: At, original: Tensor | None) -> Tensor:
        """The divergences (n,)."""
        assert original is not None
        return divergence_from(original, at)

"""``Objective``: a method, as its losses and what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loku.objectives.arguments import Argument
from loku.objectives.losses import retain_loss
from loku.objectives.quantities import Quantity
from loku.objectives.retain_weight import RetainWeight
from loku.objectives.rows import Batch


@dataclass(frozen=True)
class Objective:
    """A method: minimise forget_weight x ``forget(batch)`` + retain_weight x ``retain(batch)``.

    The trainer weights the loss of each micro-batch and process by the number of tokens or rows that it is a
    mean over. The weighted losses add up to the loss of the whole batch.

    Args:
        forget: The loss of a ``Batch`` on rows of the forget set.
        retain: The loss that keeps the model: by default ``retain_loss``, on retain rows. None for none.
        rows: The forget rows that are run: "forget" (default) with the true answers, "refusal" with refusals,
            or both.
        quantities: The quantities beside the triplets that the losses need, by the kind of the rows that have
            them: "forget", "refusal" or "retain". None by default.
        forget_over: The unit that the forget loss is a mean over: counted "tokens" (default), labelled
            "rows", the positions of a quantity, by its name, or a function of ``Rows.counted`` that returns
            the mask (B, T) of the tokens that it counts.
        retain_over: The unit that the retain loss is a mean over, as for ``forget_over``.
        retain_on: The kind of the rows of the retain loss, "retain" by default. Another kind, which must be
            in ``rows``, runs no retain rows.
        summary: One line about the method, for lists.
        beta: The default of ``UnlearnConfig.beta``. None (default) if the method has no beta.
        arguments: The further arguments of the method, by their names in ``UnlearnConfig.method_args``.
            Losses find the values in ``Batch.arguments``. None by default.
        configure: A function of this objective and of the values of ``beta`` and of the arguments that
            returns the objective with them. None (default) leaves it as it is. Quantities get their
            parameters so.
        alternates: Whether the answers of the "refusal" rows are the alternates of the forget rows, their
            column ``alternate``. False (default) stands for ``UnlearnConfig.refusals``.
        retain_weight: A function of ``UnlearnConfig.retain_weight`` that returns the factor of the retain
            loss, by default ``RetainWeight``, which stays as it is.

    Raises:
        ValueError: A value is none of these.
    """

    forget: Callable[[Batch], Tensor]
    retain: Callable[[Batch], Tensor] | None = retain_loss
    rows: tuple[str, ...] = ("forget",)
    quantities: Mapping[str, tuple[Quantity, ...]] = field(default_factory=dict)
    forget_over: str | Callable[[Tensor], Tensor] = "tokens"
    retain_over: str | Callable[[Tensor], Tensor] = "tokens"
    retain_on: str = "retain"
    summary: str = ""
    beta: float | None = None
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    configure: Callable[[Objective, Mapping[str, Any]], Objective] | None = None
    alternates: bool = False
    retain_weight: Callable[[float], RetainWeight] = RetainWeight

    def __post_init__(self) -> None:
        if not self.rows or not set(self.rows) <= {"forget", "refusal"}:
            raise ValueError(f'Objective.rows must be of "forget" and "refusal", got {self.rows!r}')
        if self.retain_on not in ("retain", *self.rows):
            raise ValueError(
                f'Objective.retain_on must be "retain" or one of rows {self.rows!r}, got {self.retain_on!r}'
            )
        named: dict[str, Quantity] = {}
        for kind, quantities in self.quantities.items():
            if kind not in self.kinds:
                raise ValueError(
                    f"Objective.quantities are of kinds of rows that are run, {self.kinds!r}, got {kind!r}"
                )
            for quantity in quantities:
                if named.setdefault(quantity.name, quantity) != quantity:
                    raise ValueError(f"Objective.quantities has two different quantities {quantity.name!r}")
        for name, over, kind in (
            ("forget_over", self.forget_over, self.rows[0]),
            ("retain_over", self.retain_over, self.retain_on),
        ):
            of_kind = [quantity.name for quantity in self.quantities.get(kind, ())]
            if not callable(over) and over not in ("tokens", "rows", *of_kind):
                raise ValueError(
                    f'Objective.{name} must be "tokens", "rows" or a quantity of the {kind} rows, got '
                    f"{over!r}"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows of a batch, in their order there."""
        return self.rows if self.retain is None or self.retain_on != "retain" else (*self.rows, "retain")

    @property
    def reference_kinds(self) -> tuple[str, ...]:
        """The kinds of rows that the original model runs."""
        return tuple(
            kind
            for kind in self.kinds
            if any(quantity.compares for quantity in self.quantities.get(kind, ()))
        )

    @property
    def compares(self) -> bool:
        """Whether the losses need the original model."""
        return bool(self.reference_kinds)

    @property
    def needs_head(self) -> bool:
        """Whether a quantity needs the output embedding of the original model."""
        return any(quantity.needs_head for found in self.quantities.values() for quantity in found)

    def configured(self, beta: float | None, arguments: Mapping[str, Any]) -> Objective:
        """Return the objective with the values of its arguments.

        Args:
            beta: The beta, or None if the method has none.
            arguments: The value of each of ``arguments``.
        """
        if self.configure is None:
            return self
        return replace(self.configure(self, {"beta": beta, **arguments}), configure=None)

    def check(self, model: nn.Module) -> None:
        """Check that a causal LM can be trained so.

        Args:
            model: The causal LM without the wrappers of peft and of sharding.

        Raises:
            ValueError: A quantity cannot be computed on it.
        """
        for quantities in self.quantities.values():
            for quantity in quantities:
                quantity.check(model)

    def rows_of(self, kinds: Mapping[str, Tensor]) -> list[tuple[Quantity, Tensor]]:
        """Return each quantity with the mask (B,), bool, of the rows that have it.

        Args:
            kinds: The mask (B,), bool, of the rows of each kind.
        """
        found: dict[str, tuple[Quantity, Tensor]] = {}
        for kind in self.kinds:
            for quantity in self.quantities.get(kind, ()):
                _, rows = found.get(quantity.name, (quantity, torch.zeros_like(kinds[kind])))
                found[quantity.name] = quantity, rows | kinds[kind]
        return list(found.values())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar ``forget_loss`` and, unless ``retain`` is None, ``retain_loss``, without weights."""
        losses = {"forget_loss": self.forget(batch)}
        if self.retain is not None:
            losses["retain_loss"] = self.retain(batch)
        return losses

    def counts(
        self,
        counted: Mapping[str, Tensor],
        positions: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The number of tokens, rows or positions that each of the ``losses`` is a mean over.

        Args:
            counted: The mask ``Rows.counted`` (B, T), bool, of each of ``kinds``.
            positions: The masks ``Rows.positions`` of each of ``kinds``; needed (default None) if a loss is a
                mean over the positions of a quantity.

        Returns:
            A 0-dimensional int64 tensor for each loss, by the loss's name.
        """

        def count(over: str | Callable[[Tensor], Tensor], kinds: tuple[str, ...]) -> Tensor:
            if over == "rows":
                return counted[kinds[0]].any(1).sum()
            if callable(over):
                masks = {kind: over(counted[kind]) for kind in kinds}
            elif over == "tokens":
                masks = dict(counted)
            else:
                masks = {kind: (positions or {})[kind][over] for kind in kinds}
            first, *others = (masks[kind].sum() for kind in kinds)
            return sum(others, first)

        counts = {"forget_loss": count(self.forget_over, self.rows)}
        if self.retain is not None:
            counts["retain_loss"] = count(self.retain_over, (self.retain_on,))
        return counts

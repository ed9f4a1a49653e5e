"""The share of a micro-batch's losses in the loss of its step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from loku.data.tokens import IGNORE_INDEX
from loku.head import next_token_labels
from loku.objectives import Objective
from loku.token_values import positions_of


def check_counted(objective: Objective, method: str, forget: Iterable[Mapping[str, Any]]) -> None:
    """Check that the forget loss counts a token, if the method leaves some of a row's tokens out.

    A warning counts the rows without one.

    Args:
        objective: The method.
        method: Its name, for messages.
        forget: The tokenised forget rows.

    Raises:
        ValueError: No row has a token that counts, so nothing would be forgotten.
    """
    over = objective.forget_over
    if not callable(over) or "forget" not in objective.rows:
        return
    labels = (torch.tensor([row["labels"]], dtype=torch.int64) for row in forget)
    found = [bool(over(next_token_labels(row) != IGNORE_INDEX).any()) for row in labels]
    told = f"the forget loss of method {method!r} counts no token of"
    if not any(found):
        raise ValueError(f"{told} any forget row, so it would forget nothing: change its method_args")
    if not all(found):
        warnings.warn(f"{told} {found.count(False)} of the {len(found)} forget rows", stacklevel=4)


class Shares(NamedTuple):
    """The shares of a micro-batch in its step, 0-dimensional float64 tensors by the names of the values.

    Attributes:
        losses: The factors of the losses. The micro-batches' losses times them add up to the step's.
        log: The shares of the step's tokens or rows that each value of the log is of.
    """

    losses: dict[str, Tensor]
    log: dict[str, Tensor]


class LossShares:
    """Counts what each loss is a mean over, and divides it by the count of the whole step.

    Args:
        objective: The method.
        reduction: "batch", the loss of a step is that of one batch with all its rows; or "micro_batch", it is
            the mean of the losses of its micro-batches, over all processes.
        mean: "separate", each loss is a mean over its own tokens or rows; or "joint", both are one mean over
            the tokens of both.
    """

    def __init__(
        self,
        objective: Objective,
        reduction: Literal["batch", "micro_batch"] = "batch",
        mean: Literal["separate", "joint"] = "separate",
    ) -> None:
        self.objective, self.reduction, self.mean = objective, reduction, mean

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight of a micro-batch in each value's mean, a 0-dimensional float64 tensor by its name.

        The values are the losses and the ``{kind}_probability`` of each kind of rows. The weight is the
        number of tokens or rows. For a loss with "micro_batch" it is 1, or a joint loss's share of the
        micro-batch's tokens; it is 0 without tokens or rows.

        Args:
            batch: The batch, as from ``loku.data.collate_pairs``.
        """
        masks = {kind: batch[f"is_{kind}"] for kind in self.objective.kinds}
        counted = next_token_labels(batch["labels"]) != IGNORE_INDEX
        positions = positions_of(self.objective.rows_of(masks), batch["labels"], batch.get("attention_mask"))
        of_kinds = {kind: counted[mask] for kind, mask in masks.items()}
        losses = self.objective.counts(
            of_kinds,
            {kind: {name: where[mask] for name, where in positions.items()} for kind, mask in masks.items()},
        )
        weights = {name: count.double() for name, count in losses.items()}
        if self.reduction == "micro_batch":
            units = torch.stack(list(weights.values())).sum() if self.mean == "joint" else None
            weights = {
                name: count / (count if units is None else units).clamp(min=1)
                for name, count in weights.items()
            }
        rows = {f"{kind}_probability": of_kinds[kind].any(1).sum().double() for kind in self.objective.kinds}
        return {**weights, **rows}

    def shares(self, counts: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> Shares:
        """The shares of a micro-batch.

        Args:
            counts: Its ``counts``.
            totals: The sums of the ``counts`` over the step's micro-batches and processes.
        """

        def share(name: str, total: Tensor) -> Tensor:
            return counts[name] / torch.where(total > 0, total, 1.0)

        log = {name: share(name, totals[name]) for name in counts}
        losses = {name: log[name] for name in ("forget_loss", "retain_loss") if name in counts}
        if self.mean == "joint":
            together = torch.stack([totals[name] for name in losses]).sum()
            losses = {name: share(name, together) for name in losses}
        return Shares(losses, log)

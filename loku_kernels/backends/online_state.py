"""The state of rows whose columns come in several blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OnlineState(NamedTuple):
    """The triplets of N rows after some blocks of their columns.

    ``triplet_columns_`` of a backend takes the next block in and overwrites every tensor.

    Attributes:
        numbers: The numbers (N, 4) of the rows, float64: target, runner_up, rest_max, and the sum over the
            rest of exp(y - rest_max).
        runner_up_id: The column (N,) of the runner-up, int64.
        rescale: The factor (N,) of the terms of earlier blocks, float32, or float64 for float64 logits. It is
            exp(old rest_max - rest_max), with the rest_max from before the last block.
        demoted_id: The column (N,) of a runner-up of an earlier block that the last block moved into the
            rest, int64. -1 means none.
        demoted_share: The term (N,) of that runner-up, in the dtype of ``rescale``: exp(y - rest_max) times
            the softcap's slope.
    """

    numbers: Tensor
    runner_up_id: Tensor
    rescale: Tensor
    demoted_id: Tensor
    demoted_share: Tensor

    @classmethod
    def start(cls, labels: Tensor, dtype: torch.dtype = torch.float32) -> OnlineState:
        """Make the state before the first block.

        Args:
            labels: The labels (N,), int64.
            dtype: The dtype of ``rescale`` and ``demoted_share``, in which the terms are summed: float32
                (default), or float64 for float64 logits.

        Returns:
            The state, on the device of the labels.
        """
        n, device = labels.numel(), labels.device
        numbers = torch.full((n, 4), -torch.inf, dtype=torch.float64, device=device)
        numbers[:, 3] = 0.0
        return cls(
            numbers,
            (labels == 0).long(),  # a column other than the target's
            torch.ones(n, dtype=dtype, device=device),
            torch.full_like(labels, -1),
            torch.zeros(n, dtype=dtype, device=device),
        )

    def triplet(self) -> Tensor:
        """Compute the triplets (N, 3), float64, of the columns so far."""
        target, runner_up, rest_max, rest_sum = self.numbers.unbind(1)
        rest = torch.where(rest_sum == 0, -torch.inf, rest_max + rest_sum.log())
        return torch.stack([target, runner_up, rest], 1)

"""The state of rows whose columns come in several blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OnlineState(NamedTuple):
    """Triplets of N rows of logits, of whose columns some blocks have been taken in.

    ``triplet_columns_`` of a backend takes the next block in and overwrites every tensor.
    """

    numbers: Tensor  # (N, 4) float64: target, runner_up, rest_max, sum over the rest of exp(y - rest_max)
    runner_up_id: Tensor  # (N,) int64
    rescale: Tensor  # (N,) float32: exp(rest_max before the last block - rest_max now), for earlier terms
    demoted_id: Tensor  # (N,) int64: a runner-up of earlier blocks that the last one put into the rest, or -1
    demoted_share: Tensor  # (N,) float32: its term, exp(y - rest_max) times the slope of the softcap

    @classmethod
    def start(cls, labels: Tensor) -> OnlineState:
        """The state before the first block, for labels (N,) int64."""
        n, device = labels.numel(), labels.device
        numbers = torch.full((n, 4), -torch.inf, dtype=torch.float64, device=device)
        numbers[:, 3] = 0.0
        return cls(
            numbers,
            (labels == 0).long(),  # any column but that of the target
            torch.ones(n, device=device),
            torch.full_like(labels, -1),
            torch.zeros(n, device=device),
        )

    def triplet(self) -> Tensor:
        """The triplets (N, 3), float64, of the columns so far."""
        target, runner_up, rest_max, rest_sum = self.numbers.unbind(1)
        rest = torch.where(rest_sum == 0, -torch.inf, rest_max + rest_sum.log())
        return torch.stack([target, runner_up, rest], 1)

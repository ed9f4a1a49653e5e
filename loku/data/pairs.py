"""Pairs of forget and retain rows, and their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from loku.data.large_sets import StreamedRows
from loku.data.refusals import RefusalRows
from loku.data.tokens import IGNORE_INDEX


class Draw(NamedTuple):
    """One draw of an epoch's order.

    Attributes:
        position: The number of the draw in its epoch, from 0.
        row: The index of the forget row. None stands for a row without labels, which fills up a batch and
            adds nothing to any loss.
    """

    position: int
    row: int | None


class PairedDataset(Dataset):
    """Forget rows, each with a retain row and a refusal that are drawn anew in each epoch.

    The index of an item is a ``Draw``. Retain rows come in a random order, and none comes again until all
    have been used. They depend on the seed, the epoch and the index of the forget row, not on batches,
    workers or processes. A stream gives its retain rows in its own order, by the positions of the draws.

    Args:
        forget: The tokenised forget rows.
        retain: The tokenised retain rows, a list, ``loku.data.LazyRows`` or ``loku.data.StreamedRows``.
        seed: The seed of the draws, >= 0.
        refusals: The forget rows with refusals; needed if ``kinds`` has "refusal", None by default.
        kinds: The kinds of rows of an item, in their order, ("forget", "retain") by default. "forget" is the
            row itself, "refusal" the same row with a refusal, "retain" a retain row.
        with_replacement: Whether each retain row is drawn from all, whichever came before; False by default.
            A stream has no such draws.
    """

    def __init__(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]] | StreamedRows,
        seed: int,
        refusals: RefusalRows | None = None,
        kinds: tuple[str, ...] = ("forget", "retain"),
        with_replacement: bool = False,
    ):
        self.forget, self.retain, self.refusals = forget, retain, refusals
        self.seed, self.kinds = seed, kinds
        self.with_replacement = with_replacement
        self.streams_retain = isinstance(retain, StreamedRows)
        # What quantities keep of the original model, by (kind, key) and the quantity's name.
        self.originals: dict[tuple[str, Any], dict[str, torch.Tensor]] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch, >= 0, from now on, in workers too."""
        self._epoch.fill_(epoch)
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._begin = epoch * len(self.forget)
        self._orders: dict[int, torch.Tensor] = {}
        if "refusal" in self.kinds:
            assert self.refusals is not None, 'the kind "refusal" needs refusals'
            generator = np.random.default_rng((self.seed, epoch))
            self._refusal_indices = self.refusals.draw(generator)

    def _retain_index(self, draw: int, rows: int) -> int:
        if self.with_replacement:
            return int(np.random.default_rng((self.seed, draw, 1)).integers(rows))
        lap, position = divmod(draw, rows)
        if lap not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + lap)
            self._orders[lap] = torch.randperm(rows, generator=generator, dtype=torch.int64, device="cpu")
        return int(self._orders[lap][position])

    def key(self, kind: str, draw: Draw) -> Any:
        """Return the key of one row of an item, by which ``row`` finds it.

        Args:
            kind: The kind of the row.
            draw: The index of the item.

        Returns:
            The index of the row in its set, or (row, refusal) for a refusal; None for a draw of no row.
        """
        if draw.row is None:
            return None
        if kind == "retain":
            if isinstance(self.retain, StreamedRows):
                return self._begin + draw.position
            return self._retain_index(self._begin + draw.row, len(self.retain))
        return draw.row if kind == "forget" else (draw.row, int(self._refusal_indices[draw.row]))

    def row(self, kind: str, key: Any) -> Mapping[str, Any]:
        """Return a tokenised row, with its ``originals`` if it has them.

        Args:
            kind: The kind of the row.
            key: The key of the row, from ``key``.
        """
        if key is None:
            row = {"input_ids": [0], "labels": [IGNORE_INDEX]}
        else:
            sets: Any = {"forget": self.forget, "retain": self.retain, "refusal": self.refusals}
            row = sets[kind][key]
        originals = self.originals.get((kind, key))
        return row if originals is None else {**row, "originals": originals}

    def length(self, draw: Draw) -> int:
        """Return the number of tokens of the longest row of an item; the rows of a stream do not count."""
        kinds = [kind for kind in self.kinds if not (kind == "retain" and self.streams_retain)]
        return max(len(self.row(kind, self.key(kind, draw))["input_ids"]) for kind in kinds)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, draw: Draw) -> dict[str, Mapping[str, Any]]:
        if self._epoch != self.epoch:  # in a worker, after the training process has set the epoch
            self._begin_epoch(self._epoch.item())
        return {kind: self.row(kind, self.key(kind, draw)) for kind in self.kinds}


class PairSampler(Sampler):
    """The order of a ``PairedDataset``'s items in its epoch, as ``Draw``s.

    The order depends on the seed and the epoch alone.

    Args:
        dataset: The ``PairedDataset``.
        seed: The seed of the order, >= 0.
        strategy: The order, "random" by default; see ``UnlearnConfig.train_sampling_strategy``.
        step: The number of rows of an optimizer step, 1 by default. "group_by_length" gives the rows of a
            step similar lengths.
        multiple: The number of draws is filled up to a multiple of this, 1 by default, with draws of no row.
            If it is the number of rows that all processes take together, each process has equally many whole
            batches, and no row counts twice. Otherwise accelerate repeats the first rows.
    """

    def __init__(
        self, dataset: PairedDataset, seed: int, strategy: str = "random", step: int = 1, multiple: int = 1
    ):
        self.dataset, self.seed = dataset, seed
        self.strategy, self.step, self.multiple = strategy, step, multiple

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Draw]:
        order = self._order()
        fill: list[None] = [None] * (len(self) - len(order))
        return (Draw(position, row) for position, row in enumerate([*order, *fill]))

    def _order(self) -> Sequence[int]:
        rows = range(len(self.dataset))
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        if self.strategy == "sequential":
            return rows
        if self.strategy == "group_by_length":
            lengths = [self.dataset.length(Draw(row, row)) for row in rows]
            return get_length_grouped_indices(lengths, self.step, generator=generator)
        return torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu").tolist()

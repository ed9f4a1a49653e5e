"""Pairs of forget and retain rows, and their order."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from loku.data.large_sets import StreamedRows
from loku.data.rows import IGNORE_INDEX


class Draw(NamedTuple):
    """A step of an epoch's order.

    ``position`` counts the draws of the epoch from 0. ``row`` is the index of the forget row, or None for the
    row without labels, which fills up a batch and adds nothing to any loss.
    """

    position: int
    row: int | None


class PairedDataset(Dataset):
    """Forget rows with a retain row and a refusal each, both drawn anew each epoch.

    An item is asked for by its ``Draw``. Retain rows come in a random order, and none comes again until all
    have been used. They depend on the seed, the epoch and the index of the forget row, not on batches,
    workers or processes. A stream gives its retain rows in its own order, by the positions of the draws.

    Args:
        forget: Tokenised rows.
        retain: Tokenised rows, or a ``loku.data.StreamedRows``.
        seed: The seed of the draws, >= 0.
        refusals: A ``loku.data.RefusalRows``, if ``kinds`` has "refusal".
        kinds: The kinds of rows of an item, in their order: "forget" is the row itself, "refusal" the same
            row with a refusal, "retain" a retain row.
    """

    def __init__(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Any,
        seed: int,
        refusals: Any = None,
        kinds: tuple[str, ...] = ("forget", "retain"),
    ):
        self.forget, self.retain, self.refusals = forget, retain, refusals
        self.seed, self.kinds = seed, kinds
        self.streams_retain = isinstance(retain, StreamedRows)
        self.references: dict = {}  # (kind, key) -> the original model's values for that row
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch, >= 0, from now on, in workers too."""
        self._epoch.fill_(epoch)
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch):
        self.epoch = epoch
        self._begin = epoch * len(self.forget)
        self._orders = {}
        if "refusal" in self.kinds:
            generator = np.random.default_rng((self.seed, epoch))
            self._refusal_indices = generator.integers(len(self.refusals.refusals), size=len(self.forget))

    def _retain_index(self, draw):
        lap, position = divmod(draw, len(self.retain))
        if lap not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + lap)
            self._orders[lap] = torch.randperm(len(self.retain), generator=generator)
        return int(self._orders[lap][position])

    def key(self, kind: str, draw: Draw) -> Any:
        """The row of a kind in an item: an index into its set, (row, refusal) for a refusal, or None."""
        if draw.row is None:
            return None
        if kind == "retain":
            if self.streams_retain:
                return self._begin + draw.position
            return self._retain_index(self._begin + draw.row)
        return draw.row if kind == "forget" else (draw.row, int(self._refusal_indices[draw.row]))

    def row(self, kind: str, key: Any) -> Mapping[str, Any]:
        """A tokenised row by its key, with its ``reference`` if there is one."""
        if key is None:
            row = {"input_ids": [0], "labels": [IGNORE_INDEX]}
        else:
            row = {"forget": self.forget, "retain": self.retain, "refusal": self.refusals}[kind][key]
        reference = self.references.get((kind, key))
        return row if reference is None else {**row, "reference": reference}

    def length(self, draw: Draw) -> int:
        """The number of tokens of the longest row of an item; the rows of a stream are not known."""
        kinds = [kind for kind in self.kinds if not (kind == "retain" and self.streams_retain)]
        return max(len(self.row(kind, self.key(kind, draw))["input_ids"]) for kind in kinds)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, draw: Draw) -> dict[str, Mapping[str, Any]]:
        if self._epoch != self.epoch:  # in a worker: the training process has set it
            self._begin_epoch(self._epoch.item())
        return {kind: self.row(kind, self.key(kind, draw)) for kind in self.kinds}


class PairSampler(Sampler):
    """The order of a ``PairedDataset``'s items in its epoch, as ``Draw``s.

    It depends on the seed and the epoch alone.

    Args:
        dataset: The ``PairedDataset``.
        seed: The seed of the order, >= 0.
        strategy: The order; see ``UnlearnConfig.train_sampling_strategy``.
        step: The number of rows of an optimizer step; "group_by_length" gives those similar lengths.
        multiple: The number whose multiple the order is filled up to, with draws of no row. With the number
            of rows that all processes take together, each process has equally many whole batches, and no row
            counts twice (accelerate would repeat the first ones).
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
        fill = [None] * (len(self) - len(order))
        return (Draw(position, row) for position, row in enumerate([*order, *fill]))

    def _order(self):
        rows = range(len(self.dataset))
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        if self.strategy == "sequential":
            return rows
        if self.strategy == "group_by_length":
            lengths = [self.dataset.length(Draw(row, row)) for row in rows]
            return get_length_grouped_indices(lengths, self.step, generator=generator)
        return torch.randperm(len(rows), generator=generator).tolist()

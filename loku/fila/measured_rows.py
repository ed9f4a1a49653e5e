"""The rows whose Fisher is measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from loku.fila.row_scales import reiterable
from loku.fila.settings import FilaConfig

OFFICIAL_BATCH_SIZE = 4  # rows in a batch of the authors' run_measure_importance.sh


def sampled(batches: Iterable[Mapping[str, Tensor]], config: FilaConfig) -> Iterable[Mapping[str, Tensor]]:
    """Return the ``fisher_samples`` rows of batches, or all of them.

    ``seed`` draws them from a ``DataLoader`` over a sized data set. From other iterables they are the first.

    Args:
        batches: The batches of a data set.
        config: The settings.
    """
    count = config.fisher_samples
    if count is None:  # batches that are shuffled anew in each pass would be grouped anew
        return list(batches) if config.fisher == "per-batch" else reiterable(batches)
    if isinstance(batches, DataLoader) and batches.batch_size and hasattr(batches.dataset, "__len__"):
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(batches.dataset), generator=generator, dtype=torch.int64, device="cpu")
        chosen = Subset(batches.dataset, order[:count].sort().values.tolist())
        return DataLoader(chosen, batch_size=batches.batch_size, collate_fn=batches.collate_fn)
    first = []
    for batch in batches:
        first.append({key: value[:count] for key, value in batch.items()})
        count -= len(first[-1]["input_ids"])
        if count == 0:
            break
    return first


def official_rows(
    forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Draw the rows that the authors' code measures, in the order of its batches.

    They are all forget rows in a random order, and for each of them one retain row that is drawn at random,
    with replacement. So a retain set that is larger than the forget set is measured in part. The per-batch
    Fisher depends on the grouping: the authors' batches have ``OFFICIAL_BATCH_SIZE`` rows.

    Args:
        forget: The tokenised forget rows.
        retain: The tokenised retain rows.
        seed: The seed of the order and of the draws.

    Returns:
        The forget rows and as many retain rows.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(forget), generator=generator, dtype=torch.int64, device="cpu")
    size = (len(forget),)
    drawn = torch.randint(len(retain), size, generator=generator, dtype=torch.int64, device="cpu")
    return [forget[index] for index in order.tolist()], [retain[index] for index in drawn.tolist()]

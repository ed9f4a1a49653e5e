"""Token batches: padding, and batches of several kinds of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loku.data.token_limits import token_limits
from loku.data.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase | None, model: nn.Module | None = None) -> int:
    """Return the id to pad with: the tokenizer's padding or EOS id, or 0.

    Any id will do, because padding is masked out of the attention and out of the labels. But the model's
    embedding must have it. A padding token may have been added to the tokenizer alone.

    Args:
        tokenizer: The tokenizer, or None.
        model: The causal LM, whose input embedding must have the id; None (default) sets no bound.
    """
    rows = None if model is None else token_limits(model).inputs
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None and (rows is None or token < rows))


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad tokenised rows on the right.

    ``functools.partial(collate, pad_token_id=...)`` is a ``data_collator`` for ``transformers.Trainer`` and a
    ``collate_fn`` for a ``DataLoader``.

    Args:
        rows: Tokenised rows, as ``loku.data.tokenize_dataset`` returns them.
        pad_token_id: The id in the padding of ``input_ids``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (len(rows), longest row), with
        ``pad_token_id``, 0 and -100 in the padding. If a row has several documents, the batch has
        ``position_ids`` of the same shape, with 0 in the padding, and no ``attention_mask``: the models of
        transformers take packed sequences in this form.
    """

    def pad(sequences: Iterable[Any], value: int) -> Tensor:
        tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "labels": pad([row["labels"] for row in rows], IGNORE_INDEX),
    }
    lengths = [len(row["input_ids"]) for row in rows]
    if any("position_ids" in row for row in rows):
        positions = [row.get("position_ids", range(n)) for row, n in zip(rows, lengths, strict=True)]
        return {**batch, "position_ids": pad(positions, 0)}
    return {**batch, "attention_mask": pad([[1] * n for n in lengths], 0)}


def collate_pairs(pairs: Sequence[Mapping[str, Mapping[str, Any]]], pad_token_id: int) -> dict[str, Tensor]:
    """Make one batch of all rows of the first kind, then all rows of the second kind, and so on.

    Args:
        pairs: Items of a ``loku.data.PairedDataset``, which map a kind to a tokenised row. All have the same
            kinds.
        pad_token_id: The id in the padding of ``input_ids``.

    Returns:
        The batch of ``collate``. ``is_forget``, ``is_retain`` and ``is_refusal``, bool (rows,), mark the rows
        of each kind that the pairs have. ``token_count``, int64 (rows,), is the number of tokens of each row.
        ``original_NAME`` is the concatenation of the tensors NAME in the rows' ``originals``, if any.
    """
    kinds = list(pairs[0])
    rows = [pair[kind] for kind in kinds for pair in pairs]
    batch = collate(rows, pad_token_id)
    for number, kind in enumerate(kinds):
        batch[f"is_{kind}"] = torch.arange(len(rows), dtype=torch.int64) // len(pairs) == number
    batch["token_count"] = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64)
    originals: dict[str, list[Tensor]] = {}
    for row in rows:
        for name, values in row.get("originals", {}).items():
            originals.setdefault(name, []).append(values)
    return {**batch, **{f"original_{name}": torch.cat(values) for name, values in originals.items()}}

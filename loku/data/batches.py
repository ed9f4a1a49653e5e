"""Token batches: padding, and batches of several kinds of rows."""

import torch

from loku.data.rows import IGNORE_INDEX


def padding_id(tokenizer):
    """The id to pad with. Any will do: padding is masked out of the attention and out of the labels."""
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None)


def collate(rows, pad_token_id):
    """Pad tokenised rows on the right.

    Returns ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (len(rows), longest row),
    with ``pad_token_id``, 0 and -100 in the padding. If a row has several documents there are
    ``position_ids``, 0 in the padding, and no ``attention_mask``, as transformers' models take packed
    sequences. ``functools.partial(collate, pad_token_id=...)`` is a ``data_collator`` for
    ``transformers.Trainer`` and a ``collate_fn`` for a ``DataLoader``.
    """

    def pad(sequences, value):
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


def collate_pairs(pairs, pad_token_id):
    """One batch of all rows of the first kind, then of the second, ...

    ``is_forget`` (rows,), ``is_retain`` and ``is_refusal``, of the kinds that there are, tell them apart.
    ``token_count`` (rows,) is how many tokens each has.
    ``reference`` is what the rows bring of it, concatenated.
    """
    kinds = list(pairs[0])
    rows = [pair[kind] for kind in kinds for pair in pairs]
    batch = collate(rows, pad_token_id)
    for number, kind in enumerate(kinds):
        batch[f"is_{kind}"] = torch.arange(len(rows)) // len(pairs) == number
    batch["token_count"] = torch.tensor([len(row["input_ids"]) for row in rows])
    references = [row["reference"] for row in rows if "reference" in row]
    if references:
        batch["reference"] = torch.cat(references)
    return batch

"""Data sets in, token batches out.

A data set is a list of strings, a list of dicts or a ``datasets.Dataset``. ``tokenize_dataset`` turns it into
a list of ``{"input_ids", "labels"}``, which ``transformers.Trainer`` and ``torch.utils.data.DataLoader``
take. ``collate`` pads some of these rows into tensors.
"""

from loku.data.batches import collate, collate_pairs, padding_id
from loku.data.files import place_of_row, read_rows
from loku.data.large_sets import LazyRows, StreamedRows, retain_rows
from loku.data.pairs import PairedDataset, PairSampler
from loku.data.refusals import TOFU_REFUSALS, RefusalRows, load_refusals
from loku.data.rows import (
    COLUMNS,
    IGNORE_INDEX,
    RowError,
    RowTokenizer,
    documents,
    duplicate_rows,
    has_input_ids,
    infer_tokenizer,
    question_answer_texts,
    split_documents,
    tokenize_dataset,
)

__all__ = [
    "COLUMNS",
    "IGNORE_INDEX",
    "TOFU_REFUSALS",
    "LazyRows",
    "PairSampler",
    "PairedDataset",
    "RefusalRows",
    "RowError",
    "RowTokenizer",
    "StreamedRows",
    "collate",
    "collate_pairs",
    "documents",
    "duplicate_rows",
    "has_input_ids",
    "infer_tokenizer",
    "load_refusals",
    "padding_id",
    "place_of_row",
    "question_answer_texts",
    "read_rows",
    "retain_rows",
    "split_documents",
    "tokenize_dataset",
]

"""Data sets in, token batches out.

A data set is a list of strings, a list of dicts, a ``datasets.Dataset`` or a table of pandas.
``tokenize_dataset`` turns it into a list of ``{"input_ids", "labels"}``, which ``transformers.Trainer`` and
``torch.utils.data.DataLoader`` take. ``collate`` pads some of these rows into tensors.
"""

from loku.data.alternates import ALTERNATE, AlternateRows, alternates_of
from loku.data.batches import collate, collate_pairs, padding_id
from loku.data.files import place_of_row, read_rows
from loku.data.large_sets import LazyRows, StreamedRows, retain_rows
from loku.data.pairs import PairedDataset, PairSampler
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.refusals import TOFU_REFUSALS, RefusalRows, load_refusals
from loku.data.row_errors import BadRow, RowError, row_places
from loku.data.row_forms import (
    COLUMNS,
    instruction_texts,
    labelled_column,
    paraphrased_answer,
    question_answer_texts,
    wrong_answers,
)
from loku.data.rows import (
    RowTokenizer,
    as_rows,
    check_template_used,
    documents,
    duplicate_rows,
    has_input_ids,
    infer_tokenizer,
    split_documents,
    tokenize_dataset,
)
from loku.data.token_limits import TokenLimits, check_tokens, token_limits
from loku.data.tokens import IGNORE_INDEX

__all__ = [
    "ALTERNATE",
    "COLUMNS",
    "IGNORE_INDEX",
    "TOFU_REFUSALS",
    "TOFU_TEMPLATE",
    "AlternateRows",
    "BadRow",
    "LazyRows",
    "PairSampler",
    "PairedDataset",
    "QuestionTemplate",
    "RefusalRows",
    "RowError",
    "RowTokenizer",
    "StreamedRows",
    "TokenLimits",
    "alternates_of",
    "as_rows",
    "check_template_used",
    "check_tokens",
    "collate",
    "collate_pairs",
    "documents",
    "duplicate_rows",
    "has_input_ids",
    "infer_tokenizer",
    "instruction_texts",
    "labelled_column",
    "load_refusals",
    "padding_id",
    "paraphrased_answer",
    "place_of_row",
    "question_answer_texts",
    "read_rows",
    "retain_rows",
    "row_places",
    "split_documents",
    "token_limits",
    "tokenize_dataset",
    "wrong_answers",
]

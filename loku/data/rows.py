"""Rows of text and their tokens.

``tokenize_dataset`` turns a data set into a list of ``{"input_ids", "labels"}``, which
``transformers.Trainer`` and ``torch.utils.data.DataLoader`` take.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loku.adapters import MERGED_ADAPTER
from loku.counts import check_max_length
from loku.data.files import place_of_row
from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.row_errors import BadRow, RowError
from loku.data.row_forms import columns_of, labelled_column, labelled_text
from loku.data.token_limits import TokenLimits
from loku.data.tokens import IGNORE_INDEX, TextTokenizer, TokenizedRow, given_tokens
from loku.data.values import as_list, is_missing
from loku.trust import TRUSTED, load_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE_INDEX",
    "BadRow",
    "DataSet",
    "RowError",
    "RowTokenizer",
    "TokenizedRow",
    "as_rows",
    "check_template_used",
    "cut_row",
    "documents",
    "duplicate_rows",
    "has_input_ids",
    "infer_tokenizer",
    "labelled_column",
    "split_documents",
    "tokenize_dataset",
]


class DataSet(Protocol):
    """A data set: a list of strings, a list of dicts, a ``datasets.Dataset`` or a table."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int, /) -> Any: ...


def as_rows(rows: Any, name: str) -> Any:
    """Return a data set whose elements are rows.

    Args:
        rows: The data set. A table of columns becomes a list of dicts: a ``pandas.DataFrame``, a
            ``polars.DataFrame`` or a ``pyarrow.Table``. A ``pandas.Series`` becomes a list. Other data sets,
            streams too, come back as they are.
        name: The name of the data set in messages.

    Raises:
        ValueError: The elements of the data set are no rows: it is a mapping, one string, a set, or a table
            of another library. Or two columns of a ``pandas.DataFrame`` have one name.
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"the {name} set is a mapping with the keys {list(rows)}; {_instead_of_mapping(rows)}"
        )
    libraries = {base.__module__.partition(".")[0] for base in type(rows).__mro__}
    if "pandas" in libraries and hasattr(rows, "columns"):
        if not rows.columns.is_unique:
            twice = list(rows.columns[rows.columns.duplicated()])
            raise ValueError(f"the {name} set has two columns of one name, {twice[0]!r}; drop or rename one")
        columns = {column: _cells(rows[column]) for column in rows.columns}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if "pandas" in libraries and hasattr(rows, "index"):
        return _cells(rows)
    if "polars" in libraries and hasattr(rows, "to_dicts"):
        return rows.to_dicts()
    if "pyarrow" in libraries and hasattr(rows, "to_pylist"):
        return rows.to_pylist()
    if hasattr(rows, "columns"):  # its elements are the names of its columns, and no rows
        kind = f"{type(rows).__module__}.{type(rows).__qualname__}"
        raise ValueError(
            f"the {name} set is a {kind}, a table that is not known; make it a pandas.DataFrame or a list of "
            "dicts"
        )
    if isinstance(rows, (str, bytes, set, frozenset)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            f"the {name} set is a {type(rows).__name__}; pass a list of strings, a list of dicts, a "
            f"datasets.Dataset or a pandas.DataFrame"
        )
    return rows


def _instead_of_mapping(rows: Mapping[Any, Any]) -> str:
    if labelled_column(rows) is not None:
        if all(as_list(value) is None for value in rows.values()):
            return "if it is one row, pass a list of it: [row]"
        return "if these are columns, pass datasets.Dataset.from_dict(rows)"
    return "pass one list of rows or one datasets.Dataset (of a DatasetDict, one split)"


def _cells(series: Any) -> list[Any]:
    """Return the values of a column of pandas, None for missing ones and lists for arrays."""
    values = (None if is_missing(value) else value for value in series.tolist())
    return [value if (entries := as_list(value)) is None else entries for value in values]


def tokenize_dataset(
    rows: DataSet,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None = None,
    name: str = "forget",
    limits: TokenLimits | None = None,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> list[TokenizedRow]:
    """Tokenise a data set.

    Each row is a string or has columns, in this order of preference:

    - ``input_ids``, with ``labels`` or with every token labelled. They are taken unchanged, except that the
      positions that an ``attention_mask`` column masks are dropped. A label is -100 or a token id. A 0 in
      TRL's ``completion_mask`` or ``assistant_masks`` takes the label away. A row may
      pack several documents. Then ``position_ids``, which begin at 0 in each document, or ``seq_lengths``
      tell them apart. Documents do not see each other, and the first token of each is not predicted.
    - ``messages``, which the tokenizer's chat template renders. Every assistant turn is labelled if the
      template marks the turns with ``{% generation %}``. Otherwise the last message is labelled, and it must
      be the assistant's. A message has ``role`` and ``content``, a string or a list of text parts.
    - ``conversations``, ShareGPT's form of the same. A message has ``from`` ("human", "gpt", "system") and
      ``value``.
    - ``prompt`` and ``completion``. The completion is labelled. Both are strings, or both are lists of
      messages, which the chat template renders.
    - ``question`` and ``answer``, in the form of ``template``. In TOFU's, the default,
      ``"Question: {question}\\nAnswer:"`` is the prompt and ``" {answer}"`` the completion.
    - ``instruction``, ``output`` and, if there is one, ``input``, in Alpaca's form: the prompt ends with
      ``"### Response:\\n"``, and ``output`` is the completion. See ``loku.data.instruction_texts``.
    - ``text``. Every token is labelled. A plain string means the same.

    A text is tokenised as a whole, so the ids are those of ``tokenizer(prompt + completion)``. A token is
    labelled if it has at least one character of the completion. The special tokens that the tokenizer puts
    first by default (Llama's BOS) start the row once. The tokenizer's EOS, if it has one, ends the completion
    or the text. Chat templates place their own special tokens. They take the columns ``tools`` and
    ``chat_template_kwargs``. Other columns are ignored. A value of None or NaN counts as missing.

    Args:
        rows: The data set: a list of strings, a list of dicts, a ``datasets.Dataset``, or a table of pandas,
            polars or pyarrow.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut, >= 2; None (default) does not cut them. A cut
            row keeps its start. One warning counts the cut rows.
        name: The name of the data set in messages, "forget" by default.
        limits: The context and vocabulary of a model, from ``loku.data.token_limits``. Rows beyond them are
            refused. None (default) sets no limits.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        A row ``{"input_ids": list[int], "labels": list[int]}`` for each row, with ``position_ids`` too if it
        packs several documents. The labels are aligned with the ids as in transformers: the loss shifts them.
        -100 marks tokens that are neither learnt nor forgotten.

    Raises:
        ValueError: The data set is empty, or is not one list of rows; or ``max_length`` is less than 2.
        RowError: A row has no known columns, a value of the wrong type, a blank text, or no label token, or
            it is beyond the limits; the first such row is named. The first token of a row is never
            predicted, so its label does not count.
    """
    check_max_length(max_length)
    rows = as_rows(rows, name)
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"the {name} set is a {type(rows).__name__}, which has no length; pass list(rows)")
    if len(rows) == 0:
        raise ValueError(f"the {name} set is empty; it needs at least one row")

    tokenize = RowTokenizer(tokenizer, max_length, name, limits, template=template)
    tokenized = [tokenize(index, row) for index, row in enumerate(rows)]
    if tokenize.truncated:
        warnings.warn(
            f"{tokenize.truncated} of the {len(rows)} rows of the {name} set were cut to "
            f"max_length={max_length} tokens",
            stacklevel=2,
        )
    return tokenized


class RowTokenizer:
    """A function of the index of a row and the row, which tokenises it as ``tokenize_dataset`` does.

    ``truncated`` is the number of rows that have been cut.

    Args:
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut, >= 2; None does not cut them.
        name: The name of the data set in messages.
        limits: The limits of a model; None (default) sets none.
        source: The file of the rows, as for ``loku.data.read_rows``, which messages then name; None (default)
            if it is not known.
        cut: Whether longer rows are cut, True by default. Otherwise they are refused, and the limits of the
            model do not advise to cut them.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Raises:
        ValueError: ``max_length`` is less than 2.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        name: str,
        limits: TokenLimits | None = None,
        source: str | os.PathLike | None = None,
        cut: bool = True,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        check_max_length(max_length)
        self.tokenizer, self.max_length, self.name = tokenizer, max_length, name
        self.limits, self.source, self.cut, self.template = limits, source, cut, template
        self.truncated = 0
        self._tokenize = None if tokenizer is None else TextTokenizer(tokenizer)

    def __call__(self, index: int, row: Any) -> TokenizedRow:
        """Tokenise a row; ``RowError`` names its index and the data set."""
        try:
            columns, whole = self._tokens(row)
            length = len(columns["input_ids"])
            told = f"{length}" if whole else f"more than {self._most()}"
            if not self.cut:
                self._refuse_longer(length, told)
            columns = cut_row(columns, self.max_length)
            left = len(columns["input_ids"])
            refused = not whole and left == length  # for its length, whatever its labels are
            if not refused and all(label == IGNORE_INDEX for label in columns["labels"][1:]):
                raise BadRow(
                    f"no label token is left of its {told} tokens after cutting it to max_length="
                    f"{self.max_length}; raise max_length or drop the row"
                    if length > left
                    else "there is no label token after its first token; give it a longer text, a "
                    "non-empty completion or labels that are not all -100, or drop the row"
                )
            if self.limits is not None:
                self.limits.check(columns, told if refused else None)
        except RecursionError as error:
            raise self._error(index, "its values are nested too deeply") from error
        except BadRow as error:
            raise self._error(index, error) from error.__cause__
        self.truncated += length > left
        return columns

    def _error(self, index: int, problem: object) -> RowError:
        place = None if self.source is None else place_of_row(self.source, index)
        return RowError(self.name, index, problem, place)

    def _most(self) -> int | None:
        """Return the greatest number of tokens of a row that are of use; None if there is none."""
        context = None if self.limits is None else self.limits.context
        bounds = (
            (self.max_length,) if self.cut and self.max_length is not None else (self.max_length, context)
        )
        return min((bound for bound in bounds if bound is not None), default=None)

    def _refuse_longer(self, length: int, told: str) -> None:
        context = None if self.limits is None else self.limits.context
        for greatest, what, instead in (
            (self.max_length, "max_length", "raise max_length (--max-length) or drop the row"),
            (context, "the model's context", "drop the row"),
        ):
            if greatest is not None and length > greatest:
                raise BadRow(
                    f"a question with its answer has {told} tokens, and {what} is {greatest}. Answers to "
                    f"questions are not cut: {instead}"
                )

    def _tokens(self, row: Any) -> tuple[TokenizedRow, bool]:
        """Return the tokens of a row, and whether they are all of them (``TextTokenizer``)."""
        columns = columns_of(row)
        if labelled_column(columns) == "input_ids":
            return given_tokens(columns), True
        if self._tokenize is None:
            raise BadRow("a tokenizer is needed unless every row has 'input_ids'; pass tokenizer=")
        labelled = labelled_text(columns, self._tokenize.tokenizer, self.template)
        return self._tokenize(labelled, self._most())


def cut_row(columns: TokenizedRow, max_length: int | None) -> TokenizedRow:
    """Return the first ``max_length`` tokens of a tokenised row, or all with None."""
    return {name: values[:max_length] for name, values in columns.items()}


def documents(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the labelled documents of a tokenised row, as rows.

    A row without ``position_ids`` is its only document.
    """
    if "position_ids" not in row:
        return [row]
    bounds = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    parts = [slice(*bound) for bound in zip(bounds, [*bounds[1:], None], strict=True)]
    split = [{name: row[name][part] for name in ("input_ids", "labels")} for part in parts]
    return [part for part in split if any(label != IGNORE_INDEX for label in part["labels"])]


def split_documents(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the labelled documents of tokenised rows, as rows."""
    return [document for row in rows for document in documents(row)]


def has_input_ids(rows: Any) -> bool:
    """Whether the first row of a data set has ``input_ids``, that is, the set is tokenised already."""
    first = next(iter(as_rows(rows, "data")), None) if hasattr(rows, "__iter__") else None
    return labelled_column(first) == "input_ids"


def check_template_used(template: QuestionTemplate, sets: Mapping[str, Any]) -> None:
    """Check that a template has a row to be used on.

    Args:
        template: The template. TOFU's, the default, need not be used.
        sets: The data sets by their names. A set that has no length counts as if it had such a row.

    Raises:
        ValueError: No row of a set has ``question`` and ``answer``, and the template is not TOFU's.
    """
    if template == TOFU_TEMPLATE or not all(hasattr(rows, "__len__") for rows in sets.values()):
        return
    if not any(labelled_column(row) == "answer" for rows in sets.values() for row in rows):
        raise ValueError(
            f"question_template has no effect: no row of the sets {', '.join(sets)} has a 'question' and an "
            "'answer'; leave it out"
        )


def duplicate_rows(
    forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Find the retain rows whose tokens equal the tokens of a forget row.

    Args:
        forget: The tokenised forget rows.
        retain: The tokenised retain rows.

    Returns:
        A pair (index of the retain row, index of the first such forget row) for each of them.
    """
    known: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(forget):
        known.setdefault(tuple(row["input_ids"]), index)
    found = ((index, known.get(tuple(row["input_ids"]))) for index, row in enumerate(retain))
    return [(index, same) for index, same in found if same is not None]


def infer_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved beside a model.

    Args:
        model: A causal LM, whose config names the folder or the hub name that it was loaded from. Code of the
            tokenizer runs only if ``loku`` loaded the model with ``trust_remote_code=True``.

    Raises:
        ValueError: The config names no such place, no tokenizer is there, or it needs code of its own.
    """
    merged: Any = getattr(model, MERGED_ADAPTER, None)  # its tokenizer may lie beside the adapter
    name = getattr(model.config, "_name_or_path", "") if merged is None else merged["tokenizer"]
    if not name:
        raise ValueError("this model does not say where it was loaded from; pass its tokenizer as tokenizer=")
    local = Path(name).is_dir()
    if not local and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{name!r}, where this model was loaded from, is not there; pass tokenizer=")
    try:
        trusted = getattr(model, TRUSTED, False)
        tokenizer = load_tokenizer(name, trust_remote_code=trusted, local_files_only=local)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ...
        raise ValueError(f"no tokenizer could be loaded from {name!r}; pass tokenizer= ({error})") from error
    # For some models AutoTokenizer makes an empty one where no tokenizer was saved.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer in {name!r} has only special tokens; pass tokenizer=")
    return tokenizer

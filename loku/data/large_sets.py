"""Retain sets that are larger than memory: tokenised as they are drawn, or read as a stream."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from loku.data.question_templates import TOFU_TEMPLATE, QuestionTemplate
from loku.data.rows import RowTokenizer, as_rows, tokenize_dataset
from loku.data.token_limits import TokenLimits
from loku.data.tokens import TokenizedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAZY_ROWS = 100_000  # greatest number of rows that are tokenised at once; longer sets are tokenised as drawn


class DrawnRows:
    """Rows that are tokenised when they are asked for.

    One warning names the first row that is cut. Another names the first row that is also in the forget set.

    Args:
        rows: The rows, as for ``loku.data.tokenize_dataset``; an iterable without a length may stand for
            them.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut; None does not cut them.
        name: The name of the data set in messages.
        forget: The tokenised forget rows.
        limits: The limits of a model, which each row is checked against when it is drawn; None (default)
            sets none.
        source: The file of the rows, for messages; None (default) if it is not known.
        template: The template of ``question`` and ``answer``; TOFU's by default.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        name: str,
        forget: Iterable[Mapping[str, Any]],
        limits: TokenLimits | None = None,
        source: str | os.PathLike | None = None,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        self.rows = rows
        self._tokenize = RowTokenizer(tokenizer, max_length, name, limits, source, template=template)
        self._forget = {tuple(row["input_ids"]): index for index, row in reversed([*enumerate(forget)])}
        self._warned: set[str] = set()

    def limit(self, limits: TokenLimits | None) -> None:
        """Check each row against the limits of a model from now on; None leaves the limits as they are."""
        if limits is not None:
            self._tokenize.limits = limits

    def first(self, count: int = 100) -> list[TokenizedRow]:
        """Return the first rows, tokenised; ``count`` of them, or all if there are fewer."""
        return [self._tokenize(index, row) for index, row in enumerate(islice(self.rows, count))]

    def _tokenized(self, index: int, row: Any) -> TokenizedRow:
        truncated = self._tokenize.truncated
        row = self._tokenize(index, row)
        if self._tokenize.truncated > truncated:
            self._warn(index, f"was cut to max_length={self._tokenize.max_length} tokens")
        same = self._forget.get(tuple(row["input_ids"]))
        if same is not None:
            self._warn(index, "is also in the forget set (row {same})", same=same)
        return row

    def _warn(self, index: int, problem: str, **values: int) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            name = self._tokenize.name
            warnings.warn(
                f"row {index} of the {name} set {problem.format(**values)}; more such rows are not reported, "
                "because the set is tokenised as it is drawn",
                stacklevel=4,
            )


class LazyRows(DrawnRows, Sequence):
    """A data set of any length that can be indexed, such as a memory-mapped ``datasets.Dataset``.

    It takes the arguments of ``DrawnRows``.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedRow:  # type: ignore[override]  # takes no slices
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        return self._tokenized(index, self.rows[index])


class StreamedRows(DrawnRows):
    """A data set without a length, such as a streaming ``datasets.IterableDataset``.

    ``rows[k]`` is row k of the stream. After its last row the stream begins anew, and k counts on. If the
    rows are asked for in ascending order, the stream is read once, and one row is in memory at a time. A
    smaller k than the last one reads the stream again from its first row.

    It takes the arguments of ``DrawnRows``.

    Raises:
        ValueError: The rows are an iterator, which can be read only once.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        name: str,
        forget: Iterable[Mapping[str, Any]],
        limits: TokenLimits | None = None,
        source: str | os.PathLike | None = None,
        template: QuestionTemplate = TOFU_TEMPLATE,
    ):
        if iter(rows) is rows:
            raise ValueError(
                f"the {name} set is a {type(rows).__name__}, which can be read only once; pass a "
                "datasets.IterableDataset, or another object whose iter() begins anew"
            )
        super().__init__(rows, tokenizer, max_length, name, forget, limits, source, template)
        self._reader: Iterator[tuple[int, Any]] | None = None
        self._next = 0

    def __getitem__(self, index: int) -> TokenizedRow:
        if self._reader is None or index < self._next:
            self._reader, self._next = self._read(), 0
        while True:
            position, row = next(self._reader)
            self._next += 1
            if self._next > index:
                return self._tokenized(position, row)

    def _read(self) -> Iterator[tuple[int, Any]]:
        """Yield each row with its position in the set, from 0, lap after lap."""
        while True:
            position = -1
            for position, row in enumerate(self.rows):
                yield position, row
            if position < 0:
                raise ValueError(f"the {self._tokenize.name} set is empty; it needs at least one row")


def retain_rows(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None = None,
    forget: Iterable[Mapping[str, Any]] = (),
    name: str = "retain",
    limits: TokenLimits | None = None,
    source: str | os.PathLike | None = None,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> list[TokenizedRow] | LazyRows | StreamedRows:
    """Tokenise a retain set now, or row by row as it is drawn if it is large or has no length.

    Args:
        rows: The rows, as for ``loku.data.tokenize_dataset``, or an iterable without a length. ``LazyRows``
            and ``StreamedRows`` are returned as they are, with the limits.
        tokenizer: The tokenizer. It may be None if every row has ``input_ids``.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        forget: The tokenised forget rows, () by default. A drawn row that equals one of them gives a warning.
        name: The name of the data set in messages, "retain" by default.
        limits: The limits of a model, from ``loku.data.token_limits``; None (default) sets none. A row that
            is not held in memory is checked when it is drawn.
        source: The file of the rows, which messages about drawn rows then name; None (default) if it is not
            known.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        A list of tokenised rows; ``LazyRows`` for more than ``LAZY_ROWS`` rows; or ``StreamedRows`` for rows
        without a length.

    Raises:
        ValueError: As for ``loku.data.tokenize_dataset`` and ``StreamedRows``.
    """
    if isinstance(rows, (LazyRows, StreamedRows)):
        rows.limit(limits)
        return rows
    rows = as_rows(rows, name)
    if not hasattr(rows, "__len__"):
        return StreamedRows(rows, tokenizer, max_length, name, forget, limits, source, template)
    if len(rows) > LAZY_ROWS and hasattr(rows, "__getitem__"):
        return LazyRows(rows, tokenizer, max_length, name, forget, limits, source, template)
    return tokenize_dataset(
        rows, tokenizer, max_length=max_length, name=name, limits=limits, template=template
    )

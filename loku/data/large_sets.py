"""Retain sets that are larger than memory: tokenised as they are drawn, or read as a stream."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import islice

from loku.data.rows import RowTokenizer, tokenize_dataset

LAZY_ROWS = 100_000  # a set of more is tokenised as its rows are drawn


class DrawnRows:
    """Rows that are tokenised when asked for. The first that is cut, and the first that is also in the forget
    set, are warned of."""

    def __init__(self, rows, tokenizer, max_length, name, forget):
        self.rows = rows
        self._tokenize = RowTokenizer(tokenizer, max_length, name)
        self._forget = {tuple(row["input_ids"]): index for index, row in reversed([*enumerate(forget)])}
        self._warned = set()

    def first(self, count=100):
        """Its first rows, tokenised."""
        return [self._tokenize(index, row) for index, row in enumerate(islice(self.rows, count))]

    def _tokenized(self, index, row):
        truncated = self._tokenize.truncated
        row = self._tokenize(index, row)
        if self._tokenize.truncated > truncated:
            self._warn(index, f"was cut to max_length={self._tokenize.max_length} tokens")
        same = self._forget.get(tuple(row["input_ids"]))
        if same is not None:
            self._warn(index, "is also in the forget set (row {same})", same=same)
        return row

    def _warn(self, index, what, **values):
        if what not in self._warned:
            self._warned.add(what)
            name = self._tokenize.name
            warnings.warn(
                f"row {index} of the {name} set {what.format(**values)}; more such rows are not reported, "
                "because the set is tokenised as it is drawn",
                stacklevel=4,
            )


class LazyRows(DrawnRows, Sequence):
    """A data set of any length that can be indexed, such as a memory-mapped ``datasets.Dataset``."""

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        return self._tokenized(index, self.rows[index])


class StreamedRows(DrawnRows):
    """A data set without a length, such as a streaming ``datasets.IterableDataset``.

    ``rows[k]`` is its k-th row, going on from the last one that was asked for: asked for in ascending order,
    the set is read once, and one row of it is held. After its end it begins anew, and k counts on.
    """

    def __init__(self, rows, tokenizer, max_length, name, forget):
        if iter(rows) is rows:
            raise ValueError(
                f"the {name} set is a {type(rows).__name__}, which can be read only once; pass a "
                "datasets.IterableDataset, or another object whose iter() begins anew"
            )
        super().__init__(rows, tokenizer, max_length, name, forget)
        self._reader, self._next = None, 0

    def __getitem__(self, index):
        if self._reader is None or index < self._next:
            self._reader, self._next = self._read(), 0
        while True:
            position, row = next(self._reader)
            self._next += 1
            if self._next > index:
                return self._tokenized(position, row)

    def _read(self):
        """(position in the set, row), lap after lap."""
        while True:
            position = -1
            for position, row in enumerate(self.rows):
                yield position, row
            if position < 0:
                raise ValueError(f"the {self._tokenize.name} set is empty; it needs at least one row")


def retain_rows(rows, tokenizer, *, max_length=None, forget=(), name="retain"):
    """``loku.data.tokenize_dataset``, or where the set is large or has no length, rows that are not held.

    Args:
        rows: also an iterable without a length. What this function returned before is returned as it is.
        forget: the tokenised forget set.

    Returns:
        A list, ``LazyRows`` of more than ``LAZY_ROWS`` rows, or ``StreamedRows``.
    """
    if isinstance(rows, DrawnRows):
        return rows
    if not isinstance(rows, (str, Mapping)) and hasattr(rows, "__iter__"):
        if not hasattr(rows, "__len__"):
            return StreamedRows(rows, tokenizer, max_length, name, forget)
        if len(rows) > LAZY_ROWS:
            return LazyRows(rows, tokenizer, max_length, name, forget)
    return tokenize_dataset(rows, tokenizer, max_length=max_length, name=name)

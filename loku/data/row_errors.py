"""Errors of rows: the data set, the row and, for rows of a file, the line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loku.data.files import place_of_row


class BadRow(ValueError):
    """A problem of one row; ``RowError`` adds the name of the data set and the index of the row."""


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        name: The name of its data set.
        index: The index of the row, from 0.
        problem: The reason, for the message.
        place: The place of the row, such as its file and line, for the message; None (default) if it is not
            known.
    """

    def __init__(self, name: str, index: int, problem: object, place: str | None = None):
        where = "" if place is None else f"{place}: "
        super().__init__(f"{where}row {index} of the {name} set: {problem}")
        self.name, self.index, self.problem, self.place = name, index, problem, place


@contextmanager
def row_places(sources: Mapping[str, str | os.PathLike]) -> Iterator[None]:
    """Name the file and the line in each ``RowError`` that leaves the block.

    Args:
        sources: The source of each data set, as for ``loku.data.read_rows``, by the name of the set. A set
            that is not named here keeps its message.
    """
    try:
        yield
    except RowError as error:
        if error.place is not None or error.name not in sources:
            raise
        place = place_of_row(sources[error.name], error.index)
        raise RowError(error.name, error.index, error.problem, place) from error

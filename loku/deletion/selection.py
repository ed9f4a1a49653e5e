"""The rows that a request selects from a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loku.commands.settings import suggestion
from loku.data import as_rows, place_of_row, read_rows
from loku.deletion.texts import column_texts, expression, folded, id_text, row_text

if TYPE_CHECKING:
    from loku.deletion.request import RowSelection

SECONDS = 10.0  # for the regular expression in one row; a text of a MB takes a hundredth of it
_SHOWN = 10  # ids and columns in a message


@dataclass(frozen=True)
class SelectedRows:
    """The rows that a selection finds.

    Attributes:
        rows: The rows, in the order of the source.
        indices: Their indices in the source, from 0.
        total: The number of rows of the source.
        source: The source, as ``loku.data.read_rows`` takes it.
        rest: The rows of the source that were not selected.
        rest_indices: Their indices in the source.
    """

    rows: list[Any]
    indices: list[int]
    total: int
    source: str
    rest: list[Any] = field(default_factory=list)
    rest_indices: list[int] = field(default_factory=list)


def select_rows(selection: RowSelection, name: str) -> SelectedRows:
    """Read a data set, and find the rows of a selection.

    A row is selected if it meets all conditions that the selection has:

    - ``ids``: the value of its ``id_column`` is one of them. Ids are compared as texts, so 7 in JSON is "7"
      in a CSV file, and 7.0 too. "07" is another id. All rows of an id are selected.
    - ``contains``: one of its texts contains the string, also inside of a word. Case, the Unicode form,
      invisible characters, the kind of quotation marks, dashes and white space do not count.
    - ``matches``: the regular expression is found in one of its texts as they stand. The syntax is that of
      Python's ``re`` with the additions of the package ``regex``; ``(?i)`` ignores the case.

    Args:
        selection: The selection.
        name: The name of the set in messages, such as "forget".

    Raises:
        ValueError: No row is found, an id or a column is not there, or the regular expression takes more than
            10 seconds in one row. Or the data cannot be read.
        FileNotFoundError: The data looks like a path, and nothing is there.
    """
    rows = list(as_rows(read_rows(selection.data), name))
    if not rows:
        raise ValueError(f"{name}: {selection.data} is empty")
    conditions = [*_conditions(selection, name, rows)]
    chosen = [all(meets(index, row) for meets in conditions) for index, row in enumerate(rows)]
    if not any(chosen):
        raise ValueError(
            f"{name}: none of the {len(rows)} rows of {selection.data} has {_described(selection)}; it has "
            f"{_columns_there(rows)}"
        )
    found = {
        kind: [index for index, is_chosen in enumerate(chosen) if is_chosen is kind] for kind in (True, False)
    }
    return SelectedRows(
        rows=[rows[index] for index in found[True]],
        indices=found[True],
        total=len(rows),
        source=selection.data,
        rest=[rows[index] for index in found[False]],
        rest_indices=found[False],
    )


def check_holdout(holdout: Sequence[Any], **known: Sequence[Any]) -> None:
    """Refuse hold-out rows that the model knows, or will be trained on.

    Args:
        holdout: The hold-out rows.
        known: The other sets by their names, such as ``forget`` and ``retain``.

    Raises:
        ValueError: A hold-out row has the text of a row of another set.
    """
    for name, rows in known.items():
        first: dict[str, int] = {}
        for index, row in enumerate(rows):
            first.setdefault(row_text(row), index)
        same = [(index, first[text]) for index, row in enumerate(holdout) if (text := row_text(row)) in first]
        if same:
            raise ValueError(
                f"holdout: {len(same)} of its {len(holdout)} rows are also in {name}: row {same[0][0]} is "
                f"row {same[0][1]} of {name}. It must be unknown to the model; take these rows out of it"
            )


def _conditions(
    selection: RowSelection, name: str, rows: Sequence[Any]
) -> Iterator[Callable[[int, Any], bool]]:
    columns = selection.columns
    if selection.ids:
        _check_columns((selection.id_column,), "id_column", rows, selection, name)
        ids = {id_text(value) for value in selection.ids}
        _check_ids(ids, rows, selection, name)
        yield lambda index, row: isinstance(row, Mapping) and id_text(row.get(selection.id_column)) in ids
    if columns:
        _check_columns(columns, "columns", rows, selection, name)
    if selection.contains is not None:
        words = folded(selection.contains)
        if not words:
            raise ValueError(f"{name}: contains is blank or has invisible characters alone; give it a text")
        yield lambda index, row: any(words in folded(text) for text in column_texts(row, columns))
    if selection.matches is not None:
        yield _search(selection, name)


def _search(selection: RowSelection, name: str) -> Callable[[int, Any], bool]:
    assert selection.matches is not None
    pattern = expression(selection.matches)

    def found(index: int, row: Any) -> bool:
        try:
            return any(
                pattern.search(text, timeout=SECONDS) is not None
                for text in column_texts(row, selection.columns)
            )
        except TimeoutError:
            raise ValueError(
                f"{name}: the search for {selection.matches!r} took more than {SECONDS:g} s in "
                f"{place_of_row(selection.data, index)}, row {index}; write it without nested repetitions, "
                "such as (a+)+"
            ) from None

    return found


def _check_columns(
    columns: Iterable[str], field: str, rows: Sequence[Any], selection: RowSelection, name: str
) -> None:
    there = _columns(rows)
    for column in columns:
        if column not in there:
            near = suggestion(column, there)
            raise ValueError(
                f"{name}: no row of {selection.data} has the column {column!r} of {field}; it has "
                f"{_columns_there(rows)}{near}"
            )


def _check_ids(ids: set[str], rows: Sequence[Any], selection: RowSelection, name: str) -> None:
    there = {id_text(row.get(selection.id_column)) for row in rows if isinstance(row, Mapping)}
    if missing := [id_text(value) for value in selection.ids if id_text(value) not in there]:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{name}: {len(missing)} of {len(ids)} ids are not in the column {selection.id_column!r} of "
            f"{selection.data}: {', '.join(missing[:_SHOWN])}{more}"
        )


def _columns(rows: Sequence[Any]) -> list[str]:
    return [*dict.fromkeys(str(column) for row in rows if isinstance(row, Mapping) for column in row)]


def _columns_there(rows: Sequence[Any]) -> str:
    columns = _columns(rows)
    if not columns:
        return "texts without columns"
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return f"the columns {', '.join(columns[:_SHOWN])}{more}"


def _described(selection: RowSelection) -> str:
    conditions = []
    if selection.ids:
        conditions.append(f"one of the {len(selection.ids)} ids in {selection.id_column}")
    if selection.contains is not None:
        conditions.append(f"{selection.contains!r}")
    if selection.matches is not None:
        conditions.append(f"a match of {selection.matches!r}")
    where = f" in {', '.join(selection.columns)}" if selection.columns else ""
    return " and ".join(conditions) + where

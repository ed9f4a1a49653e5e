"""The texts of rows, and the forms of a text in which two texts are compared."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import regex  # type: ignore[import-untyped]  # re has no limit of time

from loku.data import labelled_column
from loku.data.values import as_list, is_missing

_FORMS = {
    "text": ("text",),
    "messages": ("messages", "conversations", "prompt", "completion"),
    "completion": ("prompt", "completion"),
    "answer": ("question", "answer"),
    "output": ("instruction", "input", "output"),
    "input_ids": ("input_ids",),
}
_ROLES = ("role", "from", "type")  # of a message and of a part of its content: no words of the text
# Signs that different keyboards and programs write for the same one. NFKC keeps them apart.
_ALIKE = {
    **dict.fromkeys("‘’‚‛′ʼ`´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–—―−", "-"),
}


class _Characters(dict):
    """A table of ``str.translate`` that is filled as characters come."""

    def __init__(self, replace: Any):
        super().__init__()
        self._replace = replace

    def __missing__(self, code: int) -> str:
        value = self[code] = self._replace(chr(code))
        return value


def _plain_character(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # soft hyphens, joiners and marks of direction
        return ""
    return _ALIKE.get(character, character)


def _letter(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    return character if category[0] in "LMNS" else " "


_PLAIN, _LETTERS = _Characters(_plain_character), _Characters(_letter)


def expression(text: str) -> Any:
    """Compile a regular expression, whose ``search`` takes a ``timeout`` in seconds.

    Args:
        text: The expression.

    Raises:
        ValueError: It is none.
    """
    try:
        return regex.compile(text)
    except regex.error as error:
        raise ValueError(f"{text[:80]!r} is no regular expression: {error}") from error


def texts_in(value: Any) -> Iterator[str]:
    """Yield the strings in a value at any depth, but for the roles of messages.

    Args:
        value: The value of a column.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _ROLES:
                yield from texts_in(inner)
    else:
        for inner in as_list(value) or ():
            yield from texts_in(inner)


def column_texts(row: Any, columns: Collection[str] = ()) -> Iterator[str]:
    """Yield the texts of a row that a query searches.

    Args:
        row: The row: a string or a mapping. Messages are searched in their contents.
        columns: The columns that are searched; a number in one of them counts as the text of its digits.
            () (default) stands for all strings of the row.
    """
    if not columns or not isinstance(row, Mapping):
        yield from texts_in(row)
        return
    for name in columns:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
            yield id_text(value)
        else:
            yield from texts_in(value)


def id_text(value: Any) -> str:
    """Return an id as a text: 7, 7.0 (as pandas fills a column of numbers with gaps) and "7" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def row_text(row: Any) -> str:
    """Return the text of a row that is learnt: its prompt and its answer, without other columns.

    Args:
        row: The row, in any form of ``loku.data.tokenize_dataset``. Another mapping gives all its strings. A
            tokenised row gives its token ids.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return ""
    columns = _FORMS.get(labelled_column(row) or "")
    if columns == ("input_ids",):
        return " ".join(map(str, as_list(row["input_ids"]) or ()))
    values = row.values() if columns is None else (row.get(name) for name in columns)
    return "\n".join(text for value in values for text in texts_in(value))


def compared_text(row: Any) -> str:
    """Return the text by which two rows are the same: the normal form of ``row_text``.

    Args:
        row: The row.
    """
    text = row_text(row)
    return normal_form(text) or text  # punctuation alone has no normal form


def folded(text: str) -> str:
    """Return a text without what a person does not see when searching for words.

    The case, the Unicode form (NFKC), the kind of quotation marks and dashes, invisible characters and the
    kind of white space go.
    """
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN)).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).translate(_PLAIN).split())


def normal_form(text: str) -> str:
    """Return the ``folded`` text without punctuation; letters, marks, digits and symbols such as + stay."""
    return " ".join(folded(text).translate(_LETTERS).split())

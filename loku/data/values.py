"""Values of columns: which are missing, and which are lists and texts."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from loku.data.row_errors import BadRow


def is_missing(value: Any) -> bool:
    """Whether a value stands for a missing one: None, NaN, or the missing values of pandas."""
    if value is None or isinstance(value, Real):
        return value is None or value != value
    return type(value).__name__ in ("NAType", "NaTType")


def without_missing(value: Any) -> Any:
    """Return a value with no missing entries in its dicts, at any depth.

    ``datasets.Dataset`` fills the keys that a dict lacks with None, and pandas fills columns with NaN.
    """
    if isinstance(value, Mapping):
        return {key: without_missing(entry) for key, entry in value.items() if not is_missing(entry)}
    entries = as_list(value)
    return value if entries is None else [without_missing(entry) for entry in entries]


def as_list(value: Any) -> list[Any] | None:
    """Return a list, tuple or array as a list; None if the value is none of these."""
    if isinstance(value, (list, tuple)):
        return list(value)
    values = value.tolist() if hasattr(value, "tolist") else None  # an array, as pandas reads from Parquet
    return values if isinstance(values, list) else None


def check_text(value: Any, name: str) -> str:
    """Return a value that must be a text with more than white space.

    Args:
        value: The value.
        name: The name of the value in messages.

    Raises:
        BadRow: The value is no string, or it is empty or blank.
    """
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is a {type(value).__name__}; it must be a string")
    if not value.strip():
        raise BadRow(f"'{name}' is {'blank' if value else 'empty'}; give it a text, or drop the row")
    return value


def check_unicode(text: str) -> None:
    """Check that a text has no lone surrogate, such as ``"\\ud800"`` in JSON: no tokenizer takes one.

    Raises:
        BadRow: It has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"its text has {text[error.start]!a} after {error.start} characters, one half of a surrogate "
            "pair, which stands for no character"
        ) from None

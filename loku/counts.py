"""Counts that a caller gives: what cannot be one is refused by its name, before anything runs."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def check_counts(least: int = 1, **counts: Any) -> None:
    """Check some counts.

    Args:
        least: The least value, 1 by default.
        counts: The values by their names in messages.

    Raises:
        ValueError: A value is no integer, or it is less than ``least``. The message names the first.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_max_length(max_length: Any, name: str = "max_length") -> None:
    """Check the number of tokens at which rows are cut.

    Args:
        max_length: The number, or None.
        name: The name of the number in messages, "max_length" by default.

    Raises:
        ValueError: It is neither None nor an integer >= 2.
    """
    if max_length is not None:
        try:
            check_counts(2, **{name: max_length})
        except ValueError as error:
            raise ValueError(
                f"{error}; the first token of a row is never predicted. None cuts no row"
            ) from None

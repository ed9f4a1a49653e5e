"""Cells of a grid that add two numbers. Worker processes import this module by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sum:
    """A cell with one summand.

    Args:
        a: The summand.
    """

    a: int = 0


def add(cell: Sum, more: int) -> dict[str, int]:
    """Return the line of a cell. A negative summand fails."""
    if cell.a < 0:
        raise ValueError("less than nothing")
    return {"sum": cell.a + more}

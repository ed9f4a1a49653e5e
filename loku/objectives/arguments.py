"""The arguments of a method: their defaults and their checks."""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One argument of a method, for ``UnlearnConfig.method_args``.

    Args:
        default: The value if none is given.
        help: Its meaning, in one line.
        holds: Whether a value can be right.
        wanted: The values for which it holds, in words: "a number > 0".
    """

    default: Any
    help: str
    holds: Callable[[Any], bool]
    wanted: str

    @classmethod
    def number(
        cls, default: float, help: str, minimum: float = -math.inf, *, above: bool = False
    ) -> "Argument":
        """Make an argument that is a finite number.

        Args:
            default: The default.
            help: The meaning.
            minimum: The least value, -inf by default.
            above: Whether the minimum itself is left out, False by default.
        """

        def holds(value: Any) -> bool:
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            return number and math.isfinite(value) and (value > minimum if above else value >= minimum)

        bound = "" if minimum == -math.inf else f" {'>' if above else '>='} {minimum:g}"
        return cls(default, help, holds, f"a finite number{bound}")

    @classmethod
    def count(cls, default: int, help: str, minimum: int = 0) -> "Argument":
        """Make an argument that is an integer of at least ``minimum``, 0 by default."""

        def holds(value: Any) -> bool:
            integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            return integer and int(value) >= minimum

        return cls(default, help, holds, f"an integer >= {minimum}")

    @classmethod
    def choice(cls, default: str, help: str, choices: tuple[str, ...]) -> "Argument":
        """Make an argument that is one of some texts."""
        return cls(
            default,
            help,
            lambda value: isinstance(value, str) and value in choices,
            " or ".join(f'"{choice}"' for choice in choices),
        )


def resolved(
    method: str, arguments: Mapping[str, Argument], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return all arguments of a method: those that are given, and the defaults of the others.

    Args:
        method: The name of the method, for messages.
        arguments: Its arguments by their names.
        given: The given values by the same names; None for none.

    Raises:
        ValueError: A name is unknown, or a value is one with which no run can be right.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(
            f'method_args must be a dict, or a JSON object such as {{"delta": 0.5}}, got {given!r}'
        )
    unknown = [name for name in given if name not in arguments]
    if unknown:
        known = f"it has {', '.join(arguments)}" if arguments else "it has none"
        beside = "; beta is a setting of its own" if "beta" in unknown else ""
        raise ValueError(f"method_args: method {method!r} has no argument {unknown[0]!r}: {known}{beside}")
    values = {name: given.get(name, argument.default) for name, argument in arguments.items()}
    for name, value in values.items():
        if not arguments[name].holds(value):
            raise ValueError(
                f"method_args: {name} of method {method!r} must be {arguments[name].wanted}, got {value!r}"
                f"{_yaml_hint(value)}"
            )
    return values


def _yaml_hint(value: Any) -> str:
    """Return what to write in place of a text that would be a number in Python, such as "1e-5"."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return "" if math.isnan(number) else ", a text; YAML takes a number with a dot, such as 1.0e-5"

"""The fields of ``UnlearnConfig`` as options of a command and as keys of a YAML file.

An option and a scalar of the file are read by the type hint of their field, whatever fields there are.
``transformers.HfArgumentParser`` has no lists for fields that also take a text. Two other libraries were
tried:

- tyro 1.0 reads no YAML. It turns each ``dict | str | None`` field into subcommands, which break other
  options. It reads the sweep ``qv`` as the list ``["qv"]``.
- jsonargparse 4.53 names neither the file nor the line of a wrong YAML value, and takes the last of two equal
  keys without an error. It rejects the word ``no`` for a text. It suggests no name for a misspelt one, and
  prints a hundred lines of usage before each error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import json
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml

from loku.commands.foreign_options import own_names

# transformers' hint is a path alone. True is the newest checkpoint, as for its trainer's ``train``.
ALSO = {"resume_from_checkpoint": bool}
_MOST_BYTES = 2**18  # of a file of settings
_MOST_LEVELS = 20
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclasses.dataclass
class Field:
    """A field of a dataclass, which reads its value from the text of an option or from a YAML value.

    Attributes:
        name: The name of the field.
        types: The members of its type hint; ``list`` stands for ``list[str]``, and so on.
        choices: The texts of its ``Literal``; () without one.
    """

    name: str
    types: list[type]
    choices: tuple[str, ...]

    @property
    def many(self) -> bool:
        """Whether the field takes a list."""
        return list in self.types

    def read(self, text: str) -> Any:
        """Read one value from a text; ``ArgumentTypeError`` if the field takes no such value."""
        if text in self.choices:
            return text
        # In a field that takes texts, 1 and yes are texts.
        words = {"true": True, "false": False} if str in self.types else BOOLEANS
        if bool in self.types and text.lower() in words:
            return words[text.lower()]
        texts = any(kind is str or issubclass(kind, enum.Enum) for kind in self.types)
        if not self.choices and (self.many or texts):
            return text
        numbers: tuple[type[int] | type[float], ...] = (int, float)
        for number in (kind for kind in numbers if kind in self.types):
            try:
                return number(text)
            except ValueError:
                pass
        if dict in self.types:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                return value
        raise argparse.ArgumentTypeError(f"{_short(repr(text))} is not {self.expected()}")

    def from_yaml(self, value: Any) -> Any:
        """Convert a YAML value; ``ArgumentTypeError`` if the field takes no such value."""
        if isinstance(value, bool) and bool not in self.types and str in self.types:
            value = "yes" if value else "no"  # YAML takes the word no for a boolean
        if isinstance(value, str) and self.choices:
            return self.read(value)
        if type(value) in self.types or (value is None and types.NoneType in self.types):
            return value
        if value is None or isinstance(value, (list, dict)):
            shown = json.dumps(value, default=str)
            raise argparse.ArgumentTypeError(f"{_short(shown)} is not {self.expected()}")
        return self.read(str(value))

    def expected(self) -> str:
        """Describe the values that the field takes."""
        names: dict[type, str] = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: f"one of {', '.join(self.choices)}" if self.choices else "a text",
            list: "a list",
            dict: "a JSON object",
        }
        return " or ".join(names[kind] for kind in names if kind in self.types) or "a text"


def _short(text: str, most: int = 100) -> str:
    """Cut a text for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [hint]


def read_fields(cls: type) -> dict[str, Field]:
    """Return the fields that a dataclass takes as arguments, by their names."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kinds: list[Any] = []
        choices: tuple[str, ...] = ()
        for member in _members(hints[field.name]):
            if typing.get_origin(member) is typing.Literal:
                kinds += map(type, typing.get_args(member))
                choices += tuple(value for value in typing.get_args(member) if isinstance(value, str))
            else:
                kinds.append(typing.get_origin(member) or member)
        kinds.append(ALSO.get(field.name))
        kinds = [kind for kind in kinds if isinstance(kind, type)]
        fields[field.name] = Field(field.name, kinds, choices)
    return fields


def _add_field(parser: argparse._ActionsContainer, field: Field, help: str, grid: bool) -> None:
    how: dict[str, Any] = {"type": field.read, "default": argparse.SUPPRESS, "dest": field.name}
    how["metavar"] = field.name.split("_")[-1].upper()
    if field.choices:
        how["metavar"] = "{" + ",".join(field.choices) + "}"
    if field.many:
        how["nargs"] = "+"
    elif bool in field.types:
        how.update(nargs="?", const=True)
        if str not in field.types:
            how["metavar"] = "BOOL"
    elif grid and dict not in field.types:
        how["nargs"] = "+"
    parser.add_argument(f"--{field.name}", help=help, **how)
    if "_" in field.name:
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=argparse.SUPPRESS, **how)


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    own_title: str,
    common_title: str,
    common: tuple[str, ...],
    grid: bool = False,
) -> dict[str, Field]:
    """Add an option for each field of a dataclass, in two sections, with the help of the fields' metadata.

    Args:
        parser: The parser of the command.
        cls: The dataclass.
        own_title: The title of the section of the fields that ``cls`` adds to its bases.
        common_title: The title of the section of the fields of its bases.
        common: The names of those fields of the bases that the help shows; the others are options without
            help.
        grid: Whether an option of one value takes several, which become a list; False by default. Booleans
            and JSON objects have one value.

    Returns:
        The fields by their names. Values that are not given are absent from the namespace.
    """
    fields = read_fields(cls)
    inherited = {field.name for base in cls.__mro__[1:-1] for field in dataclasses.fields(base)}
    groups = {
        True: parser.add_argument_group(own_title),
        False: parser.add_argument_group(common_title),
    }
    for field in dataclasses.fields(cls):
        if field.name in fields:
            own = field.name not in inherited
            shown = own or field.name in common
            _add_field(groups[own], fields[field.name], _help(field) if shown else argparse.SUPPRESS, grid)
    return fields


def _help(field: dataclasses.Field) -> str:
    """The first paragraph of the text in a field's metadata, and its default."""
    text = " ".join(field.metadata["help"].strip().split("\n\n")[0].split())
    if field.default is not None and field.default is not dataclasses.MISSING:
        text = f"{text.removesuffix('.')} (default: {getattr(field.default, 'value', field.default)})"
    return text.replace("%", "%%")


def joined(fields: Mapping[str, Field], options: argparse.Namespace) -> dict[str, Any]:
    """Return the given values of the fields, ``{name: value}``, as the dataclass takes them.

    A list of one text becomes that text if the field takes texts.

    Args:
        fields: The fields by their names.
        options: The parsed options.
    """
    given = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == 1 and str in fields[name].types:
            given[name] = value[0]
    return given


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with our names of another trainer's option, or with the name most like it.

    Args:
        name: The unknown name, perhaps with leading dashes.
        known: The known names, with the same dashes.

    Returns:
        The suggestion, or "" if there is none.
    """
    known = [*known]
    bare = name.lstrip("-")
    ours = [name.removesuffix(bare) + own for own in own_names(bare)]
    near = [own for own in ours if own in known] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class SettingsLoader(yaml.SafeLoader):
    """The safe loader without aliases, which multiply values, and without deep nesting, which is slow."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias: write the value itself", problem_mark=mark)
        if self.levels > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def read_yaml(
    path: str | os.PathLike, fields: Mapping[str, Field], others: Collection[str]
) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Args:
        path: The file.
        fields: The fields by their names.
        others: The names that the file may have beside the fields; their values are texts.

    Returns:
        The settings, ``{name: value}``.

    Raises:
        ValueError: The file is not YAML, has an alias, or has more than 256 KiB. Or a setting is unknown,
            wrong or there twice. The message names the file and the line.
    """
    with open(path, "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, so it is no file of settings")
    try:
        loader = SettingsLoader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML of settings: {_short(str(error), 500)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line")
    settings: dict[str, Any] = {}
    for key_node, _ in node.value if node is not None else ():
        place, key = f"{path}, line {key_node.start_mark.line + 1}", key_node.value
        name, value = key.replace("-", "_"), values.get(key)
        if name in settings:
            raise ValueError(f"{place}: {_short(key)} is there twice")
        if name in others:
            if not isinstance(value, str):
                raise ValueError(f"{place}: {key} must be a text, got {_short(repr(value))}")
            settings[name] = value
        elif name in fields:
            try:
                settings[name] = fields[name].from_yaml(value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{place}: {key}: {error}") from None
        else:
            raise ValueError(
                f"{place}: there is no setting {_short(key)!r}{suggestion(name, [*fields, *others])}"
            )
    return settings

"""The fields of ``UnlearnConfig`` as options of a command and as keys of a YAML file.

``transformers.HfArgumentParser`` does the first for most types, but not for a union such as
``bool | str | None``, and takes no lists where a string is allowed. Here both an option and a scalar of the
file are read by the field's type hint, whatever fields there are.
"""

import argparse
import dataclasses
import difflib
import enum
import json
import types
import typing

import yaml

# transformers' hint is a path alone; true is the newest checkpoint, as for its trainer's ``train``.
ALSO = {"resume_from_checkpoint": bool}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclasses.dataclass
class Field:
    """How a value is read: from the text of an option or from what YAML made of it."""

    name: str
    types: list  # the members of its type hint, of generic ones what is before the bracket
    choices: tuple  # the texts of a Literal

    @property
    def many(self):
        return list in self.types

    def read(self, text):
        """One value from text; ``ArgumentTypeError`` if it is none."""
        if text in self.choices:
            return text
        # 1 and yes may be words in a field that also takes words.
        words = {"true": True, "false": False} if str in self.types else BOOLEANS
        if bool in self.types and text.lower() in words:
            return words[text.lower()]
        texts = any(kind is str or issubclass(kind, enum.Enum) for kind in self.types)
        if not self.choices and (self.many or texts):
            return text
        for number in (kind for kind in (int, float) if kind in self.types):
            try:
                return number(text)
            except ValueError:
                pass
        if dict in self.types:
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = None
            if isinstance(value, dict):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {self.expected()}")

    def from_yaml(self, value):
        """The value of a key; ``ArgumentTypeError`` if the field takes no such value."""
        if isinstance(value, bool) and bool not in self.types and str in self.types:
            value = "yes" if value else "no"  # what YAML took for a boolean, such as the word no
        if isinstance(value, str) and self.choices:
            return self.read(value)
        if type(value) in self.types or (value is None and types.NoneType in self.types):
            return value
        if value is None or isinstance(value, (list, dict)):
            raise argparse.ArgumentTypeError(f"{json.dumps(value)} is not {self.expected()}")
        return self.read(str(value))

    def expected(self):
        names = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: f"one of {', '.join(self.choices)}" if self.choices else "a text",
            list: "a list",
            dict: "a JSON object",
        }
        return " or ".join(names[kind] for kind in names if kind in self.types) or "a text"


def _members(hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [hint]


def read_fields(cls):
    """``{name: Field}`` of a dataclass's arguments."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kinds, choices = [], ()
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


def _add_field(parser, field, help):
    how = {"type": field.read, "default": argparse.SUPPRESS, "dest": field.name}
    how["metavar"] = field.name.split("_")[-1].upper()
    if field.choices:
        how["metavar"] = "{" + ",".join(field.choices) + "}"
    if field.many:
        how["nargs"] = "+"
    elif bool in field.types:
        how.update(nargs="?", const=True)
        if str not in field.types:
            how["metavar"] = "BOOL"
    parser.add_argument(f"--{field.name}", help=help, **how)
    if "_" in field.name:
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=argparse.SUPPRESS, **how)


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    own_title: str,
    common_title: str,
    common: tuple[str, ...],
) -> dict[str, Field]:
    """Add an option for each field of a dataclass, in two sections, with the help of the fields' metadata.

    Args:
        parser: The parser of the command.
        cls: The dataclass.
        own_title: The title of the section of the fields that ``cls`` adds to its bases.
        common_title: The title of the section of the fields of its bases.
        common: The names of those fields of the bases that the help shows; the others are options without
            help.

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
            _add_field(groups[own], fields[field.name], _help(field) if shown else argparse.SUPPRESS)
    return fields


def _help(field: dataclasses.Field) -> str:
    """The first paragraph of the text in a field's metadata, and its default."""
    text = " ".join(field.metadata["help"].strip().split("\n\n")[0].split())
    if field.default is not None and field.default is not dataclasses.MISSING:
        text = f"{text.removesuffix('.')} (default: {getattr(field.default, 'value', field.default)})"
    return text.replace("%", "%%")


def joined(fields, options):
    """What was given for the fields, as the dataclass takes it: a list of one is its value where a text may
    stand."""
    given = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == 1 and str in fields[name].types:
            given[name] = value[0]
    return given


def suggestion(name, known):
    """ ", did you mean ...?" if there is a name that looks like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def read_yaml(path, fields, others):
    """The settings in a YAML file, ``{name: value}``.

    others: names beside the fields that the file may have; their values are texts.
    Raises ``ValueError``, which names the file and the line.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line")
    settings = {}
    for key_node, _ in node.value:
        place, key = f"{path}, line {key_node.start_mark.line + 1}", key_node.value
        name, value = key.replace("-", "_"), values.get(key)
        if name in settings:
            raise ValueError(f"{place}: {key} is there twice")
        if name in others:
            if not isinstance(value, str):
                raise ValueError(f"{place}: {key} must be a text, got {value!r}")
            settings[name] = value
        elif name in fields:
            try:
                settings[name] = fields[name].from_yaml(value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{place}: {key}: {error}") from None
        else:
            raise ValueError(f"{place}: there is no setting {key!r}{suggestion(name, [*fields, *others])}")
    return settings

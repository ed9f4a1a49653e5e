"""The values of a YAML file, each with its line: what is wrong in a request is named with its place.

YAML reads ``no`` as false, ``0042`` as 34 and ``2026-01-31`` as a date. A text is taken as it is written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from loku.commands.settings import SettingsLoader, suggestion

_MOST_BYTES = 2**20  # of a file
_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
# What a person meant who wrote what YAML does not read, by words of its message.
_ADVICE = {
    "'\\t' that cannot start": "indent with spaces, and put none but spaces after the colon",
    "unknown escape character": "write a text with backslashes in single quotes",
    "mapping values are not allowed": "quote a text with a colon in it, and indent fields equally",
    "but found another document": "a file has one request: take out the line ---",
    "cannot start any token": "quote a text that begins with this character",
}


class YamlValue:
    """A value of a YAML file.

    Args:
        file: The file.
        node: The node of the value.
        name: The path of its field, such as "retain.corpus"; "" for the whole file.
    """

    def __init__(self, file: Path, node: yaml.Node, name: str):
        self.file, self.node, self.name = file, node, name

    @property
    def line(self) -> int:
        """The line where the value begins, from 1."""
        return self.node.start_mark.line + 1

    def error(self, problem: object) -> ValueError:
        """Return the error of a problem, which names the file, the line and the field."""
        field = f"{self.name}: " if self.name else ""
        return ValueError(f"{self.file}, line {self.line}: {field}{problem}")

    @property
    def is_mapping(self) -> bool:
        """Whether the value has fields."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    @property
    def is_null(self) -> bool:
        """Whether the value is written as ``null`` or ``~``; an empty one is refused wherever it is read."""
        return self.node.tag.endswith(":null") and self.node.value != ""

    def fields(self, known: Iterable[str] | None = None) -> dict[str, YamlValue]:
        """Return the fields of a mapping.

        Args:
            known: The names that it may have; None (default) takes any.

        Raises:
            ValueError: It is no mapping, or a field is unknown, there twice or has no value.
        """
        if not self.is_mapping:
            raise self.error(f"is {self._kind()}; it must be a mapping, one `name: value` on each line")
        known = None if known is None else [*known]
        found: dict[str, YamlValue] = {}
        for key, node in self.node.value:
            place = YamlValue(self.file, key, self.name)
            if not isinstance(key, yaml.ScalarNode):
                raise place.error(f"a field has the name {place._kind()}; a name is a text")
            name = key.value
            value = YamlValue(self.file, node, f"{self.name}.{name}" if self.name else name)
            if known is not None and name not in known:
                near = suggestion(name, known) or f"; the fields are {', '.join(known)}"
                raise place.error(f"there is no field {_short(name)!r}{near}")
            if name in found:
                raise place.error(f"the field {_short(name)!r} is there twice")
            if isinstance(node, yaml.ScalarNode) and node.value == "" and not node.style:
                raise value.error("has no value; give it one, or take the line out")
            found[name] = value
        return found

    def items(self) -> list[YamlValue]:
        """Return the entries of a list, at least one.

        Raises:
            ValueError: It is no list, or it is empty.
        """
        if not self.is_list:
            raise self.error(f"is {self._kind()}; it must be a list, such as [a, b]")
        if not self.node.value:
            raise self.error("is an empty list; give it an entry, or take the line out")
        return [YamlValue(self.file, node, self.name) for node in self.node.value]

    def text(self) -> str:
        """Return the text as it is written, with more than white space.

        Raises:
            ValueError: It is no text, or a blank one.
        """
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error(f"is {self._kind()}; it must be a text")
        self._check_tag()
        if not self.node.value.strip():
            raise self.error("is blank; give it a text, or take the line out")
        return self.node.value

    def texts(self) -> tuple[str, ...]:
        """Return a list of texts.

        Raises:
            ValueError: It is no list of texts, it is empty, or a text is there twice.
        """
        values: dict[str, None] = {}
        for item in self.items():
            text = item.text()
            if text in values:
                raise item.error(f"{_short(text)!r} is there twice")
            values[text] = None
        return tuple(values)

    def choice(self, choices: Iterable[str]) -> str:
        """Return one of some texts; ``ValueError`` if it is another."""
        text, choices = self.text(), [*choices]
        if text not in choices:
            near = suggestion(text, choices)
            raise self.error(f"is {_short(text)!r}; it must be one of {', '.join(choices)}{near}")
        return text

    def boolean(self) -> bool:
        """Return true or false; ``ValueError`` if it is neither."""
        text = self.text()
        if text.lower() not in _WORDS:
            raise self.error(f"is {_short(text)!r}; it must be true or false")
        return _WORDS[text.lower()]

    def whole(self, least: int) -> int:
        """Return a whole number; ``ValueError`` if it is none, or less than ``least``."""
        text = self.text()
        try:
            value = int(text)
        except ValueError:
            raise self.error(f"is {_short(text)!r}; it must be a whole number") from None
        if value < least:
            raise self.error(f"is {_short(text)}; it must be at least {least}")
        return value

    def number(self, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number.

        Args:
            above: The number is greater than this.
            least: The number is not less than this.
            most: The number is not greater than this.

        Raises:
            ValueError: It is no number, or is out of the range.
        """
        text = self.text()
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"is {_short(text)!r}; it must be a number") from None
        bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
        bounds += [f"<= {most:g}"] * (most < math.inf)
        if not (math.isfinite(value) and value > above and least <= value <= most):
            raise self.error(f"is {_short(text)}; it must be {' and '.join(bounds) or 'finite'}")
        return value

    def plain(self) -> Any:
        """Return the value as JSON has it: a date and a time are the texts that are written.

        Raises:
            ValueError: A field is there twice, or a value is tagged as one of another program.
        """
        if self.is_mapping:
            return {name: value.plain() for name, value in self.fields().items()}
        if self.is_list:
            return [YamlValue(self.file, node, self.name).plain() for node in self.node.value]
        self._check_tag()
        if (
            self.node.tag.rpartition(":")[2] in ("int", "float", "bool", "null")
            and ":" not in self.node.value
        ):
            if re.fullmatch(r"[-+]?0[0-9_]+", self.node.value):
                raise self.error(f"{self.node.value} is octal in YAML; write it without the leading 0")
            try:
                value = yaml.constructor.SafeConstructor().construct_object(self.node)
            except ValueError:  # such as an integer of 10000 digits
                raise self.error(f"{_short(self.node.value)!r} is no number") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"{self.node.value} is not finite")
            return value
        return self.node.value

    def _check_tag(self) -> None:
        prefix, _, tag = self.node.tag.rpartition(":")
        if prefix != "tag:yaml.org,2002" or tag not in _TAGS:
            raise self.error(f"has the tag {_short(self.node.tag)}; write the value without a tag")

    def _kind(self) -> str:
        if isinstance(self.node, yaml.ScalarNode):
            return f"the text {_short(self.node.value)!r}" if self.node.value else "empty"
        return "a mapping" if self.is_mapping else "a list"


def read_yaml_values(path: str | os.PathLike) -> YamlValue:
    """Read a YAML file whose values know their places.

    Args:
        path: The file: UTF-8 with or without a byte order mark, and at most 1 MiB.

    Returns:
        The value of the whole file, a mapping. It has no alias, and is nested at most 20 deep.

    Raises:
        ValueError: There is no such file, it is empty, or it is not such YAML. The message names the line.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes, so it is no request; name files of rows")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {_line(data[: error.start].decode())} is not text in UTF-8 ({error.reason}); save "
            "the file as UTF-8"
        ) from error
    try:
        node = SettingsLoader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{path}, line {_line(text[: error.position])}: YAML takes no character U+{error.character:04X}"
        ) from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(_yaml_problem(path, error)) from error
    if node is None:
        raise ValueError(f"{path} is empty")
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path}, line 1: the file must have fields, one `name: value` on each line")
    return YamlValue(path, node, "")


def _line(before: str) -> int:
    return before.count("\n") + 1


def _yaml_problem(path: Path, error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be read"
    advice = next((f"; {advice}" for words, advice in _ADVICE.items() if words in problem), "")
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}" if mark else ""
    begin = ""
    if error.context and error.context_mark and mark and error.context_mark.line != mark.line:
        begin = f" ({error.context} that begins in line {error.context_mark.line + 1})"
    return f"{path}{where} is not YAML: {problem}{begin}{advice}"


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."

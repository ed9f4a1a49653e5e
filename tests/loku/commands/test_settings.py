"""Options and settings files are read by the type hints of the fields."""

import dataclasses
import re
from typing import Any, Literal

import pytest

from loku.commands.settings import read_fields, read_yaml


@dataclasses.dataclass
class Hints:
    path_or_true: bool | str | None = None
    size: str | int | None = None
    mapping: dict[str, Any] | None = None
    names: list[str] | str | None = None
    word: Literal["no", "yes"] = "no"
    share: float = 0.5
    count: int = 1
    flag: bool = False


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("path_or_true", "true", True),
        ("path_or_true", "yes", "yes"),
        ("size", "4GiB", "4GiB"),
        ("mapping", '{"dtype": "bfloat16"}', {"dtype": "bfloat16"}),
        ("names", "a", "a"),
        ("word", "yes", "yes"),
        ("share", "1e-3", 1e-3),
        ("count", "3", 3),
        ("flag", "no", False),
    ],
)
def test_values_are_read_by_their_hints(name, text, value):
    read = read_fields(Hints)[name].read(text)
    assert read == value and type(read) is type(value)


def test_a_settings_file_is_read_by_hints_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "path_or_true: true\nsize: 12\nmapping: {a: 1}\nnames: [a]\nword: no\nshare: 1e-3\ncount: 2\n"
        "model: m\n"
    )
    assert read_yaml(path, read_fields(Hints), ("model",)) == {
        "path_or_true": True,
        "size": 12,
        "mapping": {"a": 1},
        "names": ["a"],
        "word": "no",
        "share": 1e-3,
        "count": 2,
        "model": "m",
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("shares: 1", "there is no setting 'shares'; did you mean share?"),
        ("count: 1.5", "count: '1.5' is not a whole number"),
        ("count: [1]", "count: [1] is not a whole number"),
        ("share:", "share: null is not a number"),
        ("word: maybe", "word: 'maybe' is not one of no, yes"),
        ("mapping: [1]", "mapping: [1] is not a JSON object"),
        ("model: 1", "model must be a text, got 1"),
        ("flag: true", "flag is there twice"),
    ],
)
def test_settings_files_name_the_line(line, problem, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"flag: true\n\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {problem}")):
        read_yaml(path, read_fields(Hints), ("model",))

"""Options and settings files are read by the type hints of the fields."""

import argparse
import dataclasses
import re
from typing import Any, Literal

import pytest

from loku.commands.settings import add_fields, joined, read_fields, read_yaml


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


def test_options_of_a_grid_take_several_values():
    @dataclasses.dataclass
    class Inherited(Hints):  # whose fields need no help
        pass

    parser = argparse.ArgumentParser()
    fields = add_fields(parser, Inherited, "own", "common", (), grid=True)
    line = "--share 1e-3 2e-3 --count 3 --word no yes --names a b --flag --size 4GiB --mapping {}"
    options = parser.parse_args(line.split())
    assert joined(fields, options) == {
        "share": [1e-3, 2e-3],
        "count": [3],
        "word": ["no", "yes"],
        "names": ["a", "b"],  # one value
        "flag": True,
        "size": "4GiB",
        "mapping": {},
    }


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


# Nine levels of nine aliases each would be 10^8 texts.
LAUGHS = "\n".join(
    ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LAUGHS, 'an alias: write the value itself\n  in "<byte string>", line 2, column 10'),
        ("count: &c 1\nsize: *c", "an alias: write the value itself"),
        ("mapping: " + "[" * 50_000, "nested too deeply"),
        ("mapping: " + "{a: " * 50_000, "is not YAML of settings"),
        ("count: " + "1" * 10_000, "is not YAML of settings"),
        ("size: 2001-99-99", "is not YAML of settings"),
        ("? [a, b]\n: 1", "is not YAML of settings"),
        ("size: !!python/object/apply:os.system [ls]", "is not YAML of settings"),
        ("size: \udcff", "is not YAML of settings"),
        ("names: a\x00b", "is not YAML of settings"),
        ("#" * 2**18 + "\n", "has more than 262144 bytes"),
        ("count: [" + "lol, " * 10_000 + "]", 'line 1: count: ["lol", "lol"'),
        ("count: [2001-01-01]", 'count: ["2001-01-01"] is not a whole number'),
        ("k" * 100_000 + ": 1", "line 1"),
        ("? " + "k" * 100_000 + "\n: 1", "line 1: there is no setting 'kkk"),
        ("mapping: " + "lol" * 50_000, "line 1: mapping: 'lollol"),
        ("model: [" + "lol, " * 10_000 + "]", "line 1: model must be a text, got ['lol'"),
    ],
)
def test_hostile_settings_files(text, problem, tmp_path):
    """Each gets one short message."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        read_yaml(path, read_fields(Hints), ("model",))
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1000


def test_an_endless_settings_file():
    with pytest.raises(ValueError, match="has more than 262144 bytes"):
        read_yaml("/dev/zero", read_fields(Hints), ())


def test_a_hostile_option():
    for text in ("[" * 100_000, "{" * 100_000, '{"a": ' + "1" * 10_000 + "}"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a JSON object") as error:
            read_fields(Hints)["mapping"].read(text)
        assert len(str(error.value)) < 200

"""SECURITY.md names a test for each promise, and each test is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)))
SCRIPTS = sorted(set(re.findall(r"`((?:scripts|configs)/[\w./]+)`", TEXT)))


def rows():
    """The cells of each row of a table, without the header."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.M):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_each_promise_has_a_test():
    promises = list(rows())
    assert len(promises) > 20
    assert [row for row in promises if not re.fullmatch(r"(`tests/[\w/.:]+`(, )?)+", row[-1])] == []


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_tests_are_there(file, name):
    functions = {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert functions and (not name or name in functions)


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_scripts_are_there(path):
    assert (ROOT / path).is_file()

"""The pages of the documentation, their blocks of code and their commands, as parameters of tests.

A test with the argument ``page`` runs for each page, ``python_block`` for each different block of Python,
and ``command`` for each command of a block of shell and for each Python command in the text.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n)?^```(\w+)\n(.*?)^```", re.S | re.M)
ASSIGNMENT = re.compile(r"^\w+=\$\((.*)\)$")
INLINE_COMMAND = re.compile(r"`(python (?:-m|\w+/)[^`]+)`")


class Block(NamedTuple):
    """A block of code, and the comment on the line before it, or ""."""

    page: str
    marker: str
    language: str
    text: str


class Command(NamedTuple):
    """A command and its arguments, without comments. ``NAME=$(COMMAND)`` counts as COMMAND."""

    page: str
    arguments: tuple[str, ...]


def text_of(page: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str) -> list[Block]:
    """The blocks of all pages in a language."""
    found = [Block(page, *match) for page in PAGES for match in BLOCK.findall(text_of(page))]
    return [block for block in found if block.language == language]


def commands() -> list[Command]:
    """The commands of all pages, each once for a page."""
    lines = [(block.page, line) for block in blocks("sh") for line in _shell_lines(block.text)]
    for page in PAGES:
        prose = BLOCK.sub("", text_of(page))
        lines += [(page, " ".join(line.split())) for line in INLINE_COMMAND.findall(prose)]
    found = []
    for page, line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(Command(page, tuple(words[:end])))
            words = words[end + 1 :]
    return list(dict.fromkeys(found))


def _shell_lines(text):
    """The lines of a block, joined where they end in a backslash or inside of quotes."""
    lines, rest = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        rest += line
        try:
            shlex.split(rest, comments=True)
        except ValueError:  # a quotation is open
            rest += "\n"
            continue
        lines.append(ASSIGNMENT.sub(r"\1", rest))
        rest = ""
    assert not rest
    return lines


def _name(value):
    if isinstance(value, Block):
        return f"{value.page}: {value.text.splitlines()[-1].strip()}"
    return f"{value.page}: {' '.join(value.arguments).splitlines()[0]}"


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES)
    if "python_block" in metafunc.fixturenames:
        once = {block.text: block for block in blocks("python")}
        metafunc.parametrize("python_block", once.values(), ids=_name)
    if "command" in metafunc.fixturenames:
        metafunc.parametrize("command", commands(), ids=_name)

"""A document of a few kinds of blocks, as Markdown and as one HTML file.

A document may quote anybody: the name of a requester, or that of a file. Such a text is shown as it is, and
never taken for markup. Characters that would hide it or turn it around are replaced.
"""

from __future__ import annotations

import base64
import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    """A heading of a level from 1 to 4."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a strong one stands out."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts. Every row has as many cells as there are columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG file, by its path in the folder of the document, and what it shows."""

    file: str
    caption: str


Block: TypeAlias = Heading | Paragraph | Table | Code | Picture

_STYLE = """\
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { border-bottom: 1px solid #ccc; padding-bottom: .2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; }
th { background: #f3f3f3; }
strong { font-size: 1.15em; }
pre { background: #f3f3f3; padding: .6em; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
figure { margin: 1em 0; }
@media print { h2 { break-after: avoid; } tr, figure { break-inside: avoid; } }"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return a document as Markdown with GitHub's tables.

    Args:
        blocks: The document.
    """
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_md(block.text)}"
    if isinstance(block, Paragraph):
        return f"**{_md(block.text)}**" if block.strong else _md(block.text)
    if isinstance(block, Code):
        lines = [clean(line) for line in block.lines]
        longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join([fence, *lines, fence])
    if isinstance(block, Picture):
        return f"![{_md(block.caption)}]({block.file})"
    rows = [block.columns, ("---",) * len(block.columns), *block.rows]
    return "\n".join(
        f"| {' | '.join(cell if index == 1 else _md(cell) for cell in row)} |"
        for index, row in enumerate(rows)
    )


def to_html(blocks: Sequence[Block], directory: Path) -> str:
    """Return a document as one HTML file without scripts, which loads nothing.

    The pictures are inside of it. Its policy forbids everything else, should a viewer find anything.

    Args:
        blocks: The document. The first heading is its title.
        directory: The folder of the pictures.

    Raises:
        OSError: A picture cannot be read.
    """
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    head = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
    ]
    return "\n".join([*head, *(_html(block, directory) for block in blocks), "</body>", "</html>"]) + "\n"


def _html(block: Block, directory: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        text = _text(block.text)
        return f"<p><strong>{text}</strong></p>" if block.strong else f"<p>{text}</p>"
    if isinstance(block, Code):
        return f"<pre>{_text(chr(10).join(map(clean, block.lines)), keep_lines=True)}</pre>"
    if isinstance(block, Picture):
        data = base64.b64encode((directory / block.file).read_bytes()).decode("ascii")
        caption = _text(block.caption)
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    rows = [_row("th", block.columns), *(_row("td", row) for row in block.rows)]
    return "\n".join(["<table>", *rows, "</table>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(text: str, keep_lines: bool = False) -> str:
    return html.escape(text if keep_lines else clean(text), quote=True)


def clean(text: str) -> str:
    """A text on one line. Characters that are not seen, such as changes of direction, are marked."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isspace():
        return " "
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn")
    return "\N{REPLACEMENT CHARACTER}" if hidden else character


def _md(text: str) -> str:
    """A text that Markdown shows as it is. A single underscore inside of a word needs no escape."""
    text = re.sub(r"[\\`*\[\]<>#|~&$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", clean(text))
    return re.sub(r"(?i)(?<=http)(?=://)|(?<=https)(?=://)|(?<=www)(?=\.)|(?=@)", r"\\", text)  # no links

"""Data sets by name: files and the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FILE_SUFFIXES = (".json", ".jsonl", ".txt")


def read_rows(source: str | os.PathLike) -> list[Any] | Dataset:
    """Read a data set for ``loku.unlearn`` and ``loku.evaluation.evaluate``.

    Args:
        source: One of three forms. A ``.txt`` file has a text on each line; empty lines are passed over. A
            ``.json`` or ``.jsonl`` file has a JSON object on each line, as TOFU's files do, or one JSON list.
            ``NAME[:CONFIG[:SPLIT]]`` names a data set on the hub, such as
            ``locuslab/TOFU:forget10_perturbed``; its split is "train" by default, and it needs the package
            ``datasets``.

    Returns:
        The rows: strings or the values of the JSON file, or the data set of the hub.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not UTF-8, or it or one of its lines is not JSON.
        ImportError: The data set is on the hub, and ``datasets`` is not installed.
    """
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES:
        return _from_hub(str(source))
    text = _text(path)
    if path.suffix == ".txt":
        return [line for _, line in _lines(path, text)]
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    rows = []
    for number, line in _lines(path, text):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def place_of_row(source: str | os.PathLike, index: int) -> str:
    """Return the place of a row as a person looks for it: the file and the line, if the source has lines.

    Args:
        source: The source, as for ``read_rows``.
        index: The index of the row, from 0.
    """
    path = Path(source)
    if path.suffix in FILE_SUFFIXES and path.is_file():
        text = _text(path)
        if path.suffix == ".txt" or not text.lstrip().startswith("["):
            return f"{path}, line {_lines(path, text)[index][0]}"
    return str(source)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _lines(path: Path, text: str) -> list[tuple[int, str]]:
    """Return the lines that are not empty, each with its number from 1."""
    lines = text.splitlines() if path.suffix == ".txt" else text.split("\n")  # JSON may hold other separators
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _from_hub(source: str) -> Dataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a {', '.join(FILE_SUFFIXES)} file; to look for it on the Hugging Face hub, "
            f"install datasets: pip install datasets"
        ) from error
    name, config, split, *more = [*source.split(":"), "", ""]
    if any(more):
        raise ValueError(f"{source!r} is not NAME[:CONFIG[:SPLIT]]")
    return load_dataset(name, config or None, split=split or "train")

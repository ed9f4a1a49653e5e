"""Data sets by name: files and the Hugging Face hub."""

import json
from pathlib import Path

FILE_SUFFIXES = (".json", ".jsonl", ".txt")


def read_rows(source):
    """The rows of a data set, for ``loku.unlearn`` and ``loku.evaluation.evaluate``.

    ``source`` is a ``.txt`` file (a text a line; empty lines are passed over), a ``.json`` or ``.jsonl`` file
    (a JSON object a line, as TOFU's files, or one list), or ``NAME[:CONFIG[:SPLIT]]`` of a data set on the
    hub, such as ``locuslab/TOFU:forget10_perturbed`` (needs ``datasets``; the split is "train" by default).

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for one that is not UTF-8, and for a line
    that is not JSON.
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


def place_of_row(source, index):
    """Where row ``index`` of a data set is, as a person would look for it: a file and a line, if it has
    them."""
    path = Path(source)
    if path.suffix in FILE_SUFFIXES and path.is_file():
        text = _text(path)
        if path.suffix == ".txt" or not text.lstrip().startswith("["):
            return f"{path}, line {_lines(path, text)[index][0]}"
    return str(source)


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _lines(path, text):
    """(number from 1, line) of those that are not empty."""
    lines = text.splitlines() if path.suffix == ".txt" else text.split("\n")  # JSON may hold other separators
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _from_hub(source):
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

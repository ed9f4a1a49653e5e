"""Data sets by name: files and the Hugging Face hub."""

import json
from pathlib import Path

FILE_SUFFIXES = (".json", ".jsonl", ".txt")


def read_rows(source):
    """The rows of a data set, for ``loku.unlearn`` and ``loku.evaluation.evaluate``.

    ``source`` is a ``.txt`` file (a text a line; empty lines are passed over), a ``.json`` or ``.jsonl`` file
    (a JSON object a line, as TOFU's files, or one list), or ``NAME[:CONFIG[:SPLIT]]`` of a data set on the
    hub, such as ``locuslab/TOFU:forget10_perturbed`` (needs ``datasets``; the split is "train" by default).

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a line that is not JSON.
    """
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES:
        return _from_hub(str(source))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line separators
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


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

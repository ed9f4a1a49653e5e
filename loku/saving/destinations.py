"""A directory holds one save, and nothing of it is mixed with an earlier save or with a user's files.

A loader takes every file that it knows. So a model and an adapter of two saves in one directory would be
loaded together. Each save lists its files and their digests in ``loku_save.json``. The next save into the
directory takes away what that list names and what is unaltered. It refuses a directory with other files that
a loader would read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from loku.file_digests import file_digest, file_digests
from loku.saving.directories import whole_directory

LIST = "loku_save.json"

# The entries that ``from_pretrained`` of transformers and peft takes for a model or an adapter.
_LOADED = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",
    "adapter_model*",
)
_FOLDERS = ("base", "adapter", "reference")  # of a residual save
_KEYS = {"portable": "adapter_config.json", "residual": "adapter", "merged": "config.json"}


def _last_save(directory: Path) -> dict[str, Any]:
    try:
        save = json.loads((directory / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return save if isinstance(save, dict) else {}


def _entries_of_the_last_save(directory: Path) -> set[str]:
    """The entries of a directory that the last save into it wrote, and that nobody has altered since."""
    listed: dict[str, str] = _last_save(directory).get("files", {})
    ours = {LIST} if listed else set()
    for name in {file.partition("/")[0] for file in listed}:
        entry = directory / name
        if entry.is_dir():
            held = {f"{name}/{file}": digest for file, digest in file_digests(entry).items()}
        else:
            held = {name: file_digest(entry)} if entry.is_file() else {}
        if all(listed.get(file) == digest for file, digest in held.items()):
            ours.add(name)
    return ours


def check_destination(path: str | os.PathLike, kind: str) -> None:
    """Check that a save can go to a directory, before anything is trained or written.

    Args:
        path: The directory. It need not exist.
        kind: The kind of save, one of ``loku.saving.kinds.KINDS``.

    Raises:
        ValueError: ``path`` is a file. Or it holds a model or an adapter that is not an unaltered save of
            this package: a loader would read it with the new files, or the save would delete it.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass a directory")
    if not path.is_dir():
        return
    ours = _entries_of_the_last_save(path)
    folders = _FOLDERS if kind == "residual" else ()
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in ours
        and (entry.name in folders or any(fnmatch(entry.name, pattern) for pattern in _LOADED))
    )
    if foreign:
        raise ValueError(
            f"{path} holds {', '.join(foreign)}, which is not a save of loku, or was changed since: it would "
            "be loaded with the new files or overwritten. Nothing was written; pass another directory, or "
            "delete it"
        )


@contextmanager
def destination(
    path: str | os.PathLike, kind: str, *, refuse_others: bool = True, **facts: str | None
) -> Iterator[Path]:
    """A context with a directory to write a save into, which becomes ``path`` when the block ends.

    An exception leaves ``path`` as it was, as in ``whole_directory``.

    Args:
        path: The directory. What the last save into it wrote makes way. Its other entries stay.
        kind: The kind of save, one of ``loku.saving.kinds.KINDS``.
        refuse_others: Whether to refuse a directory with a model or an adapter that is not ours
            (``check_destination``), as by default. Otherwise they stay, but for files of the same name.
        facts: Facts about the save for ``loku_save.json``, by their names.

    Yields:
        The directory to write into.

    Raises:
        ValueError: The errors of ``check_destination``.
        OSError: ``path`` cannot be written.
    """
    if refuse_others:
        check_destination(path, kind)
    replaced = tuple(escape(name) for name in _entries_of_the_last_save(Path(path)))
    with whole_directory(path, key=_KEYS[kind], replaced=replaced) as directory:
        yield directory
        save = {"kind": kind, **facts, "files": file_digests(directory)}
        (directory / LIST).write_text(json.dumps(save, indent=2), encoding="utf-8")


def residual_save(base: str | None) -> dict[str, Any] | None:
    """The facts about the residual save whose base a model was loaded from, or None if it is no residual.

    Args:
        base: The name or path that the model was loaded by, or None.

    Returns:
        A dict with "untouched", the name of the model that FILA made the residual of, or None. It is None for
            a save after default LoRA initialisation, too: its base is a copy of the untouched one.
    """
    if base is None or Path(base).name != "base":
        return None
    folder = Path(base).parent
    save = _last_save(folder)
    return save if save.get("kind") == "residual" and (folder / "reference").is_dir() else None

"""Files and directories that are whole or not there, whatever stops the process that writes them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_directory(path: str | os.PathLike, *, key: str, replaced: tuple[str, ...]) -> Iterator[Path]:
    """A directory to write into, whose content becomes that of `path` when the block ends, or never.

    It lies beside `path` and is renamed; where `path` exists, inside it, and its entries are moved out one by
    one. A process that is killed leaves at most a directory called `.*.unfinished`.

    key: the entry without which the others do not load. Where `path` exists it goes first and comes last, so
        that at no time a mixture of old and new loads.
    replaced: patterns (`fnmatch`) of the entries of an existing `path` that make way; its others stay. On any
        exception they are put back.

    ValueError: `path` is a file. OSError: it cannot be written, by safetensors either.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass a directory")
    exists = path.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of `path`, which may be a mount point.
    unfinished = _unfinished(path if exists else path.parent, path.name)
    unfinished.mkdir()
    try:
        yield unfinished
        if exists:
            _replace_entries(unfinished, path, key, replaced)
        else:
            unfinished.rename(path)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{path} was not written, and is as it was: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which gets the name `path` when the block ends, or never.

    It lies beside `path` and replaces it at once. A process that is killed leaves at most a file called
    `.*.unfinished`.
    """
    path = Path(path)
    unfinished = _unfinished(path.parent, path.name)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f".{name}.{uuid.uuid4().hex[:8]}.unfinished"


def _replace_entries(source: Path, path: Path, key: str, replaced: tuple[str, ...]) -> None:
    new = sorted(source.iterdir(), key=lambda entry: entry.name == key)
    names = {entry.name for entry in new}
    old = [
        entry
        for entry in path.iterdir()
        if entry != source and (entry.name in names or any(fnmatch(entry.name, p) for p in replaced))
    ]
    previous = source / "previous"
    previous.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for entry in sorted(old, key=lambda entry: entry.name != key):
            moved.append((entry, entry.rename(previous / entry.name)))
        for entry in new:
            moved.append((entry, entry.rename(path / entry.name)))
    except BaseException:
        for origin, now in reversed(moved):
            now.rename(origin)
        raise

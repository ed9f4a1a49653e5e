"""Files and directories that are whole or absent, even if their writer is stopped or the machine loses power.

The files are flushed to the disk before a rename gives them their name, and the rename after it.
"""

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
    """A context with a directory to write into, which becomes ``path`` when the block ends.

    The directory lies beside ``path`` and is renamed. It lies inside a ``path`` that exists, and its entries
    are moved out one by one. An exception leaves ``path`` as it was. A process that is killed leaves at most
    a directory called ``.*.unfinished``.

    Args:
        path: The directory to make or to replace entries of. Its parents are made if they do not exist.
        key: The entry without which the others do not load. In a ``path`` that exists the old one goes first
            and the new one comes last. So a mixture of old and new entries never loads.
        replaced: The patterns (``fnmatch``) of the entries that make way in a ``path`` that exists. Its other
            entries stay.

    Yields:
        The directory to write into.

    Raises:
        ValueError: ``path`` is a file.
        OSError: ``path`` cannot be written, by safetensors either.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; pass a directory")
    exists = path.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The new directory must lie on the file system of ``path``, which may be a mount point.
    unfinished = _unfinished(path if exists else path.parent, path.name)
    unfinished.mkdir()
    try:
        yield unfinished
        flush_tree(unfinished)
        if exists:
            _replace_entries(unfinished, path, key, replaced)
        else:
            unfinished.rename(path)
            flush(path.parent)
    except SafetensorError as error:  # safetensors raises it if the disk is full
        raise OSError(f"{path} was not written, and is as it was: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A context with a file to write, which becomes ``path`` when the block ends.

    The file lies beside ``path`` and replaces it at once. An exception leaves ``path`` as it was. A process
    that is killed leaves at most a file called ``.*.unfinished``.

    Args:
        path: The file to make or to replace.

    Yields:
        The file to write.
    """
    path = Path(path)
    unfinished = _unfinished(path.parent, path.name)
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk (``fsync``).

    Args:
        path: The file or the directory.

    Raises:
        OSError: The disk reports a failure. A full one may report it first here.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Wait until a directory and all its files and folders are on the disk.

    Args:
        directory: The directory.

    Raises:
        OSError: The disk reports a failure.
    """
    for entry in directory.rglob("*"):
        if not entry.is_symlink():
            flush(entry)
    flush(directory)


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f".{name}.{uuid.uuid4().hex[:8]}.unfinished"


def replace_directory(new: Path, path: Path) -> None:
    """Move a whole directory to ``path``. An exception leaves ``path`` as it was.

    Args:
        new: The directory, on the file system of ``path``.
        path: The new name. A directory of that name moves to "previous" beside ``new``, for the caller to
            delete.
    """
    moves = [(path, new.parent / "previous")] if path.exists() else []
    _rename_all([*moves, (new, path)])
    flush(path.parent)


def _replace_entries(source: Path, path: Path, key: str, replaced: tuple[str, ...]) -> None:
    new = sorted(source.iterdir(), key=lambda entry: entry.name == key)
    names = {entry.name for entry in new}
    old = [
        entry
        for entry in path.iterdir()
        if entry != source and (entry.name in names or any(fnmatch(entry.name, p) for p in replaced))
    ]
    old.sort(key=lambda entry: entry.name != key)
    previous = source / "previous"
    previous.mkdir()
    _rename_all(
        [
            *((entry, previous / entry.name) for entry in old),
            *((entry, path / entry.name) for entry in new),
        ]
    )
    flush(path)


def _rename_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename entries in their order. An exception undoes the renames before it."""
    moved: list[tuple[Path, Path]] = []
    try:
        for origin, target in moves:
            moved.append((origin, origin.rename(target)))
    except BaseException:
        for origin, target in reversed(moved):
            target.rename(origin)
        raise

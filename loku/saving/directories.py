"""Files and directories that are whole or absent, even if their writer is stopped or the machine loses power.

What is written lies in a workplace, ``.NAME.*.unfinished``, until it is whole. It is flushed to the disk
before a rename gives it its name, and the rename after it. The writer holds a lock in the workplace. So a
workplace that nobody has locked is the rest of a writer that was killed, and the next writer finishes or
clears it. Writers of one folder make, move and clear one after the other (``alone_in``).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# The entries of a workplace. The journal says which entries are moved, and exists only while they are.
_LOCK, _NEW, _PREVIOUS, _JOURNAL = "loku.lock", "new", "previous", "moves.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_JOURNAL_BYTES = 1 << 20
_LONGEST_WAIT = 5.0  # seconds; moves take less


@contextmanager
def whole_directory(
    path: str | os.PathLike, *, key: str, replaceable: Callable[[Path, Collection[str]], Collection[str]]
) -> Iterator[Path]:
    """A context with a directory to write into, which becomes ``path`` when the block ends.

    The directory lies beside ``path`` and is renamed. It lies inside a ``path`` that exists, and its entries
    are moved out one by one. An exception leaves ``path`` as it was. A process that is killed leaves at most
    a directory called ``.*.unfinished``, which the next call clears (``finish_interrupted``).

    Args:
        path: The directory to make or to replace entries of. Its parents are made if they do not exist.
        key: The entry without which the others do not load. In a ``path`` that exists the old one goes first
            and the new one comes last. So a mixture of old and new entries never loads.
        replaceable: A function of a ``path`` that exists and of the names of the new entries. It returns the
            names of the entries that make way. The other entries stay.

    Yields:
        The directory to write into.

    Raises:
        ValueError: ``path`` is a file, or holds an entry of the name of a new one that does not make way.
        OSError: ``path`` cannot be written, by other libraries either. If the disk is full the message says
            so.
    """
    finish_interrupted(path)
    real = Path(os.path.realpath(path))
    exists, made = real.is_dir(), [parent for parent in real.parents if not parent.exists()]
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        # The new directory must lie on the file system of ``path``, which may be a mount point.
        with disk_errors(path), _workplace(real if exists else real.parent, real.name) as place:
            new = place / _NEW
            yield new
            flush_tree(new)
            if not exists:
                try:
                    new.rename(real)
                    flush(real.parent)
                    return
                except OSError:
                    if not real.is_dir():  # otherwise another writer has made it meanwhile
                        raise
            # Entries are moved from inside ``path`` alone.
            with nullcontext(place) if exists else _workplace(real, real.name) as inside:
                if inside != place:
                    new.rename(inside / _NEW)  # an empty directory
                with alone_in(real):
                    _replace_entries(inside, real, key, replaceable)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A context with a file to write, which becomes ``path`` when the block ends.

    The file has the name of ``path``, lies in a directory beside it and replaces it at once. The target of a
    symlink is replaced. An exception leaves ``path`` as it was. A process that is killed leaves at most a
    directory called ``.*.unfinished``, which the next call clears.

    Args:
        path: The file to make or to replace.

    Yields:
        The file to write.

    Raises:
        OSError: ``path`` cannot be written. If the disk is full the message says so.
    """
    real = Path(os.path.realpath(path))
    _finish_all(real, [real.parent])
    with disk_errors(path), _workplace(real.parent, real.name) as place:
        unfinished = place / _NEW / real.name
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, real)
        flush(real.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk (``fsync``).

    Some file systems, such as those of object stores, cannot flush a directory. There is nothing to wait for.

    Args:
        path: The file or the directory.

    Raises:
        OSError: The disk reports a failure. A full one may report it first here.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
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


@contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """A context in which every library's error of a full or failing disk is an OSError that says what to do.

    The libraries raise ``SafetensorError``, ``RuntimeError`` or a plain ``Exception``.

    Args:
        path: What is written, for the message.

    Raises:
        OSError: The disk is full or fails. ``errno`` has the number of the system.
    """
    try:
        yield
    except Exception as error:
        number, text = _error_number(error), str(error)
        if number in _FULL:
            text = (
                f"{os.fspath(path)} was not written, and is as it was: there is no room ({text}). Make room, "
                "and save again"
            )
        elif isinstance(error, SafetensorError):
            text = f"{os.fspath(path)} was not written, and is as it was: {text}"
        else:
            raise
        raise system_error(text, errno.EIO if number is None else number) from error


def system_error(text: str, number: int) -> OSError:
    """Return an OSError whose message is a text alone, with an ``errno``.

    Args:
        text: The message.
        number: The ``errno``.
    """
    error = OSError(text)
    error.errno = number
    return error


def _error_number(error: Exception) -> int | None:
    """The number of the system's error behind an exception, or None."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust
    if found:
        return int(found[1])
    of_torch = re.search("PytorchStreamWriter failed writing|unexpected pos", str(error))
    return errno.ENOSPC if of_torch else None  # torch.save does not say what failed


@contextmanager
def _workplace(folder: Path, name: str) -> Iterator[Path]:
    """A context with a locked directory in ``folder``, which holds an empty directory for the new entries."""
    place = folder / f".{name}.{uuid.uuid4().hex[:8]}.unfinished"
    with alone_in(folder):  # another writer would clear a workplace that is not locked yet
        place.mkdir()
        lock = _Lock(place / _LOCK)
        lock.take()
    try:
        (place / _NEW).mkdir()
        yield place
    finally:
        with alone_in(folder):
            if not (place / _JOURNAL).exists():  # otherwise an undo was interrupted: the old entries are here
                _remove(place)
            lock.release()


def _remove(place: Path) -> None:
    """Remove a workplace, and its lock last, so that a rest of it is known."""
    for name in (_NEW, _PREVIOUS, ""):
        shutil.rmtree(place / name, ignore_errors=True)


class _Lock:
    """An exclusive lock (``flock``) of a file or a folder, which the system releases when its holder ends."""

    def __init__(self, place: Path, flags: int = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) -> None:
        self._descriptor = os.open(place, flags | os.O_CLOEXEC, 0o666)

    def take(self, seconds: float = 0.0) -> bool:
        """Take the lock, and wait for it if need be, but no longer than some seconds.

        Returns:
            False if another process holds it, or the file system has no locks.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return False
                time.sleep(0.01)
            except OSError:
                return False
            else:
                return True

    def release(self) -> None:
        os.close(self._descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A context in which no other writer of this package changes the entries of a folder.

    The lock is one of the folder itself (``flock``), so it leaves no file, and it ends with its process. It
    is waited for, but not long: somebody else may hold it for good, such as a script by ``flock FOLDER``. No
    lock is taken then, nor where the file system has none. The contexts of one folder do not nest.

    Args:
        folder: The folder.
    """
    lock = None
    with suppress(OSError):  # a folder that cannot be opened: whatever follows says so
        lock = _Lock(folder, os.O_RDONLY)
    try:
        if lock is not None:
            lock.take(_LONGEST_WAIT)
        yield
    finally:
        if lock is not None:
            lock.release()


def finish_interrupted(path: str | os.PathLike) -> None:
    """Finish or clear what killed writers have left of a directory (``whole_directory``).

    A directory that was not whole is removed. If the writer was killed while it moved whole entries into
    ``path``, the rest of them is moved. A workplace of a living process, or of a file system without locks,
    stays, and so does a directory of that name that is no workplace.

    Args:
        path: The directory.

    Raises:
        ValueError: ``path`` is a file. Or the entries cannot be moved, because they were changed since.
            Nothing is moved or deleted then.
    """
    real = Path(os.path.realpath(path))
    if os.path.lexists(real) and not real.is_dir():
        raise ValueError(f"{os.fspath(path)} is a file; pass a directory")
    _finish_all(real, [folder for folder in (real, real.parent) if folder.is_dir()])


def _finish_all(path: Path, folders: list[Path]) -> None:
    for folder in folders:
        with alone_in(folder):
            for place in sorted(folder.glob(f".{escape(path.name)}.*.unfinished")):
                if re.fullmatch(r"[0-9a-f]{8}", place.name.split(".")[-2]):
                    _finish(place, path)


def _finish(place: Path, path: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        return
    entries = {entry.name: entry for entry in place.iterdir()}
    if not entries:  # its writer was killed while it made or removed the workplace
        with suppress(OSError):
            place.rmdir()
    known = {_LOCK, _NEW, _PREVIOUS, _JOURNAL, f"{_JOURNAL}.part"}
    if not {_LOCK} <= entries.keys() <= known or not entries[_LOCK].is_file():
        return
    if any(entry.is_symlink() for entry in entries.values()):
        return
    if _JOURNAL in entries and place.parent != path:  # a journal is of moves into the directory around it
        return
    lock = _Lock(place / _LOCK)
    try:
        if not lock.take():
            return
        if _JOURNAL in entries:
            moves = _remaining_moves(place, path)
            _rename_all(moves)
            _end_moves(place, path)
        _remove(place)
    finally:
        lock.release()


def _replace_entries(
    place: Path, path: Path, key: str, replaceable: Callable[[Path, Collection[str]], Collection[str]]
) -> None:
    new = sorted(os.listdir(place / _NEW), key=lambda name: name == key)
    ours = set(replaceable(path, new))
    in_the_way = [name for name in sorted(new) if name not in ours and os.path.lexists(path / name)]
    if in_the_way:
        raise ValueError(
            f"{path} holds {', '.join(in_the_way)}, which is not a save of loku, or was changed since. "
            "Nothing was written; move it away, or pass another directory"
        )
    old = sorted(
        (name for name in ours if os.path.lexists(path / name)), key=lambda name: (name != key, name)
    )
    (place / _PREVIOUS).mkdir()
    journal = {
        "old": {name: _identity(path / name) for name in old},
        "new": {name: _identity(place / _NEW / name) for name in new},
    }
    part = place / f"{_JOURNAL}.part"
    part.write_text(json.dumps(journal), encoding="utf-8")
    flush(part)
    part.rename(place / _JOURNAL)
    flush(place)
    try:
        _rename_all(
            [
                *((path / name, place / _PREVIOUS / name) for name in old),
                *((place / _NEW / name, path / name) for name in new),
            ]
        )
    except BaseException:
        if not os.listdir(place / _PREVIOUS) and set(os.listdir(place / _NEW)) == set(new):
            (place / _JOURNAL).unlink()  # all is undone, and no interrupt has stopped the undoing
        raise
    _end_moves(place, path)


def _end_moves(place: Path, path: Path) -> None:
    """Flush the moves, and remove the journal: the old entries may go from now on."""
    for folder in (path, place / _PREVIOUS, place / _NEW):
        flush(folder)
    (place / _JOURNAL).unlink()
    flush(place)


def _identity(path: Path) -> str:
    """A text by which a file, or a directory with all it holds, is known after a move but not after a change.

    An inode alone is used again for a new file.
    """
    held = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else []
    found = ((entry.relative_to(path), os.lstat(entry)) for entry in (path, *held))
    text = "\n".join(f"{name} {status.st_ino} {status.st_mtime_ns}" for name, status in found)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _remaining_moves(place: Path, path: Path) -> list[tuple[Path, Path]]:
    """The moves of a journal that are still to be made.

    Only entries that are the very ones that the writer meant are moved.
    """
    journal, moves = _read_journal(place), []
    refused = any(
        not set(os.listdir(place / folder)) <= journal[part].keys()
        for part, folder in (("old", _PREVIOUS), ("new", _NEW))
    )
    for name, identity in journal["old"].items():
        if os.path.lexists(path / name) and _identity(path / name) == identity:
            moves.append((path / name, place / _PREVIOUS / name))
        elif not os.path.lexists(place / _PREVIOUS / name):
            refused = True
    leaving = {origin for origin, _ in moves}
    for name, identity in journal["new"].items():
        origin, target = place / _NEW / name, path / name
        if not os.path.lexists(origin):
            refused |= not (os.path.lexists(target) and _identity(target) == identity)
            continue
        refused |= _identity(origin) != identity or (os.path.lexists(target) and target not in leaving)
        moves.append((origin, target))
    if refused:
        raise ValueError(
            f"a save into {path} was interrupted, and entries were changed since, so it cannot be finished. "
            f"Nothing was touched. The files of the save before are in {place / _PREVIOUS}, those of the "
            f"interrupted one in {place / _NEW} and {path}; keep what you need, and delete {place}"
        )
    return moves


def _read_journal(place: Path) -> dict[str, dict[str, str]]:
    journal: Any = None
    file = place / _JOURNAL
    with suppress(OSError, ValueError, RecursionError):
        if not file.is_symlink() and file.is_file() and file.stat().st_size <= _MAX_JOURNAL_BYTES:
            journal = json.loads(file.read_text(encoding="utf-8"))
    if (
        not isinstance(journal, dict)
        or journal.keys() != {"old", "new"}
        or not all(isinstance(part, dict) for part in journal.values())
        or not all(_is_move(name, identity) for part in journal.values() for name, identity in part.items())
    ):
        raise ValueError(f"{file} is damaged, so what {place} holds is left alone; move it away")
    return journal


def _is_move(name: str, identity: Any) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and isinstance(identity, str)


def _rename_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename entries in their order. An exception undoes the renames before it."""
    moved: list[tuple[Path, Path]] = []
    try:
        for origin, target in moves:
            origin.rename(target)
            moved.append((origin, target))
    except BaseException:
        for origin, target in reversed(moved):
            target.rename(origin)
        raise

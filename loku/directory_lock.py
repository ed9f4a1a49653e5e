"""One process at a time writes to a directory."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

# Uploads to the hub leave names out that begin with an underscore.
LOCK = "_loku.lock"
_HOLDER = "_loku.lock.json"  # beside the lock, whose contents are filelock's
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def _holder(directory: Path) -> str:
    """The process that holds the lock of a directory, in words."""
    try:
        with open(directory / _HOLDER, encoding="utf-8") as stream:
            holder = json.loads(stream.read(1000))
        return f"process {int(holder['pid'])} on {str(holder['host'])!r}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"  # it has not yet written who it is


class DirectoryLock:
    """A lock of a directory, which ends with its process at the latest.

    A ``with`` block holds it.

    The lock is ``flock``'s, so nothing has to be cleaned up after a process that was killed. On a file system
    without ``flock`` a file stands for the lock. It may outlive a process that was killed on another host.

    Args:
        directory: The directory, which exists.
        holder_does: What the other process does, for the message: "is writing checkpoints to" by default.
        instead: What to do instead of waiting, for the message: "Pass another output_dir" by default.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        holder_does: str = "is writing checkpoints to",
        instead: str = "Pass another output_dir",
    ) -> None:
        self._directory = Path(directory)
        self._holder_does, self._instead = holder_does, instead
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, without waiting for it.

        Raises:
            ValueError: Another process holds it. The message names the process and its host.
            OSError: The lock's file cannot be written.
        """
        lock: BaseFileLock = FileLock(self._directory / LOCK, thread_local=False, fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise
            except (NotImplementedError, OSError) as error:
                if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"the file system of {self._directory} has no flock ({error}): the file {LOCK} stands "
                    "for a lock. Delete it if a process was killed that held it",
                    stacklevel=2,
                )
                lock = SoftFileLock(self._directory / LOCK, thread_local=False)
                lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{_holder(self._directory)} {self._holder_does} {self._directory}; nothing was started. "
                f"{self._instead}, or wait for its end (it holds {LOCK} there)"
            ) from error
        self._lock = lock
        with open(self._directory / _HOLDER, "w", encoding="utf-8") as stream:
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, stream)

    def release(self) -> None:
        """Give the lock back, if it is held. Its files are deleted."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            with suppress(OSError):
                (self._directory / _HOLDER).unlink()
            if not isinstance(lock, SoftFileLock):  # that one deletes its file itself
                with suppress(OSError):
                    (self._directory / LOCK).unlink()  # while it is held: who locks a deleted file notices
        finally:
            lock.release()

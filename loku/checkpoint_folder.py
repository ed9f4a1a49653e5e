"""The directory of a run's checkpoints: one run at a time writes there, and touches nothing but its own.

A checkpoint is written in a private directory and renamed when it is whole. A checkpoint that is replaced or
deleted is renamed into the private directory first. So a process may be killed at any time: what has the name
of a checkpoint is whole. The next run clears the private directories that it finds, for their writers are
dead.
"""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from loku.checkpoint_files import Contents, change, is_of_run, steps_of, why_not_ours, write_manifest
from loku.directory_lock import DirectoryLock
from loku.distributed import from_main_process
from loku.saving.directories import flush, flush_tree

# Uploads to the hub leave names out that begin with an underscore.
_PRIVATE = "_loku.{}.unfinished"
_MARKER = "loku_unfinished.txt"  # tells our directory from another one of such a name
_REPLACED = "replaced"


class CheckpointFolder:
    """The directory of the checkpoints of one run.

    All processes of the run must make one together. The main process calls ``reserve`` and then
    ``refuse_collisions`` before training, and ``release`` after it.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        # All processes of the run write there, and no other run.
        self.private = self.directory / from_main_process(_PRIVATE.format(uuid.uuid4().hex[:8]))
        self._lock = DirectoryLock(directory)
        self._warned: set[Path] = set()

    def reserve(self) -> None:
        """Take the lock of the directory, and clear what writers that were killed have left.

        Raises:
            ValueError: Another run writes checkpoints there.
            OSError: The directory cannot be written to.
        """
        self._lock.acquire()
        for rest in sorted(self.directory.glob(_PRIVATE.format("*"))):
            if not rest.is_symlink() and rest.is_dir():
                _clear_private(rest)
        self.private.mkdir()
        (self.private / _MARKER).write_text("loku writes checkpoints here, and deletes this directory\n")

    def release(self) -> None:
        """Delete the private directory and give the lock back. Both may be gone already."""
        try:
            if self.private.is_dir():
                _clear_private(self.private)
        finally:
            self._lock.release()

    def clear(self, step: int) -> None:
        """Delete an attempt at a checkpoint from the private directory."""
        shutil.rmtree(self.private / f"checkpoint-{step}", ignore_errors=True)

    def refuse_collisions(self, writes: Callable[[int], bool], identity: dict[str, Any]) -> None:
        """Check that a run would replace no files but its own unaltered ones.

        Args:
            writes: Whether the run may write a checkpoint of a step.
            identity: The ``run_identity`` of the run.

        Raises:
            ValueError: It would. The message names the first.
        """
        for step, entry in steps_of(self.directory):
            reason = why_not_ours(entry, identity) if writes(step) else None
            if reason:
                raise ValueError(
                    f"this run would write {entry.name} to {self.directory}, which holds one already that it "
                    f"must not replace: {reason}. Nothing was changed; pass another output_dir, or move "
                    f"{entry.name} away"
                )

    def publish(self, step: int, identity: dict[str, Any], contents: Contents) -> Path:
        """Give a checkpoint that lies in the private directory its manifest and its name.

        An exception leaves the directory as it was.

        Args:
            step: Its step.
            identity: The ``run_identity`` of the run.
            contents: The kind of the run.

        Returns:
            The checkpoint.

        Raises:
            OSError: It is not whole, it cannot be written, or something else has its name.
        """
        new, path = self.private / f"checkpoint-{step}", self.directory / f"checkpoint-{step}"
        write_manifest(new, identity, contents)
        flush_tree(new)
        if not os.path.lexists(path):
            _rename(new, path)
            return path
        reason = why_not_ours(path, identity)
        if reason:
            raise FileExistsError(f"it exists already, and this run must not replace it: {reason}")
        replaced = self.private / _REPLACED / path.name
        replaced.parent.mkdir(exist_ok=True)
        try:
            _rename(path, replaced)
            _rename(new, path)
        except BaseException:
            _put_back(self.private)
            raise
        self._delete(replaced)
        return path

    def delete_oldest(self, limit: int, kept: set[str], identity: dict[str, Any]) -> None:
        """Delete this run's checkpoints of the lowest steps beyond a number.

        A checkpoint that was changed since it was written does not count and stays. A warning says so.

        Args:
            limit: The number of checkpoints that may stay.
            kept: The names of those that stay in any case.
            identity: The ``run_identity`` of the run.
        """
        of_run = [entry for _, entry in steps_of(self.directory) if is_of_run(entry, identity)]
        ours = [entry for entry in of_run if self._unchanged(entry, digests=False)]
        surplus = [entry for entry in ours if entry.name not in kept][: max(0, len(ours) - limit)]
        for entry in surplus:
            if self._unchanged(entry):
                self._delete(entry)

    def _unchanged(self, entry: Path, *, digests: bool = True) -> bool:
        reason = change(entry, digests=digests)
        if reason and entry not in self._warned:
            self._warned.add(entry)
            warnings.warn(f"save_total_limit: {entry} stays: {reason}", stacklevel=2)
        return reason is None

    def _delete(self, checkpoint: Path) -> None:
        """Delete a checkpoint. It loses its name first."""
        deleted = self.private / f"deleted-{uuid.uuid4().hex[:8]}"
        _rename(checkpoint, deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _rename(origin: Path, target: Path) -> None:
    """Rename a directory, and wait until both names are on the disk."""
    origin.rename(target)
    flush(target.parent)
    flush(origin.parent)


def _put_back(private: Path) -> None:
    """Give the checkpoints their names back whose writer was stopped between two renames."""
    folder = private / _REPLACED
    for _, replaced in [] if folder.is_symlink() else steps_of(folder):
        path = private.parent / replaced.name
        if not os.path.lexists(path):
            _rename(replaced, path)


def _clear_private(private: Path) -> None:
    """Delete a private directory, unless it is not ours. The marker goes last."""
    marker = private / _MARKER
    # Without any file its writer was killed before the marker.
    if not marker.is_file() and any(private.iterdir()):
        return
    _put_back(private)
    for entry in private.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != marker:
            entry.unlink()
    marker.unlink(missing_ok=True)
    with suppress(OSError):  # a process of the run still writes there: the next run clears it
        private.rmdir()

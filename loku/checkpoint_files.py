"""Checkpoints as directories: whole or absent, unaltered, and of one run.

``transformers.Trainer`` writes a checkpoint file by file under its final name, and takes any directory of
that name for a checkpoint. Here a checkpoint is written in ``.unfinished``. It gets a manifest with the sizes
and digests of its files, and is renamed when it is whole. A run goes on only from an unaltered checkpoint of
the same base model, data and settings.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from loku.file_digests import file_digest
from loku.run_identity import differences, warn_of_environment

MANIFEST = "loku_checkpoint.json"
UNFINISHED = ".unfinished"
_SCHEDULER = "scheduler.pt"  # written beside the optimizer's files, whose names differ by the way of sharding


def write_manifest(directory: Path, identity: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint, after all its other files.

    Args:
        directory: The directory of the checkpoint.
        identity: The ``run_identity`` of its run.
    """
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    manifest = {"run": identity, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint of loku ({MANIFEST}: {error}); pass another"
        ) from error


def _check_files(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            reason = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            reason = f"has {file.stat().st_size} bytes of {expected['bytes']}"
        elif file_digest(file) != expected["sha256"]:
            reason = "was altered: its SHA-256 is not that of what was written"
        else:
            continue
        raise ValueError(
            f"{checkpoint}: {name} {reason}. Nothing was loaded; restore the file, or delete this checkpoint "
            "to go on from an earlier one"
        )


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a directory that have a manifest, in the order of their steps.

    A warning names each of the others.

    Args:
        output_dir: The directory. It need not exist.
    """
    found = []
    directory = Path(output_dir)
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    for entry in entries:
        step = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if step and (entry / MANIFEST).is_file():
            found.append((int(step[1]), entry))
        elif (step or entry.name == UNFINISHED) and entry.is_dir():
            warnings.warn(
                f"{entry} is ignored: it is not a whole checkpoint (it has no {MANIFEST}, which comes last)",
                stacklevel=2,
            )
    return [entry for _, entry in sorted(found)]


def find_checkpoint(
    resume: str | os.PathLike | bool | None, output_dir: str | os.PathLike, identity: dict[str, Any]
) -> Path | None:
    """Find the checkpoint to go on from: whole, unaltered and of this run.

    Args:
        resume: True for the newest checkpoint of this run in ``output_dir``, the path of a checkpoint, or
            None or False to begin anew. The texts "true" and "false" mean the same.
        output_dir: The directory of checkpoints.
        identity: The ``run_identity`` of this run.

    Returns:
        The checkpoint, or None to begin anew. It is None with True if ``output_dir`` holds no checkpoint: a
        run that was stopped before its first checkpoint begins anew.

    Raises:
        ValueError: The checkpoint is not whole, was altered, or is of another run. True finds only
            checkpoints of other runs. The message names the differences.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() == "true":  # or the text, from a command line
        candidates = whole_checkpoints(output_dir)
    else:
        candidates = [Path(str(resume))]
    reason = None
    for checkpoint in reversed(candidates):
        manifest = _read_manifest(checkpoint)
        difference = differences(identity, manifest["run"])
        if not difference:
            _check_files(checkpoint, manifest["files"])
            if _SCHEDULER not in manifest["files"]:
                raise ValueError(
                    f"{checkpoint} has no state of the optimizer, so a run cannot go on from it exactly: it "
                    "was written with save_only_model=True; begin anew, or pass another checkpoint"
                )
            warn_of_environment(identity, manifest["run"])
            return checkpoint
        reason = reason or (
            f"{checkpoint} is of another run: {difference}. Nothing was changed; pass the model, data and "
            "settings that it was made with, or another output_dir"
        )
    if reason:
        raise ValueError(reason)
    return None


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Make a directory if it does not exist, and check that it can be written to.

    Args:
        directory: The directory of checkpoints.

    Raises:
        OSError: It cannot be made or written to.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable"):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {os.fspath(directory)!r} cannot be written to ({error}); nothing was started: pass "
            "another output_dir"
        ) from error

"""Checkpoints as directories: whole, unaltered, and of one run.

A checkpoint has a manifest with the sizes and digests of its files. It is whole if it has every file that a
run needs to go on, whatever its manifest lists. A run goes on only from an unaltered checkpoint of the same
base model, data and settings. A manifest may be damaged or hostile, so each of its values is checked.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from loku.file_digests import file_digest
from loku.run_identity import differences, warn_of_environment

MANIFEST = "loku_checkpoint.json"
STATE = "trainer_state.json"
TRAINED = "loku_trained.safetensors"
REFERENCE = "loku_reference.safetensors"
HAS_REFERENCE = "has initial factors"  # a key of the metadata of TRAINED; its values are "yes" and "no"
_LARGEST_MANIFEST = 16 * 2**20  # bytes; thousands of processes stay below it
_LONGEST_REASON = 4000  # characters of a message
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Contents:
    """The kind of a run, which decides the files that its checkpoints must have.

    Args:
        adapters: Whether adapters are trained, True by default, or a whole model.
        sharded: Whether FSDP shards the model, False by default.
        processes: The number of processes, 1 by default. Each has random states of its own.
        scaler: Whether gradients are scaled, as in training with fp16; False by default.
        model_only: Whether the run saves no state of the optimizer (``save_only_model``); False by default.
    """

    adapters: bool = True
    sharded: bool = False
    processes: int = 1
    scaler: bool = False
    model_only: bool = False

    def missing(self, directory: Path, files: Collection[str]) -> list[str]:
        """The files that a checkpoint of such a run must have and does not have.

        Args:
            directory: The directory of the checkpoint. Files that name other files are read.
            files: Its files by their paths in it, with slashes.

        Returns:
            Their names, in order. A name with a star stands for at least one file.
        """
        required = [STATE, *self._model(directory, files)]
        if not self.model_only:
            processes = range(self.processes)
            one = self.processes == 1
            required += ["scheduler.pt", *self._optimizer(files)]
            required += ["rng_state.pth"] if one else [f"rng_state_{process}.pth" for process in processes]
            required += ["scaler.pt"] if self.scaler else []
        return [
            name
            for name in required
            if not (any(PurePosixPath(f).match(name) for f in files) if "*" in name else name in files)
        ]

    def _model(self, directory: Path, files: Collection[str]) -> list[str]:
        if self.adapters:
            has_reference = TRAINED in files and _metadata(directory / TRAINED).get(HAS_REFERENCE) != "no"
            return ["training_args.bin", TRAINED, *([REFERENCE] if has_reference else [])]
        if self.sharded:
            whole = "pytorch_model_fsdp.bin"
            shards = ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/*.distcp"]
            return [whole] if whole in files else shards
        named = _shards(directory / _INDEX) if _INDEX in files and _WEIGHTS not in files else [_WEIGHTS]
        return ["training_args.bin", *named]

    def _optimizer(self, files: Collection[str]) -> list[str]:
        if not self.sharded:
            return ["optimizer.pt"]
        whole = "optimizer.bin"
        return [whole] if whole in files else ["optimizer_0/.metadata", "optimizer_0/*.distcp"]


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.parent} is not a whole checkpoint of loku ({file.name}: {error})") from error


def _shards(index: Path) -> list[str]:
    """The files that the index of a model's weights names, and the index."""
    try:
        if index.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError("it is too large")
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [_INDEX, *sorted(_local(name) for name in names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.parent} is not a whole checkpoint of loku ({_INDEX}: {error})") from error


def _local(name: Any) -> str:
    """The name of a file in a checkpoint, checked."""
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise ValueError(f"{name!r:.200} is no path of a file in it")
    if not path.parts or name == MANIFEST:
        raise ValueError(f"it lists {name!r}")
    return name


def _listed(files: Any) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists, checked."""
    if not isinstance(files, dict) or not files:
        raise ValueError("its files are no list with names")
    for name, facts in files.items():
        _local(name)
        size, digest = (facts.get(key) if isinstance(facts, dict) else None for key in ("bytes", "sha256"))
        if type(size) is not int or size < 0:
            raise ValueError(f"{name!r:.200} has no size in bytes")
        if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise ValueError(f"{name!r:.200} has no SHA-256")
    return files


def _size_and_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def _files(directory: Path) -> list[str]:
    """Everything in a directory but folders and the manifest, by its path with slashes, links included."""
    found = []
    for folder, folders, files in os.walk(directory):  # it follows no links
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [(Path(folder) / name).relative_to(directory).as_posix() for name in [*files, *links]]
    return sorted(name for name in found if name != MANIFEST)


def _empty_folders(directory: Path) -> list[str]:
    """The folders in a directory that hold nothing, or nothing that this process may read."""
    walked = list(os.walk(directory))
    full = {folder for folder, folders, files in walked if folders or files}
    named = {os.path.join(folder, name) for folder, folders, _ in walked for name in folders}
    return sorted(
        Path(name).relative_to(directory).as_posix() for name in named - full if not os.path.islink(name)
    )


def write_manifest(directory: Path, identity: dict[str, Any], contents: Contents) -> None:
    """Write the manifest of a checkpoint, after all its other files.

    Args:
        directory: The directory of the checkpoint.
        identity: The ``run_identity`` of its run.
        contents: The kind of its run.

    Raises:
        OSError: A file that a run needs to go on was not written, or the manifest cannot be written.
    """
    files = _files(directory)
    missing = contents.missing(directory, files)
    if missing:
        raise OSError(f"{', '.join(missing)} was not written")
    manifest = {"run": identity, "files": {name: _size_and_digest(directory / name) for name in files}}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / MANIFEST
    try:
        if file.is_symlink() or not file.is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it has {file.stat().st_size} bytes, more than any manifest")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("run"), dict):
            raise ValueError("it names no run")
        return {"run": manifest["run"], "files": _listed(manifest.get("files"))}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint of loku ({MANIFEST}: {error}); pass another"
        ) from error


@contextmanager
def _comparing(checkpoint: Path) -> Iterator[None]:
    """A context in which a manifest that is too deep to compare is one of no whole checkpoint."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint of loku ({MANIFEST}: {error})") from error


def _differences(checkpoint: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    with _comparing(checkpoint):
        return differences(identity, manifest["run"])[:_LONGEST_REASON]


def _longer(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """Advice for the common wish to make a finished run longer, or ""."""
    if all(manifest["run"].get(name) == identity.get(name) for name in ("num_train_epochs", "max_steps")):
        return ""
    return (
        ". Its length decides a run's learning rates from the first step. To train a finished model further, "
        "save it, and unlearn the saved model in a new run"
    )


def _alteration(checkpoint: Path, files: dict[str, dict[str, Any]], digests: bool = True) -> str | None:
    """The first file that is not as the manifest says, and why; or None."""
    inside = checkpoint.resolve()
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if not file.resolve().is_relative_to(inside):
            return f"{name} is a link to another place"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {expected['bytes']}"
        if digests and file_digest(file) != expected["sha256"]:
            return f"{name} was altered: its SHA-256 is not that of what was written"
    return None


def is_of_run(checkpoint: Path, identity: dict[str, Any]) -> bool:
    """Whether a directory is a checkpoint of a run, by its manifest.

    Args:
        checkpoint: The directory.
        identity: The ``run_identity`` of the run.
    """
    try:
        return not _differences(checkpoint, _read_manifest(checkpoint), identity)
    except ValueError:
        return False


def change(checkpoint: Path, *, digests: bool = True) -> str | None:
    """The first change of a checkpoint since it was written, in words, or None.

    Args:
        checkpoint: The directory, with a manifest.
        digests: Whether to read all files, as by default, or to compare names and sizes alone.

    Raises:
        ValueError: The manifest cannot be read.
    """
    if checkpoint.is_symlink():
        return "it is a link"
    listed = _read_manifest(checkpoint)["files"]
    others = [name for name in [*_files(checkpoint), *_empty_folders(checkpoint)] if name not in listed]
    if others:
        return f"it also has {', '.join(others[:3])}, which loku did not write"
    return _alteration(checkpoint, listed, digests)


def why_not_ours(checkpoint: Path, identity: dict[str, Any]) -> str | None:
    """The reason for which a run must not replace a directory, or None if it may.

    A run may replace what it wrote itself and nobody has changed since.

    Args:
        checkpoint: The directory.
        identity: The ``run_identity`` of the run.
    """
    try:
        difference = _differences(checkpoint, _read_manifest(checkpoint), identity)
        return f"it is a checkpoint of another run: {difference}" if difference else change(checkpoint)
    except ValueError as error:
        return f"no manifest of loku vouches for it ({error.__cause__})"


def steps_of(directory: Path) -> list[tuple[int, Path]]:
    """Everything in a directory that has the name of a checkpoint, with its step, in the order of the steps.

    Args:
        directory: The directory. It need not exist.
    """
    entries = list(directory.iterdir()) if directory.is_dir() else []
    named = ((re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", entry.name), entry) for entry in entries)
    return sorted((int(match[1]), entry) for match, entry in named if match)


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a directory that have a manifest, in the order of their steps.

    A warning names each of the others.

    Args:
        output_dir: The directory. It need not exist.
    """
    found = []
    for _, entry in steps_of(Path(output_dir)):
        if (entry / MANIFEST).is_file():
            found.append(entry)
        elif entry.is_dir():
            warnings.warn(
                f"{entry} is ignored: it is not a whole checkpoint (it has no {MANIFEST}, which comes last)",
                stacklevel=2,
            )
    return found


def find_checkpoint(
    resume: str | os.PathLike | bool | None,
    output_dir: str | os.PathLike,
    identity: dict[str, Any],
    contents: Contents,
) -> Path | None:
    """Find the checkpoint to go on from: whole, unaltered and of this run.

    Args:
        resume: True for the newest checkpoint of this run in ``output_dir``, the path of a checkpoint, or
            None or False to begin anew. The texts "true" and "false" mean the same.
        output_dir: The directory of checkpoints.
        identity: The ``run_identity`` of this run.
        contents: The kind of this run.

    Returns:
        The checkpoint, or None to begin anew. It is None with True if ``output_dir`` holds no checkpoint: a
        run that was stopped before its first checkpoint begins anew, and a warning says so.

    Raises:
        ValueError: The checkpoint is not whole, was altered, or is of another run. True finds only
            checkpoints of other runs. The message names the differences.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    newest = str(resume).lower() == "true"  # or the text, from a command line
    candidates = whole_checkpoints(output_dir) if newest else [Path(str(resume))]
    if not newest and not (candidates[0] / MANIFEST).exists() and (held := whole_checkpoints(candidates[0])):
        raise ValueError(
            f"{candidates[0]} is no checkpoint, and holds checkpoints: resume_from_checkpoint takes one of "
            f"them, such as {held[-1]}"
        )
    reason: str | None = None
    for checkpoint in reversed(candidates):
        manifest = _read_manifest(checkpoint)
        difference = _differences(checkpoint, manifest, identity)
        if not difference:
            check_whole(checkpoint, manifest["files"], contents)
            with _comparing(checkpoint):
                warn_of_environment(identity, manifest["run"])
            if reason:
                warnings.warn(f"the run goes on from {checkpoint.name}: {reason}", stacklevel=2)
            return checkpoint
        reason = reason or (
            f"{checkpoint} is of another run: {difference}. Nothing was changed; pass the model, data and "
            f"settings that it was made with, or another output_dir{_longer(manifest, identity)}"
        )
    if reason:
        raise ValueError(reason)
    warnings.warn(
        f"resume_from_checkpoint=True: {os.fspath(output_dir)} has no whole checkpoint; the run begins anew",
        stacklevel=2,
    )
    return None


def check_whole(checkpoint: Path, files: dict[str, dict[str, Any]], contents: Contents) -> None:
    """Check that a checkpoint has all that a run needs to go on, as it was written.

    Args:
        checkpoint: The directory of the checkpoint.
        files: The files that its manifest lists.
        contents: The kind of the run.

    Raises:
        ValueError: A file is missing or was altered.
    """
    alteration = _alteration(checkpoint, files)
    if alteration:
        raise ValueError(
            f"{checkpoint}: {alteration}. Nothing was loaded; restore the file, or delete this checkpoint to "
            "go on from an earlier one"
        )
    missing = contents.missing(checkpoint, files)
    states = [name for name in files if name.startswith(("optimizer", "scheduler", "rng_state"))]
    if missing and not states:
        raise ValueError(
            f"{checkpoint} has no state of the optimizer, so a run cannot go on from it exactly: it was "
            "written with save_only_model=True; begin anew, or pass another checkpoint"
        )
    if missing:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)}, so it is not whole, whatever {MANIFEST} lists. "
            "Nothing was loaded; delete this checkpoint to go on from an earlier one"
        )
    read_state(checkpoint)


def read_state(checkpoint: Path) -> tuple[int, bool]:
    """The step of a checkpoint, and whether its run had ended there.

    Args:
        checkpoint: The directory of the checkpoint.

    Raises:
        ValueError: It is not the state of a trainer.
    """
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        callbacks: Any = state.stateful_callbacks
        ended = callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
        if type(state.global_step) is not int:
            raise ValueError("it has no step")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint of loku ({STATE}: {error})") from error
    return state.global_step, bool(ended)


def check_best(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Check that the best checkpoint of a run is unaltered and of this run.

    Args:
        checkpoint: The directory of the checkpoint.
        identity: The ``run_identity`` of the run.

    Raises:
        OSError: It is gone.
        ValueError: It was altered, or is of another run.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise OSError(f"load_best_model_at_end: the best checkpoint, {checkpoint}, is gone")
    manifest = _read_manifest(checkpoint)
    reason = _differences(checkpoint, manifest, identity) or _alteration(checkpoint, manifest["files"])
    if reason:
        raise ValueError(
            f"load_best_model_at_end: {checkpoint}, the best checkpoint, was not loaded: {reason}"
        )


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

"""``forget``: one deletion request, from its file to a sealed record and a model that can be served."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from loku.deletion import facts, ledger, record, seal
from loku.deletion.request import Request, request_facts
from loku.deletion.run import Run
from loku.directory_lock import DirectoryLock
from loku.saving.destinations import check_writable, refuse_overlap


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What a request has come to.

    Attributes:
        outcome: "forgotten"; "not forgotten", if a limit is not met; "undone", if the model's utility fell
            too far, and nothing was saved; "not known", if the model does not know the rows; or "delete the
            adapter", if the user's adapter alone knows them.
        directory: The folder of the record.
        served: The folder of the adapter or model that is served, or None if none was made.
        summary: The outcome and what follows from it, in a few lines.
        came_back: The references of earlier requests of the ledger whose rows are over their limits now.
    """

    outcome: str
    directory: Path
    served: Path | None
    summary: str
    came_back: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether nothing of the request is left to do."""
        return self.outcome not in ("not forgotten", "undone") and not self.came_back


def forget(
    request: Request,
    output: str | os.PathLike | None = None,
    *,
    key: str | os.PathLike | None = None,
    progress: bool = True,
) -> Forgotten:
    """Do what a request asks, and leave a folder with its record and the model to be served.

    A run that was killed goes on where it was, if it is started again with the same request, inputs and
    versions. A finished folder is verified and its outcome returned.

    Args:
        request: The request, by ``loku.deletion.request.read_request``.
        output: The folder of the record. None (default) stands for the name of the request's file in the
            ledger, or in the working directory.
        key: The file of an Ed25519 private key (PEM) that signs the record; None (default) signs nothing.
        progress: Whether to show the stages and progress bars, True by default.

    Raises:
        ValueError: The request, its data or its model cannot be used, or the folder holds something else.
            The message says what to do.
        OSError: The folder cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "loku forget runs in one process: start it without torchrun. loku unlearn and loku evaluate run "
            "in many"
        )
    directory = _directory(request, output)
    if key is not None:
        seal.load_key(key)
    work = directory.parent / f".{directory.name}.running"  # private to the run
    if not (directory / seal.SUMS).is_file():
        _check_folder(directory, request)
    directory.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(mode=0o700, exist_ok=True)  # it has rows
    with ExitStack() as locks:
        locks.callback(_remove_if_empty, work)  # of a request that was refused
        # Two requests of one ledger that ran beside each other would start from one state.
        for place in (work, *([] if request.ledger is None else [Path(request.ledger)])):
            locks.enter_context(DirectoryLock(place, "is working in", "Pass another --output"))
        if not (directory / seal.SUMS).is_file():
            Run(request, directory, work, progress).run(key)
            result = _finished(request, directory)
        else:
            result = _finished(request, directory)
            _check_inputs(request, directory)
        if request.ledger is not None:
            ledger.append(request.ledger, directory)  # a record is entered once, also after a kill
    shutil.rmtree(work, ignore_errors=True)
    return result


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _directory(request: Request, output: str | os.PathLike | None) -> Path:
    if output is None:
        output = Path(request.ledger or os.getcwd()) / f"{request.path.stem}-record"
    directory = Path(os.path.abspath(output))
    if directory.name.startswith("."):
        raise ValueError(
            f"{directory}: the name of a record does not begin with a point; pass another --output"
        )
    if request.ledger is not None and directory.parent != Path(request.ledger):
        raise ValueError(
            f"--output {os.fspath(output)} is not in the ledger {request.ledger}, and a ledger is a folder "
            "of records: leave --output out, or name a folder in the ledger"
        )
    return directory


def _check_folder(directory: Path, request: Request) -> None:
    """Refuse a folder that holds something, or that is read."""
    inputs = {"model": request.model, "control": request.control, "adapter": request.trained_adapter}
    refuse_overlap(directory, **inputs)
    if directory.exists() and (not directory.is_dir() or os.listdir(directory)):
        raise ValueError(
            f"{directory} exists, and is no finished record of loku forget. Nothing was started; pass "
            "another --output"
        )
    if directory.is_symlink() or os.path.ismount(directory):  # the record could not be moved there
        kind = "a symbolic link" if directory.is_symlink() else "a mount point"
        raise ValueError(
            f"{directory} is {kind}. Nothing was started; pass a folder in it, such as {directory / 'record'}"
        )
    sealed = next((folder for folder in directory.parents if (folder / seal.SUMS).is_file()), None)
    if sealed is not None:
        raise ValueError(
            f"{directory} lies in {sealed}, a finished record, which would not verify any more. Nothing was "
            "started; pass another --output"
        )
    check_writable(directory)


def _check_inputs(request: Request, directory: Path) -> None:
    """Refuse to answer with an outcome that is that of other data or of another model."""
    inputs = record.read_record(directory).get("inputs") or {}
    changed = [
        f"the data of {name}, {data['source']}"
        for name, data in (inputs.get("data") or {}).items()
        if facts.data_digest(data["source"]) != data["sha256"]
    ]
    if request.ledger is None and "model" in inputs:  # else it is an earlier state, which is sealed
        arguments = request.model_arguments
        now = facts.model_digests(request.model, revision=request.revision, model_arguments=arguments)
        if any(now.get(name) != inputs["model"].get(name) for name in ("files", "base")):
            changed.append(f"the model {request.model}")
    if changed:
        raise ValueError(
            f"{directory} is the finished record of this request, but {changed[0]} has changed since. "
            "Nothing was started; pass another --output to do the request on what is there now"
        )


def _finished(request: Request, directory: Path) -> Forgotten:
    """The outcome of a folder that is finished, if it verifies and is of this request."""
    problems = seal.verify(directory)
    if problems:
        raise ValueError(
            f"{directory} is a finished record that does not verify: {problems[0]}. Pass another --output"
        )
    kept = record.read_record(directory)
    if kept["request"] != json.loads(json.dumps(request_facts(request))):
        raise ValueError(f"{directory} is the record of another request; pass another --output")
    served = next((directory / name for name in ledger.STATES if (directory / name).is_dir()), None)
    earlier = (kept.get("ledger") or {}).get("earlier") or ()
    back = tuple(one["reference"] or one["record"] for one in earlier if one["still_forgotten"] is False)
    return Forgotten(kept["outcome"], directory, served, _summary(kept, directory), back)


_OUTCOMES = {
    "forgotten": "the rows are forgotten, by the limits of the request",
    "not forgotten": "the rows are NOT forgotten: a limit of the request is not met",
    "undone": "NOTHING was changed: the model's utility fell under its floor before the limits were met",
    "not known": "there is nothing to delete: the model does not know the rows",
    "delete the adapter": "delete the adapter: the model does not know the rows without it",
}


def _summary(kept: Mapping[str, Any], directory: Path) -> str:
    """The outcome of a record, and what follows from it, in a few lines."""
    lines = [_OUTCOMES[kept["outcome"]]]
    for name, limit in (kept.get("limits") or {}).items():
        if limit["after"] is not None:
            met = "at most" if limit["met"] else "OVER"
            now, then = f"{limit['after']:.3g} after", f"{limit['before']:.3g} before"
            lines.append(f"  {name}: {then}, {now}, {met} {limit['limit']:.3g}")
    found = (kept.get("rows") or {}).get("near_duplicates") or {}
    for name, of_set in () if found.get("included") else (found.get("sets") or {}).items():
        if name in ("retain", "rest") and of_set["near"]:
            where = "the retain set" if name == "retain" else "the data of the forget rows"
            lines.append(
                f"  near duplicates in {where}: {of_set['near']}, which were NOT forgotten "
                "(--include-near-duplicates)"
            )
    for earlier in (kept.get("ledger") or {}).get("earlier", ()):
        state = {True: "is still forgotten", False: "CAME BACK", None: "could not be checked"}
        name = earlier["reference"] or earlier["record"]
        lines.append(f"  earlier request {name}: {state[earlier['still_forgotten']]}")
    serving = (kept.get("serving") or {}).get("lines") or ()
    if serving:
        lines += [f"to serve it, in {directory}:", *(f"    {line}" for line in serving)]
    lines.append(f"record: {directory / 'record.html'}; loku record verify {shlex.quote(str(directory))}")
    return "\n".join(lines)

"""The files of ``loku evaluate``, which overwrite an earlier report and nothing else.

``--out x.json`` makes the report ``x.json``, the log ``x_log.json`` and the picture ``x.png``. A log in
open-unlearning's form has its summary beside it, ``x_summary.json``. The report lists the digests of the
others. So a log or a picture of another origin is known, and it is never overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from loku.file_digests import file_digest
from loku.saving.destinations import check_writable

_KEYS = {"model", "data", "settings", "sets", "whole", "not_available"}  # of every report
_ROLES = ("report", "log", "picture", "summary")  # of report_files
_MAX_REPORT_BYTES = 64 << 20


def report_files(out: str | os.PathLike, summary: bool = False) -> tuple[Path, ...]:
    """Return the paths of the report, the log and the picture, and of the summary if there is one.

    Args:
        out: The path of the report.
        summary: Whether the log has a summary, False by default.
    """
    out = Path(out)
    log, picture = out.with_name(f"{out.stem}_log.json"), out.with_suffix(".png")
    return (out, log, picture, *([out.with_name(f"{out.stem}_summary.json")] if summary else []))


def check_report_files(
    out: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), summary: bool = False
) -> None:
    """Check that the files of a report can be written over nothing but an earlier report.

    Args:
        out: The path of the report.
        inputs: Files that are read. Names of no file are passed over.
        summary: Whether the log has a summary, False by default.

    Raises:
        ValueError: ``out`` is a picture or a directory. Or one of the files is another one of them, an
            input, or a file that is no earlier report or not of the report there.
        OSError: The directory cannot be written to.
    """
    out = Path(out)
    if out.suffix.lower() == ".png" or out.is_dir():
        raise ValueError(f"--out {out} must be the file of a JSON report, such as report.json")
    files = report_files(out, summary)
    real = [os.path.realpath(file) for file in files]
    read = {os.path.realpath(name): name for name in inputs if name and os.path.exists(name)}
    earlier = read_earlier_report(out, _KEYS)
    for role, file, place in zip(_ROLES, files, real, strict=False):
        if place in read:
            raise ValueError(f"--out {out} would write {file}, which is read; pass another --out")
        if real.count(place) > 1:
            raise ValueError(f"--out {out} would write two files to {place}; pass another --out")
        if not os.path.exists(file):
            continue
        if not os.path.isfile(file):
            raise ValueError(f"--out {out} would write {file}, which is no file; pass another --out")
        if file == out:
            ours = earlier is not None or not os.path.getsize(file)
        else:
            listed = (earlier or {}).get("sha256")
            ours = isinstance(listed, dict) and listed.get(role) == file_digest(file)
        if not ours:
            what = "an earlier report" if file == out else f"a file of the report {out}"
            raise ValueError(
                f"--out {out} would overwrite {file}, which is not {what}, or was changed since. Nothing was "
                "written; move it away, or pass another --out"
            )
    check_writable(out.parent)


def read_earlier_report(file: str | os.PathLike, keys: Set[str]) -> dict[str, Any] | None:
    """Read a report of an earlier run.

    Args:
        file: Its path.
        keys: The keys that every report of its kind has.

    Returns:
        The report; None if there is no file, or if it is no such report.
    """
    file = Path(file)
    try:
        if not file.is_file() or file.stat().st_size > _MAX_REPORT_BYTES:
            return None
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and report.keys() >= keys else None


def write_report_files(
    out: str | os.PathLike,
    report: Mapping[str, Any],
    log: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the log, its summary and the picture, and then the report with their digests.

    Args:
        out: The path of the report, which ``check_report_files`` has passed.
        report: The report, with its measures in "sets".
        log: The log, or None if there are no questions.
        summary: The summary of the log, or None (default) for none.

    Returns:
        The paths that were written.
    """
    from loku.evaluation import plot_measures, write_report

    files = dict(zip(_ROLES, report_files(out, summary=True), strict=True))
    written: dict[str, Path] = {}
    try:
        for role, content in (("log", log), ("summary", summary)):
            if content:
                write_report(files[role], content)
                written[role] = files[role]
        plot_measures(files["picture"], report["sets"])
        written["picture"] = files["picture"]
    finally:  # the measures took long
        digests = {name: file_digest(file) for name, file in written.items()}
        write_report(files["report"], {**report, "sha256": digests})
    return [files["report"], *written.values()]

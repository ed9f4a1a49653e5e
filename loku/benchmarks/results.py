"""The results of a benchmark in a folder: what is finished, one JSON file and one table."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loku.benchmarks.protocol import Benchmark
from loku.benchmarks.table import markdown_table
from loku.directory_lock import DirectoryLock
from loku.evaluation.report import write_report
from loku.saving.destinations import check_writable
from loku.saving.directories import whole_file

Entry = dict[str, Any]

RESULTS, TABLE = "results.json", "table.md"


class Results:
    """The entries of a folder.

    Attributes:
        folder: The folder.
        benchmark: The benchmark.
        entries: The entries in the order in which they were finished. Each has ``kind`` ("before", "retain"
            or "unlearned"), ``split``, ``model``, ``settings``, ``measures``, ``not_available``, ``seconds``
            and more.
    """

    def __init__(self, folder: str | os.PathLike, benchmark: Benchmark) -> None:
        self.folder, self.benchmark = Path(folder), benchmark
        self.entries = self._read()

    @classmethod
    @contextmanager
    def open(cls, folder: str | os.PathLike, benchmark: Benchmark) -> Iterator[Results]:
        """A context with the results of a folder, which this process alone may change.

        Args:
            folder: The folder, which is made.
            benchmark: The benchmark.

        Raises:
            ValueError: The folder has results of another benchmark or files of another origin, or another
                process writes to it.
            OSError: It cannot be written to.
        """
        results = cls(folder, benchmark)
        check_writable(results.folder)
        new = not results.folder.exists()
        results.folder.mkdir(parents=True, exist_ok=True)
        try:
            with DirectoryLock(results.folder, "is writing results to", "Pass another --out"):
                results.entries = results._read()
                yield results
        finally:
            if new and not any(results.folder.iterdir()):
                results.folder.rmdir()

    def _read(self) -> list[Entry]:
        file = self.folder / RESULTS
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; --out is the folder of a benchmark's results")
        if not file.exists():
            if (self.folder / TABLE).exists():
                raise ValueError(f"{self.folder / TABLE} would be overwritten; pass another --out")
            return []
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            name, entries = content["benchmark"], content["entries"]
            keys = [entry["key"] for entry in entries]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} holds no results of a benchmark; pass another --out") from error
        if name != self.benchmark.name or len(set(keys)) < len(keys):
            raise ValueError(
                f"{file} has the results of {name}; pass another --out for {self.benchmark.name}"
            )
        return entries

    def find(self, identity: Mapping[str, Any]) -> Entry | None:
        """Return the finished entry of an identity; None if there is none."""
        key = _key(identity)
        return next((entry for entry in self.entries if entry["key"] == key), None)

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Whether the entry of an identity is finished."""
        return self.find(identity) is not None

    def add(
        self, identity: Mapping[str, Any], entry: Entry, reference: Mapping[str, Any] | None = None
    ) -> None:
        """Add an entry, and write the files.

        Args:
            identity: What identifies it.
            entry: The entry, which gets its key.
            reference: The reference of a retain-only model, which gets a file of its own; None for none.
        """
        entry["key"], entry["group"] = _key(identity), _key(self._of_group(identity))
        entry["measures"] = _plain(entry["measures"])
        entry["leaderboard"] = _plain(entry["leaderboard"])
        if reference is not None:
            write_report(self._reference_file(identity), reference)
        self.entries.append(entry)
        write_report(self.folder / RESULTS, {"benchmark": self.benchmark.name, "entries": self.entries})
        with whole_file(self.folder / TABLE) as file:
            file.write_text(self.table(), encoding="utf-8")

    def reference(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the reference of a retain-only model, which ``add`` has written.

        Raises:
            ValueError: Its file is missing or broken.
        """
        file = self._reference_file(identity)
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file}, what the retain-only model was measured at, cannot be read ({error}); pass another "
                "--out"
            ) from error

    def _reference_file(self, identity: Mapping[str, Any]) -> Path:
        return self.folder / f"reference-{_key(identity)[:12]}.json"

    @contextmanager
    def checkpoints(self, identity: Mapping[str, Any]) -> Iterator[Path]:
        """A context with the folder of a run's checkpoints, which goes if the run has written none."""
        folder = self.folder / f"checkpoints-{_key(identity)[:12]}"
        try:
            yield folder
        finally:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _of_group(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the entries share that are one row of the table: all but seeds and sampled splits."""
        sampled = ("split", "data", "reference") if self.benchmark.averages_splits else ()
        shared = {name: value for name, value in identity.items() if name not in sampled}
        if sampled:
            shared["kind of sample"] = self.benchmark.sample_kind(str(identity.get("split", "")))
        if "settings" in shared:
            shared["settings"] = {
                k: v for k, v in shared["settings"].items() if k not in ("seed", "data_seed")
            }
        return shared

    def table(self) -> str:
        """Return the table of all entries, in Markdown."""
        return markdown_table(self.benchmark, self.entries)

    def line(self, entry: Entry) -> str:
        """Return one line on an entry."""
        measures = ", ".join(
            f"{name} {value:.4g}" if value is not None else f"{name} -"
            for name, value in entry["measures"].items()
        )
        what = entry.get("method") or entry["kind"]
        return f"{entry['split']}, {what}: {measures} ({entry['seconds']:.0f} s)"


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _key(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

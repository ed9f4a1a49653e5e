"""Result files of the benchmarks and of ``experiments/robustness.py``: rows, and where they were measured.

A file is ``{"environment": ..., "rows": [...]}``. It is written anew after each comparison, so a run that is
cut off keeps its finished comparisons.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PACKAGES = [
    "torch", "triton", "transformers", "peft", "cut-cross-entropy", "liger-kernel", "quack-kernels",
    "torchmetrics", "scikit-learn", "scipy",
]  # fmt: skip
SAME_RUN = ("device", "versions", "commit")  # facts that must not change when a run goes on


# --- the environment ------------------------------------------------------------------------------


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "loku_kernels", "loku", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            pass


def environment(device: str = "cpu", command: str | None = None) -> dict[str, Any]:
    """Return the facts of the machine, the packages and the commit that belong to a result.

    Args:
        device: The device that computes, "cpu" or "cuda".
        command: The command that made the result. The default is that of this process.
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "commit": _commit(),
        "command": command or " ".join(["python", *sys.argv]),
    }


# --- files ----------------------------------------------------------------------------------------


def read_result(path: Path) -> Any:
    """Return the content of a result file: a dictionary, or the list of the lines of a ``.jsonl`` file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


class ResultFile:
    """The rows of one run and the file that they are written to.

    Args:
        path: The file.
        device: The device that computes, "cpu" or "cuda".
        command: The command that made the result. The default is that of this process.
    """

    def __init__(self, path: str | Path, device: str = "cpu", command: str | None = None) -> None:
        self.path = Path(path)
        self.environment = environment(device, command)
        self.rows: list[Row] = []

    def content(self) -> dict[str, Any]:
        """Return the dictionary that the file holds."""
        return {"environment": self.environment, "rows": self.rows}

    def add(self, rows: Iterable[Row]) -> None:
        """Print rows as a table, add them and write the file."""
        rows = list(rows)
        self.rows += rows
        print_table(rows)
        self.write()

    def write(self) -> None:
        """Write the file whole: a process that is killed leaves the one from before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


class ResumableFile(ResultFile):
    """A result file that goes on where an earlier run stopped.

    ``failed`` lists functions and cases with the reason of their failure, ``left_out`` the cases for which no
    time was left. Both are dictionaries with ``step`` and, for a case, ``shape``.

    Args:
        path: The file. Its rows and failures are kept if it exists.
        device: The device that computes, "cpu" or "cuda".

    Raises:
        SystemExit: The file is of another device, of other versions or of another commit.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        super().__init__(path, device)
        self.failed: list[Row] = []
        self.left_out: list[Row] = []
        if self.path.exists():
            earlier = read_result(self.path)
            for fact in SAME_RUN:
                if earlier["environment"][fact] != self.environment[fact]:
                    raise SystemExit(f"{self.path} is of another {fact}: give another folder")
            self.rows, self.failed = earlier["rows"], earlier["failed"]

    def content(self) -> dict[str, Any]:
        """Return the dictionary that the file holds."""
        return {**super().content(), "failed": self.failed, "left_out": self.left_out}

    def done(self, step: str, shape: str | None = None) -> bool:
        """Whether a case has a row or a failure."""
        return any((entry["step"], entry.get("shape")) == (step, shape) for entry in self.rows + self.failed)

    def add(self, rows: Iterable[Row], failed: Sequence[Row] = ()) -> None:
        """Add all results of a case at once: a run that is cut off has the whole case or nothing of it."""
        self.failed += failed
        for entry in failed:
            print(f"  failed: {entry}", flush=True)
        super().add(rows)

    def leave_out(self, step: str, shape: str) -> None:
        """Note a case for which no time is left."""
        self.left_out.append({"step": step, "shape": shape})
        print(f"  no time left: {step} {shape}", flush=True)
        self.write()


# --- tables ---------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mebibytes(size: int | None) -> str:
    """Return a number of bytes in MiB, without decimals; a question mark for None."""
    return "?" if size is None else f"{size / 2**20:.0f}"


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of the figures of a row."""
    for key, value in row.items():
        if key in ("over", "times"):
            for label, ratio in value.items():
                yield f"{key} {label}", f"{ratio:.2f}"
        elif key.startswith("milliseconds"):
            yield (
                key.replace("milliseconds", "ms").replace("_", " "),
                (f"{value:.3f}" if value < 1 else f"{value:.2f}"),
            )
        elif key in ("peak_extra_bytes", "peak_bytes"):
            yield {"peak_extra_bytes": "extra MiB", "peak_bytes": "peak MiB"}[key], mebibytes(value)
        elif isinstance(value, float):
            yield key.replace("_", " "), f"{value:.3g}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one case: a title with the values that all share, then a line for each name.

    Args:
        rows: The rows, each with ``name``. Numbers that are not whole are figures, all else is the title's.
    """
    if not rows:
        return
    first = rows[0]
    shared = [key for key in first if key != "name" and not isinstance(first[key], (float, dict, type(None)))]
    shared = [key for key in shared if key not in ("peak_extra_bytes", "peak_bytes")]
    print(
        "\n"
        + ", ".join(f"{key} {first[key]}" if isinstance(first[key], int) else first[key] for key in shared)
    )
    table = [dict(_cells(row)) for row in rows]
    headings = list(dict.fromkeys(heading for cells in table for heading in cells))
    widths = {heading: max(9, len(heading)) for heading in headings}
    width = 2 + max(len(row["name"]) for row in rows)
    print(" " * (width + 2) + "  ".join(heading.rjust(widths[heading]) for heading in headings))
    for row, cells in zip(rows, table, strict=True):
        values = "  ".join(cells.get(heading, "-").rjust(widths[heading]) for heading in headings)
        print(f"  {row['name']:{width}}{values}", flush=True)

"""The common parts of the tables of compiled kernels: the file, the comparison with it, the command line.

A table is {compiler: its version, "kernels": {kernel: {architecture: facts}}}.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, int]  # name -> number of a kernel on an architecture
Table = dict[str, Any]


def differences(ours: Table, committed: Table, compiler: str) -> list[str]:
    """Return a line for each difference between a table and the committed one.

    Facts are compared if the compiler's version is the same.

    Args:
        ours: The table.
        committed: The committed table.
        compiler: The key of the compiler's version.
    """
    found = []
    if other := ours["kernels"].keys() ^ committed["kernels"].keys():
        found.append(f"not the kernels that are recorded: {sorted(other)}")
    if ours[compiler] != committed[compiler]:
        return found
    for name, row in ours["kernels"].items():
        for architecture, facts in row.items():
            recorded = committed["kernels"].get(name, {}).get(architecture)
            if facts != recorded:
                found.append(f"{name} on {architecture}: {facts}, recorded {recorded}")
    return found


def argument_parser(description: str | None, path: Path) -> argparse.ArgumentParser:
    """Return the parser of a script whose table is in ``path``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {path.name}")
    return parser


def report(ours: Table, path: Path, problems: Callable[[Table, Table], list[str]], write: bool) -> None:
    """Print the problems of a table and exit.

    Args:
        ours: The table.
        path: The file of the committed table.
        problems: (table, committed table) -> a line for each problem.
        write: Whether to write the table to ``path`` first.

    Raises:
        SystemExit: Always, with 1 if there are problems, else with 0.
    """
    if write:
        path.write_text(json.dumps(ours, indent=1) + "\n")
    wrong = problems(ours, json.loads(path.read_text()))
    print("\n".join(wrong) or f"as in {path.name}")
    raise SystemExit(1 if wrong else 0)

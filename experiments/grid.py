"""Grids of experiments: cells from YAML and flags, run in parallel, one JSON line for each, never run twice.

A cell is a frozen dataclass of settings. A grid is a list of mappings from its fields to a value or a list of
values, and all combinations are run. The second half of this module has the functions that the reports on
result files share.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from shared import result_files
from tqdm import tqdm

from loku.data.files import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

Cell = TypeVar("Cell")  # a frozen dataclass
Run = dict[str, Any]  # a line of a result file
Group = list[Run]  # lines that differ in few settings


# --- options --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, kind: type, out: Path) -> None:
    """Add the options of a grid: a flag for each field of a cell, --grid, --out and --jobs.

    Args:
        parser: The parser, which is changed.
        kind: The class of the cells.
        out: The default result file.
    """
    parser.add_argument("--grid", type=Path, help="YAML file; the flags make one more mapping")
    types = typing.get_type_hints(kind)
    for field in fields(kind):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            nargs="+",
            type=types[field.name],
            metavar="X",
            help=f"default {field.default}",
        )
    parser.add_argument(
        "--out", type=Path, help=f"result file, JSON lines (default: experiments/results/{out.name})"
    )
    parser.set_defaults(default_out=out)
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no cell after so many minutes (default: no limit)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="cells that run at a time, each on its share of the cores",
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. ``--model`` needs ``--out``, because a line does not name its model."""
    options = parser.parse_args(argv)
    if options.out is None:
        if getattr(options, "model", None):
            parser.error("--model needs --out, a result file of its own")
        options.out = options.default_out
    return options


# --- cells ----------------------------------------------------------------------------------------


def cells_of(grid: Iterable[Mapping[str, Any]], kind: type[Cell]) -> list[Cell]:
    """Return the cells of a grid, each once, in order.

    Args:
        grid: The mappings. Values get the types of the fields, since YAML reads 1e-3 as a string.
        kind: The class of the cells.

    Raises:
        SystemExit: A mapping has a key that is no field.
    """
    types = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    cells: dict[Cell, None] = {}
    for mapping in grid:
        unknown = sorted(set(mapping) - set(names))
        if unknown:
            raise SystemExit(f"unknown settings in the grid: {', '.join(unknown)}; known: {', '.join(names)}")
        values = [
            [types[name](one) for one in (value if isinstance(value, list) else [value])]
            for name, value in mapping.items()
        ]
        for combination in itertools.product(*values):
            cells[kind(**dict(zip(mapping, combination, strict=True)))] = None
    return list(cells)


def chosen_cells(options: argparse.Namespace, kind: type[Cell]) -> list[Cell]:
    """Return the cells that parsed options ask for."""
    flags = {
        field.name: value
        for field in fields(kind)  # type: ignore[arg-type]
        if (value := getattr(options, field.name))
    }
    grid = yaml.safe_load(options.grid.read_text(encoding="utf-8")) if options.grid else []
    return cells_of([*grid, flags] if flags or not grid else grid, kind)


def finished(path: Path, kind: type[Cell]) -> set[Cell]:
    """Return the cells that a result file holds. A missing or empty file holds none."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    lines = read_rows(path) if path.exists() and path.stat().st_size else []
    return {kind(**{name: value for name, value in line.items() if name in names}) for line in lines}


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's fields of ``UnlearnConfig`` without the retain weight where there is no retain loss.

    A cell has all fields. A config refuses a retain weight without effect.
    """
    from loku.objectives import OBJECTIVES

    objective = OBJECTIVES.get(settings.get("method", "ihl"))
    unused = {"retain_weight"} if objective is not None and objective.retain is None else set()
    return {name: value for name, value in settings.items() if name not in unused}


def run(
    cells: Sequence[Any],
    function: Callable[..., dict[str, Any]],
    arguments_of: Callable[[Any], tuple[Any, ...]],
    out: Path,
    jobs: int,
    summary: Callable[[Run], str],
    minutes: float | None = None,
) -> int:
    """Run the cells that a result file lacks, in fresh processes, and append a line for each.

    A cell that fails has its error printed, and the others go on. The log beside the result file, ``.log``,
    has the command, the commit and the machine of each run, and the outcome of each of its cells.

    Args:
        cells: The cells, all of one class.
        function: (cell, *arguments) -> the figures of its line. It is importable by name.
        arguments_of: cell -> its further arguments, which are pickled.
        out: The result file.
        jobs: The number of processes, which share the cores.
        summary: line -> text for the progress bar.
        minutes: The minutes after which no cell begins; None (default) for no limit. The next run begins the
            cells that are left.

    Returns:
        The number of cells that failed.
    """
    done = finished(out, type(cells[0]))
    todo = [cell for cell in cells if cell not in done]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    where = result_files.environment()
    facts = ", ".join(f"{name} {where[name]}" for name in ("commit", "device", "cores"))
    log(out, f"{where['command']} ({facts}): {len(todo)} of {len(cells)} cells to run")
    os.environ["OMP_NUM_THREADS"] = str(max(1, where["cores"] // jobs))
    failed, end = 0, math.inf if minutes is None else time.monotonic() + 60 * minutes
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(todo), unit="cell") as bar, out.open("a", encoding="utf-8") as file:
        waiting, running = list(todo), {}
        while True:
            while waiting and len(running) < jobs and time.monotonic() < end:
                cell = waiting.pop(0)
                running[pool.submit(function, cell, *arguments_of(cell))] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    line = future.result()
                except Exception as error:
                    failed += 1
                    log(out, f"failed: {cell}: {error!r}")
                    tqdm.write(f"failed: {cell}: {error!r}", file=sys.stderr)
                else:
                    file.write(json.dumps({**asdict(cell), **line, "environment": where}) + "\n")
                    file.flush()
                    bar.set_postfix_str(summary(line))
                    log(out, f"{own_settings(cell)}: {summary(line)}")
                bar.update()
    log(out, f"the end: {failed} cells failed, {len(waiting)} are left")
    if waiting:
        print(f"the time is over, and {len(waiting)} cells are left: repeat the command", flush=True)
    return failed


def log(out: Path, text: str) -> None:
    """Append a line with its time, UTC, to the log beside a result file."""
    with out.with_suffix(".log").open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")


def own_settings(cell: Any) -> str:
    """Return the settings of a cell that are not the defaults."""
    default = asdict(type(cell)())
    own = [f"{name} {value}" for name, value in asdict(cell).items() if value != default[name]]
    return ", ".join(own) or "the defaults"


def run_and_report(
    cells: Sequence[Any],
    function: Callable[..., dict[str, Any]],
    arguments_of: Callable[[Any], tuple[Any, ...]],
    options: argparse.Namespace,
    summary: Callable[[Run], str],
    write_report: Callable[[Path], None],
) -> None:
    """``run`` with parsed options, then ``write_report`` on the result file.

    Raises:
        SystemExit: A cell failed.
    """
    failed = run(cells, function, arguments_of, options.out, options.jobs, summary, options.minutes)
    write_report(options.out)
    if failed:
        raise SystemExit(f"{failed} cells failed")


# --- reports --------------------------------------------------------------------------------------


def report_command(
    doc: str | None, default: Path, write_report: Callable[[Path], None], argv: Sequence[str] | None = None
) -> None:
    """Run the command of a report: ``write_report`` on a result file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        default=default,
        help=f"result file (default: experiments/results/{default.name})",
    )
    write_report(parser.parse_args(argv).results)


def grouped(
    runs: Iterable[Run], measured: Collection[str], *without: str
) -> dict[tuple[tuple[str, Any], ...], Group]:
    """Return the runs by their settings.

    Args:
        runs: The lines of a result file.
        measured: The fields that are no settings.
        *without: The settings in which runs of one group may differ.

    Returns:
        The items of the other settings -> their runs.
    """
    groups: dict[tuple[tuple[str, Any], ...], Group] = {}
    for run in runs:
        key = tuple((k, v) for k, v in run.items() if k not in measured and k not in without)
        groups.setdefault(key, []).append(run)
    return groups


def usual(runs: Iterable[Run], measured: Collection[str], *free: str) -> Group:
    """Return the runs with the commonest settings, apart from those in ``free``: a picture can show them."""
    return max(grouped(runs, measured, *free).values(), key=len)


def varied_fields(groups: Sequence[Group], measured: Collection[str], *without: str) -> list[str]:
    """Return the settings in which groups of runs differ, in order."""
    names = [name for name in groups[0][0] if name not in measured and name not in without]
    return [name for name in names if len({group[0][name] for group in groups}) > 1]


def new_figure(panels: int, title: str, ylabel: str, **labels: Any) -> "tuple[Figure, list[Axes]]":
    """Return a figure and its panels, side by side.

    Args:
        panels: The number of panels.
        title: The title of the figure.
        ylabel: The label of the shared vertical axis.
        **labels: Properties of every panel.
    """
    from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process

    figure = Figure(figsize=(max(7.5, 4.2 * panels), 4.1), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for panel in axes:
        panel.set(**labels)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    return figure, axes

"""Grids of experiments: cells from YAML and flags, run in parallel, one JSON line each, never run twice.

A cell is a frozen dataclass of settings; a grid is a list of mappings from its fields to a value or a list
of values, of which all combinations are run. Below: what the reports on result files share.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import typing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path

import yaml
from tqdm import tqdm

from loku.data.files import read_rows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import environment

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser, kind, out):
    """Options of a grid of ``kind``: a flag for each of its fields, --grid, --out and --jobs."""
    parser.add_argument("--grid", type=Path, help="YAML file; flags are for one mapping of their own")
    types = typing.get_type_hints(kind)
    for field in fields(kind):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            nargs="+",
            type=types[field.name],
            metavar="X",
            help=f"default {field.default}",
        )
    parser.add_argument("--out", type=Path, help=f"result file, JSON lines (default: results/{out.name})")
    parser.set_defaults(default_out=out)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each on its share of the cores")


def parse_arguments(parser, argv):
    """The options. What another ``--model`` gives goes to a file of its own: lines do not say of which model
    they are."""
    options = parser.parse_args(argv)
    if options.out is None:
        if getattr(options, "model", None):
            parser.error("--model needs --out, a result file of its own")
        options.out = options.default_out
    return options


def cells_of(grid, kind):
    """The cells of a list of mappings, each once, in order. Values get the types of ``kind``'s fields: YAML
    reads 1e-3 as a string."""
    types = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    cells = {}
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


def chosen_cells(options, kind):
    """The cells that parsed options ask for."""
    flags = {field.name: value for field in fields(kind) if (value := getattr(options, field.name))}
    grid = yaml.safe_load(options.grid.read_text(encoding="utf-8")) if options.grid else []
    return cells_of([*grid, flags] if flags or not grid else grid, kind)


def finished(path, kind):
    """The cells that a result file holds."""
    names = {field.name for field in fields(kind)}
    lines = read_rows(path) if path.exists() else []
    return {kind(**{name: value for name, value in line.items() if name in names}) for line in lines}


def run(cells, function, arguments_of, out, jobs, summary):
    """Run the cells that ``out`` lacks in fresh processes and append a line for each.

    Args:
        function: (cell, *arguments) -> dict; importable by name.
        arguments_of: cell -> its further arguments, which are pickled.
        summary: line -> text for the progress bar.

    Where one fails its error is printed and the others go on. Returns how many failed.
    """
    done = finished(out, type(cells[0]))
    todo = [cell for cell in cells if cell not in done]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    where = environment()
    os.environ["OMP_NUM_THREADS"] = str(max(1, where["cores"] // jobs))
    failed = 0
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(todo), unit="cell") as bar, out.open("a", encoding="utf-8") as file:
        running = {pool.submit(function, cell, *arguments_of(cell)): cell for cell in todo}
        for future in as_completed(running):
            cell = running[future]
            try:
                line = future.result()
            except Exception as error:
                failed += 1
                tqdm.write(f"failed: {cell}: {error!r}", file=sys.stderr)
            else:
                file.write(json.dumps({**asdict(cell), **line, "environment": where}) + "\n")
                file.flush()
                bar.set_postfix_str(summary(line))
            bar.update()
    return failed


def run_and_report(cells, function, arguments_of, options, summary, write_report):
    """``run``, then ``write_report`` on the result file; ``SystemExit`` if a cell failed."""
    failed = run(cells, function, arguments_of, options.out, options.jobs, summary)
    write_report(options.out)
    if failed:
        raise SystemExit(f"{failed} cells failed")


# --- reports --------------------------------------------------------------------------------------


def report_command(doc, default, write_report, argv=None):
    """The command line of a report: ``write_report`` on a result file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=default)
    write_report(parser.parse_args(argv).results)


def grouped(runs, measured, *without):
    """Runs by their settings: all fields but those that were ``measured`` and those to do ``without``."""
    groups = {}
    for run in runs:
        key = tuple((k, v) for k, v in run.items() if k not in measured and k not in without)
        groups.setdefault(key, []).append(run)
    return groups


def usual(runs, measured, *free):
    """The runs whose settings, but those in ``free``, are the commonest: what a picture can show."""
    return max(grouped(runs, measured, *free).values(), key=len)


def varied_fields(groups, measured, *without):
    """The settings in which groups of runs differ, in order."""
    names = [name for name in groups[0][0] if name not in measured and name not in without]
    return [name for name in names if len({group[0][name] for group in groups}) > 1]


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def new_figure(panels, ylabel, **labels):
    """(figure, list of its panels side by side)"""
    from matplotlib.figure import Figure  # no pyplot: it would pick a backend for everyone

    figure = Figure(figsize=(4.2 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for panel in axes:
        panel.set(**labels)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    return figure, axes

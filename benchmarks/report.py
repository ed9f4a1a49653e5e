"""Write the tables of README and ``docs/`` from the result files, and the picture of growth.

    python benchmarks/report.py [--check] [--results DIR] [--root DIR]

A table is between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a page, where NAME is a key of ``TABLES``.
``PAGES`` lists the tables that each page must have. The figures on a CPU are those of the largest measured
number of threads. ``--check`` writes nothing: it exits with 1 if a page is out of date.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import tables
from ablation_table import fila_ablation, fila_balance, fila_overlap
from forgetting_table import forgetting
from gpu_tables import gpu
from result_files import RESULTS, read_result
from scaling_picture import draw
from summary_table import summary
from tutorial_tables import TABLES as TUTORIAL

ROOT = Path(__file__).parents[1]
ABLATION = ROOT / "experiments" / "results" / "fila_ablation.jsonl"
BALANCE = ROOT / "experiments" / "results" / "fila_balance.jsonl"
TUTORIAL_RUNS = ROOT / "experiments" / "results" / "tutorial.json"
SUMMARISED = [f"{name}_cpu.json" for name in ("ihl_kernel", "linear", "unlearn", "fisher", "fila")]
# name -> the function that makes the table, and the result files whose contents it takes
TABLES: dict[str, tuple[Callable[..., str], Sequence[str | Path]]] = {
    "forgetting": (forgetting, ["demo.json"]),
    "summary": (summary, SUMMARISED),
    "machine": (tables.machine, ["ihl_kernel_cpu.json"]),
    "ihl_kernel": (tables.ihl_kernel, ["ihl_kernel_cpu.json"]),
    "linear": (tables.linear, ["linear_cpu.json"]),
    "unlearn": (tables.unlearn, ["unlearn_cpu.json"]),
    "fisher": (tables.fisher, ["fisher_cpu.json"]),
    "fisher_memory": (tables.fisher_memory, ["fisher_memory_cpu.json"]),
    "fila": (tables.fila, ["fila_cpu.json"]),
    "scaling": (tables.scaling, ["scaling_cpu.json"]),
    "host_time": (tables.host_time, ["host_time_cpu.json"]),
    "demo": (tables.demo, ["demo.json"]),
    "gpu_h200": (gpu, ["gpu_h200.json"]),
    "fila_ablation": (fila_ablation, [ABLATION]),
    "fila_balance": (fila_balance, [BALANCE]),
    "fila_overlap": (fila_overlap, [BALANCE]),
    **{name: (make, [TUTORIAL_RUNS]) for name, make in TUTORIAL.items()},
}
PAGES = {
    "README.md": ["forgetting", "summary"],
    "docs/experiments.md": ["fila_ablation", "fila_balance", "fila_overlap"],
    "docs/tutorial.md": list(TUTORIAL),
}
_ELSEWHERE = {name for names in PAGES.values() for name in names} | TUTORIAL.keys()
PAGES["docs/benchmarks.md"] = [name for name in TABLES if name not in _ELSEWHERE]


def render(text: str, results: Path = RESULTS) -> str:
    """Return the text of a page with all its tables made anew.

    Args:
        text: The text of the page.
        results: The folder of the result files.
    """
    for name, (make, files) in TABLES.items():
        marked = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.S)
        if marked.search(text):
            content = make(*(read_result(Path(results) / file) for file in files))
            before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            text = marked.sub(before + content.replace("\\", r"\\") + "\n" + after, text)
    return text


def rendered_pages(root: Path, results: Path) -> dict[Path, tuple[str, str]]:
    """Return path -> (text, text with its tables made anew) of all pages.

    Raises:
        SystemExit: A page is missing or has not each of its tables exactly once.
    """
    pages = {}
    for page, names in PAGES.items():
        path = root / page
        if not path.exists():
            raise SystemExit(f"{path} is missing")
        text = path.read_text(encoding="utf-8")
        for name in names:
            counts = {text.count(f"<!-- {name} -->"), text.count(f"<!-- /{name} -->")}
            if counts != {1}:
                raise SystemExit(f"{page} needs <!-- {name} --> and <!-- /{name} --> once each")
        pages[path] = text, render(text, results)
    return pages


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the results (default: benchmarks/results)",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    options = parser.parse_args(argv)
    pages = rendered_pages(options.root, options.results)
    if options.check:
        old = [str(path) for path, (text, rendered) in pages.items() if text != rendered]
        if old:
            raise SystemExit(f"out of date, run python benchmarks/report.py: {', '.join(old)}")
        print("all tables are up to date")
        return
    for path, (_, rendered) in pages.items():
        path.write_text(rendered, encoding="utf-8")
        print("written:", path)
    picture = options.results / "scaling_cpu.png"
    draw(read_result(options.results / "scaling_cpu.json"), picture)
    print("written:", picture)


if __name__ == "__main__":
    main()

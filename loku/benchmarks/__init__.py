"""The field's benchmarks: their data, unlearning by some settings, and measures in the benchmarks' columns.

``run_benchmark`` is behind ``loku benchmark``. A benchmark is a small class with its data, its columns and
its measures (``Benchmark``).
"""

from loku.benchmarks.muse import Muse
from loku.benchmarks.protocol import Benchmark, Column, Measures, Measuring, Sets
from loku.benchmarks.results import Results
from loku.benchmarks.run import Plan, combinations, run_benchmark
from loku.benchmarks.rwku import Rwku
from loku.benchmarks.sources import Source
from loku.benchmarks.table import leaderboard_rows, markdown_table
from loku.benchmarks.tdec import Tdec
from loku.benchmarks.tofu import Tofu
from loku.benchmarks.wmdp import Wmdp

BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in (Tofu, Muse, Wmdp, Rwku, Tdec)}

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Column",
    "Measures",
    "Measuring",
    "Muse",
    "Plan",
    "Results",
    "Rwku",
    "Sets",
    "Source",
    "Tdec",
    "Tofu",
    "Wmdp",
    "combinations",
    "leaderboard_rows",
    "markdown_table",
    "run_benchmark",
]

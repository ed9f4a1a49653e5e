"""Run ``loku demo`` with three seeds, for the table in ``docs/benchmarks.md``.

    python benchmarks/demo.py [--seeds N ...] [--json FILE]

The result file is written after each seed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from result_files import RESULTS, ResultFile

from loku.demo import format_report, run_demo


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--json", metavar="FILE", help="result file (default: benchmarks/results/demo.json)")
    options = parser.parse_args(argv)
    file = ResultFile(options.json or RESULTS / "demo.json")
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:
            report = run_demo(Path(directory) / str(seed), seed)
            print(f"\nseed {seed}\n{format_report(report)}", flush=True)
            file.rows.append({"seed": seed, **report})
            file.write()
    print("\nwritten:", file.path)


if __name__ == "__main__":
    main()

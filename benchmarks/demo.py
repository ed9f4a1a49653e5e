"""``loku demo`` with three seeds: the figures that the README quotes.

python benchmarks/demo.py [--seeds N ...] [--json FILE]
"""

import argparse
import tempfile
from pathlib import Path

from harness import write_result

from loku.demo import format_report, run_demo


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", metavar="FILE", help="result file (default: results/demo.json)")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:
            report = run_demo(Path(directory) / str(seed), seed)
            print(f"\nseed {seed}\n{format_report(report)}", flush=True)
            rows.append({"seed": seed, **report})
            path = write_result("demo", rows, path=options.json)
    print("\nwritten:", path)


if __name__ == "__main__":
    main()

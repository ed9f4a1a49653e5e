"""Make random right and wrong calls of ``loku_kernels``, count their outcomes, and write the counts.

    scripts/sanitized.sh python scripts/fuzz.py     # with sanitizers, as for the committed counts
    python scripts/fuzz.py --calls 5000 --seed 1    # with the installed core

The calls are those of ``tests/helpers/fuzz_calls.py``. They run in child processes of two threads, a few
thousand in each. A call is "right", refused by an error, or wrong. A child that ends by a signal or by a
sanitizer's report counts as a crash. The counts go to ``scripts/fuzz_counts.json`` after each child. Each
call has a seed of its own, so a run with the same first seed makes the same calls.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COUNTS = Path(__file__).parent / "fuzz_counts.json"
CALLS_OF_A_CHILD = 5000
THREADS = 2


def sanitizers() -> list[str]:
    """Return the names of the sanitizers of this process."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    return [
        name for name, library in (("address", "libasan"), ("undefined", "libubsan")) if library in loaded
    ]


def make_calls(name: str, first: int, count: int) -> Counter[str]:
    """Make some calls in this process.

    Args:
        name: The name of the calls in ``fuzz_calls.CALLS``.
        first: The seed of the first call. The next call has the next seed.
        count: The number of calls.

    Returns:
        The number of calls by outcome. Anything that is no outcome counts as ``"wrong"`` and is printed.
    """
    import torch
    from fuzz_calls import make_call

    torch.set_num_threads(THREADS)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            outcome = make_call(name, seed)
        except Exception as error:
            outcome = "wrong"
            print(f"{name} with seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
        outcomes[outcome] += 1
    return outcomes


def run_child(name: str, first: int, count: int) -> Counter[str]:
    """Run ``make_calls`` in a process of its own. A crash is an outcome, and the only one of the child."""
    command = [sys.executable, __file__, "--child", name, str(first), str(count)]
    search = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "tests/helpers")])
    threads = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    environment = os.environ | {"PYTHONPATH": search} | threads
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(child.stderr, end="", file=sys.stderr)
    if child.returncode != 0:
        print(f"{name}, seeds {first} to {first + count - 1}: {child.returncode}", file=sys.stderr)
        return Counter(crashed=1)
    return Counter(json.loads(child.stdout.splitlines()[-1]))


def summary(by_call: dict[str, Counter[str]], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of all calls, the facts of the run, and the counts by the name of the calls."""
    total = sum(by_call.values(), Counter())
    kinds = ("right", "wrong", "crashed")
    return {
        "calls": total.total(),
        **{kind: total[kind] for kind in kinds},
        "refused": {name: total[name] for name in sorted(total) if name not in kinds},
        **facts,
        "by_call": {name: dict(sorted(counts.items())) for name, counts in by_call.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls", type=int, default=100_000, help="the number of calls (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--output", type=Path, default=COUNTS, help="the file of the counts")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "FIRST", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, first, count = arguments.child
        print(json.dumps(make_calls(name, int(first), int(count))))
        return
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/helpers")]
    from fuzz_calls import CALLS
    from result_files import environment

    facts = {
        "seed": arguments.seed,
        "threads": THREADS,
        "sanitizers": sanitizers(),
        "environment": environment(),
    }
    by_call: dict[str, Counter[str]] = {name: Counter() for name in CALLS}
    start = time.monotonic()
    for name, (_, _, share) in CALLS.items():
        count = -(-arguments.calls * round(100 * share) // 100)
        for done in range(0, count, CALLS_OF_A_CHILD):
            size = min(CALLS_OF_A_CHILD, count - done)
            by_call[name] += run_child(name, arguments.seed + done, size)
            seconds = {"seconds": round(time.monotonic() - start)}
            arguments.output.write_text(json.dumps(summary(by_call, facts | seconds), indent=1) + "\n")
            print(f"{name}: {dict(by_call[name])}", flush=True)
    counts = summary(by_call, facts)
    print(json.dumps({key: counts[key] for key in ("calls", "right", "wrong", "crashed", "refused")}))
    if counts["wrong"] or counts["crashed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

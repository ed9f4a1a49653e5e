"""Make random right and wrong calls of ``loku_kernels``, count their outcomes, and write the counts.

    scripts/sanitized.sh python scripts/fuzz.py     # with sanitizers, as for the committed counts
    python scripts/fuzz.py --calls 5000 --seed 1    # with the installed core

The calls are those of ``tests/helpers/fuzz_calls.py``. They run in child processes of two threads, a few
thousand in each. A call is "right", refused by an error, or wrong. A child that ends by a signal or by a
sanitizer's report counts as a crash. The counts go to ``scripts/fuzz_counts.json`` after each child. A run
with the same seed makes the same calls.
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
SHOWN = 3  # wrong calls of a child that are printed


def sanitizers() -> list[str]:
    """Return the names of the sanitizers of this process."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    return [
        name for name, library in (("address", "libasan"), ("undefined", "libubsan")) if library in loaded
    ]


def make_calls(name: str, seed: int, count: int) -> Counter[str]:
    """Make some calls in this process.

    Args:
        name: The name of the calls in ``fuzz_calls.CALLS``.
        seed: The seed of their arguments.
        count: The number of calls.

    Returns:
        The number of calls by outcome. Anything that is no outcome counts as ``"wrong"`` and is printed.
    """
    import hypothesis
    import torch
    from fuzz_calls import CALLS
    from hypothesis import strategies as st

    torch.set_num_threads(2)
    check, strategies, _ = CALLS[name]
    outcomes: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.tuples(*strategies))
    def call(arguments: tuple[Any, ...]) -> None:
        try:
            outcome = check(*arguments)
        except Exception as error:
            outcome = "wrong"
            if outcomes["wrong"] < SHOWN:
                print(f"{name}{arguments}: {type(error).__name__}: {error}", file=sys.stderr)
        outcomes[outcome] += 1

    call()
    return outcomes


def run_child(name: str, seed: int, count: int) -> Counter[str]:
    """Run ``make_calls`` in a process of its own. A crash is an outcome, too."""
    command = [sys.executable, __file__, "--child", name, str(seed), str(count)]
    search = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "tests/helpers")])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(child.stderr, end="", file=sys.stderr)
    if child.returncode != 0:
        print(f"{name} with seed {seed} ended with {child.returncode}", file=sys.stderr)
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
    parser.add_argument("--seed", type=int, default=0, help="the seed of the arguments (default %(default)s)")
    parser.add_argument("--output", type=Path, default=COUNTS, help="the file of the counts")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "SEED", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, seed, count = arguments.child
        print(json.dumps(make_calls(name, int(seed), int(count))))
        return
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/helpers")]
    from fuzz_calls import CALLS
    from result_files import environment

    facts = {"seed": arguments.seed, "threads": 2, "sanitizers": sanitizers(), "environment": environment()}
    by_call: dict[str, Counter[str]] = {name: Counter() for name in CALLS}
    start, seed = time.monotonic(), arguments.seed
    for name, (_, _, share) in CALLS.items():
        wanted = -(-arguments.calls * round(100 * share) // 100)
        while (missing := wanted - by_call[name].total()) > 0:
            seed += 1
            by_call[name] += run_child(name, seed, min(missing, CALLS_OF_A_CHILD))
            seconds = {"seconds": round(time.monotonic() - start)}
            arguments.output.write_text(json.dumps(summary(by_call, facts | seconds), indent=1) + "\n")
            print(f"{name}: {dict(by_call[name])}", flush=True)
    counts = summary(by_call, facts)
    print(json.dumps({key: counts[key] for key in ("calls", "right", "wrong", "crashed", "refused")}))
    if counts["wrong"] or counts["crashed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

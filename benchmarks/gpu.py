"""Everything that needs a GPU, in one command: build, tests, measurements.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--only STEP ...]
    python benchmarks/gpu.py --dry-run [--card "H100 SXM"]
    python benchmarks/gpu.py --out DIR --device cpu

The command builds the compiled core for the card, runs the tests marked ``gpu``, and measures the cases of
``gpu_cases.py`` and ``gpu_runs.py``: each kernel, and steps of a whole model, beside their peers and beside a
floor, in one process. Each case is written to DIR/gpu.json as soon as it is measured. A chart is drawn at the
end of each step.

Each step has a time budget (``gpu_plan.BUDGETS``), and ``--minutes`` limits all of them. A case that runs
longer is stopped. The cases that have not begun are recorded as left out, and the same command with the same
DIR goes on there. A missing peer, a function that fails and a case that is too large are recorded and stop
nothing else. The command starts itself anew after an error that breaks the device.

``--dry-run`` needs no GPU: it prints the plan, and floors computed from a card's data sheet. ``--device cpu``
measures small shapes on the CPU, which shows that the command works. Its figures mean nothing.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_plan import (
    BUDGETS,
    CARDS,
    SHAPES,
    SMALL_SHAPES,
    STEPS,
    Shape,
    data_sheet_share,
    dry_run,
    label_of,
)
from harness import OutOfTime, Times, measured, release, time_limit, usable
from peers import importable, reason
from result_files import ResumableFile, Row

ROOT = Path(__file__).parent.parent
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30
SECONDS = 0.4  # measuring time of one function; its rounds are between the two numbers above
SECONDS_OF_A_CASE = 10  # no case begins with less time left
MODEL_STEPS = ("step", "initialise", "run")  # of gpu_runs.py


# --- one run --------------------------------------------------------------------------------------


class Run(ResumableFile):
    """The results in a folder, and the time that is left.

    Args:
        out: The folder. Results of an earlier run there are kept.
        minutes: The time of the command, in minutes.
        device: The device that computes, "cuda" (default) or "cpu".
    """

    def __init__(self, out: str | Path, minutes: float, device: str = "cuda") -> None:
        self.out, self.end, self.device = Path(out), time.monotonic() + 60 * minutes, device
        super().__init__(self.out / "gpu.json", device)
        self.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Return the time that is left, in seconds."""
        return self.end - time.monotonic()

    def chart(self, step: str) -> None:
        """Draw the times of a step over their floors, by shape and name."""
        rows = [row for row in self.rows if row["step"] == step and row.get("times_floor")]
        if not rows or not importable("matplotlib"):
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shapes, names = ([*dict.fromkeys(row[key] for row in rows)] for key in ("shape", "name"))
        figure, axes = pyplot.subplots(figsize=(4 + 1.2 * len(shapes), 4))
        for i, name in enumerate(names):
            found = {row["shape"]: row["times_floor"] for row in rows if row["name"] == name}
            positions = [j + 0.8 * i / len(names) for j, shape in enumerate(shapes) if shape in found]
            axes.bar(positions, [found[s] for s in shapes if s in found], 0.8 / len(names), label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([j + 0.4 for j in range(len(shapes))], shapes, rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_ylabel("time / floor")
        axes.set_title(STEPS[step], fontsize=8)
        axes.legend(fontsize=7)
        figure.savefig(self.out / f"gpu_{step}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)


def base_of(function: Callable[[Times], float | None], times: Times) -> float | None:
    """Return the seconds of a floor or a target, or None if a function that it needs was not measured."""
    try:
        return function(times)
    except KeyError:
        return None


def measure_case(run: Run, step: str, shape: Shape) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a case, and the functions that failed with the reasons."""
    cases: Any
    if step in MODEL_STEPS:
        from gpu_runs import CASES as cases
    else:
        from gpu_cases import CASES as cases

    case = cases[step](run.device, *shape)
    found = measured(
        case.functions,
        run.device,
        runs=FEWEST_ROUNDS,
        most_runs=MOST_ROUNDS,
        budget=SECONDS * len(case.functions),
        prepare=case.prepare,
        repeats=case.repeats,
        timer=case.timer,
        keep_going=True,
    )
    floor, target = (base_of(function, found.seconds) for function in (case.floor, case.target))
    rows = []
    for row in found.rows(case.over, case.rates):
        seconds = found.seconds[row["name"]]
        share = data_sheet_share(row, run.environment["device"])
        rows.append(
            {
                **row,
                "times_floor": None if floor is None else seconds / floor,
                "times_target": None if target is None else seconds / target,
                **({} if share is None else {"data_sheet_share": share}),
                **case.columns.get(row["name"], {}),
            }
        )
    return rows, found.failed


def measure(run: Run, step: str, shape: Shape, seconds: float) -> None:
    """Add the rows of a case to the results, or the reason why it has none.

    Args:
        run: The results.
        step: The name of the step.
        shape: The shape of the case.
        seconds: The time after which the case is stopped, in seconds.
    """
    here = {"step": step, "shape": label_of(shape)}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    stopped: list[Row] = []
    try:
        with time_limit(seconds):
            if step in ("initialise", "run"):
                from gpu_runs import RUNS

                for row in RUNS[step](run.device, *shape):
                    rows.append(row)
            else:
                rows, failed = measure_case(run, step, shape)
    except (Exception, OutOfTime) as error:
        stopped = [{**here, "why": reason(error)}]
    failures = [{**here, "name": name, "why": why} for name, why in failed.items()]
    run.add([{**here, **row} for row in rows], failures + stopped)


# --- build and tests ------------------------------------------------------------------------------


def build(run: Run) -> None:
    """Compile the core in place, for the card found."""
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "LOKU_CUDA": "1", "LOKU_CUDA_ARCHS": f"{major}{minor}"}
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=BUDGETS["build"]
    )
    seconds = time.monotonic() - start
    if result.returncode:
        print((result.stdout + result.stderr)[-3000:])
    run.add([{"step": "build", "name": "setup.py", "status": result.returncode, "seconds": seconds}])


def tests(run: Run) -> None:
    """Run the tests marked ``gpu`` within their budget, and keep their output in DIR/gpu_tests.txt."""
    log = run.out / "gpu_tests.txt"
    limit = min(BUDGETS["tests"], run.left() - 60)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=10", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    status: Any
    with open(log, "w") as file:
        # A file that cannot be imported here (a missing test dependency) must not stop the others.
        command += ["--continue-on-collection-errors", "tests"]
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = "cut off"
    print(log.read_text()[-3000:], flush=True)
    seconds = time.monotonic() - start
    run.add([{"step": "tests", "name": "pytest -m gpu", "status": status, "seconds": seconds}])


def start_anew(run: Run, steps: Sequence[str]) -> None:
    """Replace this process with the same command: a broken device works again in a new process."""
    minutes = f"{run.left() / 60:.3f}"
    command = [
        __file__,
        "--out",
        str(run.out),
        "--minutes",
        minutes,
        "--device",
        run.device,
        "--only",
        *steps,
    ]
    print("the device has failed: starting anew", flush=True)
    os.execv(sys.executable, [sys.executable, *command])


def run_steps(run: Run, steps: Sequence[str], plan: Mapping[str, Sequence[Shape]] = SHAPES) -> None:
    """Run the chosen steps, without the cases that the results have already.

    Args:
        run: The results.
        steps: The names of the steps.
        plan: step -> its shapes. Default: those of a GPU.
    """
    for step, first in (("build", build), ("tests", tests)):
        if step in steps and not run.done(step):
            print(f"{step}: {STEPS[step]}", flush=True)
            try:
                first(run)
            except Exception as error:
                run.add([], [{"step": step, "why": reason(error)}])
    for step, shapes in plan.items():
        if step not in steps:
            continue
        print(f"{step}: {STEPS[step]}", flush=True)
        before, end = len(run.rows), min(run.end, time.monotonic() + BUDGETS[step])
        for shape in shapes:
            if run.done(step, label_of(shape)):
                continue
            left = end - time.monotonic()
            if left < SECONDS_OF_A_CASE:
                run.leave_out(step, label_of(shape))
                continue
            measure(run, step, shape, left)
            release(run.device)
            if not usable(run.device):
                start_anew(run, steps)
        if len(run.rows) > before:
            run.chart(step)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="time of the whole command (default: 9)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="steps (default: all)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: small shapes, as a trial"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and floors; needs no GPU")
    parser.add_argument(
        "--card", choices=CARDS, default="H100 SXM", help="card of --dry-run (default: H100 SXM)"
    )
    options = parser.parse_args(argv)
    if options.dry_run:
        dry_run(options.only, options.card)
        return
    if options.out is None:
        parser.error("--out is needed, or --dry-run")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry-run prints the plan, --device cpu is a trial")

    run = Run(options.out, options.minutes, options.device)
    print(f"{run.environment['device']}, torch {torch.__version__}", flush=True)
    # The cases import the checkout, with the core that is built in place.
    sys.path.insert(0, str(ROOT))
    if options.device == "cpu":  # the build and the tests are a card's
        steps = [step for step in options.only if step in SMALL_SHAPES]
        run_steps(run, steps, SMALL_SHAPES)
    else:
        run_steps(run, options.only)
    print("written:", run.path)


if __name__ == "__main__":
    main()

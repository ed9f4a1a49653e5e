"""Options, time and memory, checks and rows of all benchmarks.

Every benchmark takes

    --device cpu|cuda  --threads N ...  --dtype D ...  --shape S ...  --runs R  --json FILE

and writes rows with ``what`` (usually a shape), ``dtype``, ``threads``, ``name``, the median
``milliseconds`` and their 20th and 80th percentile, the peak extra memory, ``over`` (peer -> how many times
faster than it) and ``times`` (floor -> how many times its time). All figures that a row is compared with come
from the same process and were taken in turn. ``gpu.py`` has rows and options of its own, and measures with
the same functions.

Time on a CPU is wall-clock time. Time on a GPU is the device's own, by CUDA events: the launches of the timed
function queue up behind a short wait, so host time does not count unless it is longer than the wait. Host
time is processor time, by ``processor_seconds_of``.
"""

import argparse
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from peers import reason
from result_files import RESULTS, ResultFile, Row
from torch import Tensor
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAD = 2_000_000  # cycles, about 1 ms, for which the device waits while launches queue up
CALLS = 20  # calls in a row whose processor time is measured; a device's queue has room for their launches

Call = Callable[[], Any]
Timer = Callable[[Call, str], float]  # of a function and a device, to the seconds of one call
Times = Mapping[str, float]  # name -> seconds


# --- time and memory ------------------------------------------------------------------------------


def seconds_of(function: Call, device: str = "cpu") -> float:
    """Return the seconds of one call: wall-clock time on a CPU, device time by events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def processor_seconds_of(function: Call, device: str = "cpu") -> float:
    """Return the processor seconds of one call, the mean of ``CALLS`` calls in a row.

    The time is that of all threads of the process (``time.process_time``), because torch runs a backward on
    CUDA in a thread of its own, which ``time.thread_time`` would miss. The calls have one thread of torch,
    because the threads of its pool spin while they wait. The device may still compute when the time ends.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _wait_for(device)
        start = time.process_time()
        for _ in range(CALLS):
            function()
        return (time.process_time() - start) / CALLS
    finally:
        torch.set_num_threads(threads)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)[field].split()[0]) << 10


def bytes_before_and_peak(function: Call, device: str = "cpu") -> tuple[int, int] | None:
    """Call a function, and return the memory before the call and the peak memory during it, in bytes.

    On CUDA it is the memory of torch's allocator. On Linux it is the resident memory of the process, to about
    1 MiB. On other systems the function is called too, and the result is None.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return before, torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/clear_refs"):
        function()
        return None
    # The C library's pools must be empty: the call would take memory from them unseen.
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _resident("VmRSS")
    function()
    return before, _resident("VmHWM")


def peak_extra_bytes(function: Call, device: str = "cpu") -> int | None:
    """Return the peak memory of one call above the memory before it, in bytes, or None if it is unknown."""
    found = bytes_before_and_peak(function, device)
    return None if found is None else max(0, found[1] - found[0])


def measured_once(name: str, function: Call, device: str = "cpu") -> Row:
    """Call a function that is too long for several rounds, and return its row.

    ``milliseconds`` are wall-clock time until the device has finished. ``peak_bytes`` is the peak memory with
    all that was there before, and ``peak_extra_bytes`` the peak above it.

    Args:
        name: The name in the row.
        function: The function.
        device: The device that computes, "cpu" or "cuda".
    """
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        _wait_for(device)
        start = time.perf_counter()
        function()
        _wait_for(device)
        seconds = time.perf_counter() - start

    memory = bytes_before_and_peak(timed, device)
    return {
        "name": name,
        "milliseconds": seconds * 1e3,
        "peak_extra_bytes": None if memory is None else max(0, memory[1] - memory[0]),
        "peak_bytes": None if memory is None else memory[1],
    }


class OutOfTime(BaseException):
    """The time of ``time_limit`` is over. It is no ``Exception``, so that no failed function swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context in which ``OutOfTime`` is raised after some seconds, between two steps of the interpreter.

    Args:
        seconds: The time in seconds, of the wall clock.
    """

    def ring(signal_number: int, frame: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def usable(device: str) -> bool:
    """Whether the device still computes. A GPU refuses everything after an assertion or a bad address."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def release(device: str) -> None:
    """Free the memory of a finished or failed case."""
    gc.collect()
    if device == "cuda" and usable(device):
        torch.cuda.empty_cache()


class Measured(NamedTuple):
    """The figures of functions that were measured in turn.

    Attributes:
        seconds: name -> median seconds.
        spread: name -> the 20th and the 80th percentile of the seconds.
        peak_bytes: name -> peak extra memory of one call in bytes; empty if memory was not measured.
        failed: name -> the reason why the function has no figures.
    """

    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    peak_bytes: dict[str, int | None]
    failed: dict[str, str]

    def rows(self, over: Iterable[str] = (), rates: Mapping[str, float] | None = None) -> Iterator[Row]:
        """Yield a row for each measured function.

        Args:
            over: The names of the peers that the functions are compared with, if they were measured.
            rates: label -> the amount of work of one call, which is recorded as amount per second.
        """
        over = [peer for peer in over if peer in self.seconds]
        for name, seconds in self.seconds.items():
            yield {
                "name": name,
                "milliseconds": seconds * 1e3,
                "milliseconds_p20": self.spread[name][0] * 1e3,
                "milliseconds_p80": self.spread[name][1] * 1e3,
                **({"peak_extra_bytes": self.peak_bytes[name]} if name in self.peak_bytes else {}),
                **{label: amount / seconds for label, amount in (rates or {}).items()},
                "over": {peer: self.seconds[peer] / seconds for peer in over},
            }


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile."""
    if len(values) == 1:
        return values[0], values[0]
    fifths = quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def measured(
    functions: Mapping[str, Call],
    device: str = "cpu",
    *,
    runs: int = 7,
    most_runs: int | None = None,
    budget: float = 0.0,
    prepare: Call | None = None,
    repeats: Mapping[str, float] | None = None,
    timer: Timer = seconds_of,
    memory: bool = True,
    keep_going: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Measured:
    """Measure functions in turn, so that the drift of the machine is the same for all.

    Each function is called once to warm up, then once in each round, then once for its memory.

    Args:
        functions: name -> function.
        device: The device that computes, "cpu" or "cuda".
        runs: The number of rounds, or the smallest one if there is a budget.
        most_runs: The largest number of rounds. The default is ``runs``.
        budget: Rounds after ``runs`` begin only within this many seconds.
        prepare: Called, untimed, before each call.
        repeats: name -> the number of calls that do the work of one call of the others, by which its time is
            multiplied.
        timer: Measures one call in a round. The default is the time of the device.
        memory: Whether to measure the peak extra memory.
        keep_going: Whether a function that raises is noted in ``failed`` and costs the others nothing.
        progress: Called with the name before each timed call.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, call: Callable[[Call, str], Any]) -> Any:
        try:
            if prepare is not None:
                prepare()
            return call(functions[name], device)
        except Exception as error:
            if not keep_going:
                raise
            failed[name] = reason(error)
            del times[name]
        release(device)
        return None

    for name in functions:  # warm-up and compilation
        progress(name)
        attempt(name, timer)
    start = time.monotonic()
    for round_ in range(most_runs or runs):
        if round_ >= runs and time.monotonic() - start > budget:
            break
        for name in list(times):
            progress(name)
            seconds = attempt(name, timer)
            if name in times:
                times[name].append(seconds)
    if memory:
        for name in list(times):
            peaks[name] = attempt(name, peak_extra_bytes)
    repeats = repeats or {}
    times = {name: [repeats.get(name, 1) * value for value in values] for name, values in times.items()}
    medians = {name: median(values) for name, values in times.items()}
    spread = {name: _percentiles(values) for name, values in times.items()}
    return Measured(medians, spread, peaks, failed)


# --- correctness ----------------------------------------------------------------------------------


def assert_close_rows(ours: Tensor | None, exact: Tensor | None, name: str, ulps: float = 8) -> None:
    """Assert that each row of a result is within a few roundings of the exact row's largest entry.

    Args:
        ours: The result (N, ...), of any floating dtype.
        exact: The exact result (N, ...), float64.
        name: The name of the result in the error message.
        ulps: The largest error in units of the dtype's machine epsilon (5e-7 at least).
    """
    assert ours is not None and exact is not None, f"{name} is missing"
    ours, exact = (x.detach().reshape(len(x), -1) for x in (ours, exact))
    scale = exact.abs().amax(1, keepdim=True)
    info = torch.finfo(ours.dtype)
    error = ((ours.double() - exact).abs() - info.smallest_normal) / scale.clamp(min=1e-30)
    worst = error.max().item()
    assert worst <= ulps * max(info.eps, 5e-7), f"{name} is off by {worst:.1e} of its row's largest entry"


def assert_close_loss(ours: Tensor, exact: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Assert that a loss is within ``tolerance`` of the exact one: relative, or absolute below 1."""
    value, expected = ours.item(), exact.item()
    assert abs(value - expected) <= tolerance * max(1.0, abs(expected)), (
        f"{name} gives {value}, not {expected}"
    )


# --- options and rows -----------------------------------------------------------------------------


def arguments(
    doc: str | None,
    shapes: Sequence[str],
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    shape_help: str = "sizes, joined by x",
) -> argparse.ArgumentParser:
    """Return the parser of the common options.

    Args:
        doc: The description of the benchmark.
        shapes: The default shapes.
        dtypes: The names of the default dtypes.
        shape_help: The help text of ``--shape``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = torch.get_num_threads()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[every, 1] if every > 1 else [1],
        help="numbers of threads to measure with (default: all cores, then one)",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(dtypes), help=f"default: {' '.join(dtypes)}"
    )
    parser.add_argument("--shape", nargs="+", default=list(shapes), help=shape_help)
    parser.add_argument("--runs", type=int, default=7, help="timed rounds; the median counts (default: 7)")
    parser.add_argument(
        "--json", metavar="FILE", help="result file (default: benchmarks/results/NAME_DEVICE.json)"
    )
    return parser


def sizes(shape: str) -> tuple[int, ...]:
    """Return the sizes of a shape that is written as "2x3"."""
    return tuple(map(int, shape.split("x")))


class Benchmark:
    """One run of a benchmark: iterate over ``cases``, measure with ``compare``, ``add`` other rows.

    Args:
        name: The name of the benchmark's file, without suffix.
        parser: The parser of its options, from ``arguments``.
        argv: The command line. The default is that of this process.
    """

    def __init__(self, name: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        self.options = parser.parse_args(argv)
        self.device, self.runs = self.options.device, self.options.runs
        path = self.options.json or RESULTS / f"{name}_{self.device}.json"
        self.file = ResultFile(path, self.device, " ".join(["python", f"benchmarks/{name}.py", *argv]))
        self._case = ""

    def cases(self, *options: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Yield all combinations of the options, the last changing fastest, as ``itertools.product``."""
        combinations = list(product(*options))
        for number, combination in enumerate(combinations, 1):
            self._case = f"{number}/{len(combinations)}"
            yield combination

    def compare(
        self,
        what: str,
        functions: Mapping[str, Call],
        *,
        dtype: str = "float32",
        over: Iterable[str] = (),
        floors: Mapping[str, Sequence[str]] | None = None,
        prepare: Call | None = None,
        rates: Mapping[str, float] | None = None,
        repeats: Mapping[str, float] | None = None,
        runs: int | None = None,
        timer: Timer = seconds_of,
        memory: bool = True,
        **columns: Any,
    ) -> None:
        """Measure functions beside each other, on each number of threads, and add their rows.

        Args:
            what: The name of the case, usually its shape.
            functions: name -> function.
            dtype: The name of the dtype in the rows.
            over: The names of the peers that the functions are compared with, if they were measured.
            floors: label -> names of functions. The fastest of them is the floor.
            prepare: Called, untimed, before each call.
            rates: label -> the amount of work of one call, which is recorded as amount per second.
            repeats: name -> the number of calls that do the work of one call of the others.
            runs: The number of timed rounds. The default is that of ``--runs``.
            timer: Measures one call in a round. The default is the time of the device.
            memory: Whether to measure the peak extra memory.
            **columns: Further columns of the rows.
        """
        runs = runs or self.runs
        before = torch.get_num_threads()
        try:
            for threads in self.options.threads:
                torch.set_num_threads(threads)
                title = f"[{self._case}] {what} {dtype}, {threads} threads"
                with tqdm(total=len(functions) * (runs + 1), desc=title, leave=False) as bar:

                    def progress(name: str, bar: tqdm = bar) -> None:
                        bar.set_postfix_str(name, refresh=False)
                        bar.update()

                    found = measured(
                        functions,
                        self.device,
                        runs=runs,
                        prepare=prepare,
                        repeats=repeats,
                        timer=timer,
                        memory=memory,
                        progress=progress,
                    )
                base = {
                    label: min(found.seconds[name] for name in names)
                    for label, names in (floors or {}).items()
                }
                case = {"what": what, "dtype": dtype, "threads": threads, **columns}
                self.add(
                    {
                        **case,
                        **row,
                        "times": {label: found.seconds[row["name"]] / floor for label, floor in base.items()},
                    }
                    for row in found.rows(over, rates)
                )
        finally:
            torch.set_num_threads(before)

    def add(self, rows: Iterable[Row]) -> None:
        """Print rows as a table, add them and write the result file."""
        self.file.add(rows)

    def close(self) -> None:
        """Say where the results are."""
        print("\nwritten:", self.file.path)

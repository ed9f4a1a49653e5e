"""What all benchmarks here share: options, timing, memory, tables and result files.

Every benchmark takes

    --device cpu|cuda  --threads N ...  --dtype D ...  --shape S ...  --runs R  --json FILE

and writes rows of one kind: what was measured (usually a shape), dtype, threads, name, the median
milliseconds, the peak extra memory, ``over`` (how many times faster than a peer) and ``times`` (how many
times the time of a floor). The figures of one row and those that it is compared with are of one process and
were taken in turn.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = [
    "torch", "triton", "transformers", "peft", "cut-cross-entropy", "liger-kernel", "quack-kernels",
    "torchmetrics", "scikit-learn", "scipy",
]  # fmt: skip


# --- time and memory ------------------------------------------------------------------------------


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_times(functions, device="cpu", runs=7, prepare=None, progress=lambda name: None):
    """Median seconds of each function, of ``runs`` rounds in turn: the machine's drift hits all alike.

    functions: name -> callable. prepare: called, untimed, before each call. progress: called with the name.
    """
    times = {name: [] for name in functions}
    for round_ in range(runs + 1):  # the first is warm-up
        for name, function in functions.items():
            progress(name)
            if prepare is not None:
                prepare()
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def _resident(field):
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)[field].split()[0]) << 10


def peak_extra_bytes(function, device="cpu"):
    """Peak memory of one call above what was held before it; None where the system does not tell.

    On CUDA what torch's allocator handed out; on Linux what the process had in memory, to 1 MiB or so.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    # Nothing may be left in the C library's pools that could be had for free.
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # begin the peak anew
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


# --- peers ----------------------------------------------------------------------------------------


@cache
def importable(module):
    """Whether a peer can be measured; says so, once, where it cannot."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"skipped: {module} is not installed (pip install '.[bench]')", flush=True)
    return found


def official_ihl(logits, labels):
    """IHL as the authors' code computes it: softmax, a one-hot mask, a boolean gather."""
    p = torch.softmax(logits, dim=-1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    p_target = p[one_hot]
    p_runner_up = p.masked_fill(one_hot, -torch.inf).max(dim=-1).values
    return (1 + p_target - p_runner_up).mean()


def lean_ihl(logits, labels):
    """IHL in plain torch with as few (N, V) tensors as it takes."""
    p = torch.softmax(logits, dim=-1)
    index = labels[:, None]
    p_target = p.gather(1, index)[:, 0]
    p_runner_up = p.scatter(1, index, -torch.inf).amax(-1)
    return (1 + p_target - p_runner_up).mean()


def gpt_neo_125m():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    attention = [[["global", "local"], 6]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(num_layers=12, hidden_size=768, num_heads=12, attention_types=attention)
    )


# --- correctness ----------------------------------------------------------------------------------


def assert_close_rows(ours, exact, what, ulps=8):
    """``ours`` (N, ...) is within a few roundings of the row's largest entry of ``exact``, in float64."""
    ours, exact = (x.detach().reshape(len(x), -1) for x in (ours, exact))
    scale = exact.abs().amax(1, keepdim=True)
    info = torch.finfo(ours.dtype)
    error = ((ours.double() - exact).abs() - info.smallest_normal) / scale.clamp(min=1e-30)
    worst = error.max().item()
    assert worst <= ulps * max(info.eps, 5e-7), f"{what} is off by {worst:.1e} of its row's largest entry"


def assert_close_loss(ours, exact, what, tolerance=1e-5):
    ours, exact = ours.item(), exact.item()
    assert abs(ours - exact) <= tolerance * max(1.0, abs(exact)), f"{what} gives {ours}, not {exact}"


# --- options, rows, files -------------------------------------------------------------------------


def arguments(doc, shapes, dtypes=("float32", "bfloat16"), shape_help="sizes, joined by x"):
    """The parser of the common options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = torch.get_num_threads()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[every, 1] if every > 1 else [1])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(dtypes))
    parser.add_argument("--shape", nargs="+", default=list(shapes), help=shape_help)
    parser.add_argument("--runs", type=int, default=7, help="timed rounds, of which the median is taken")
    parser.add_argument("--json", metavar="FILE", help="result file (default: results/NAME_DEVICE.json)")
    return parser


def sizes(shape):
    return tuple(map(int, shape.split("x")))


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit():
    root = Path(__file__).parents[1]

    def git(*command):
        return subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "loku_kernels", "loku", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions():
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            pass


def environment(device="cpu", command=None):
    """Where and on what a result was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "commit": _commit(),
        "command": command or " ".join(["python", *sys.argv]),
    }


def write_result(name, rows, device="cpu", path=None, command=None):
    """Write rows and environment to ``path`` or ``benchmarks/results/<name>.json``; returns the path."""
    path = Path(path) if path else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(device, command), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


class Benchmark:
    """One run of a benchmark: ``cases`` to go through, ``compare`` to measure, ``add`` for other rows.

    The result file is written anew after each comparison, so a run that is cut off keeps what it has.
    """

    def __init__(self, name, parser, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        self.name, self.options = name, parser.parse_args(argv)
        self.device, self.runs = self.options.device, self.options.runs
        self.command = " ".join(["python", f"benchmarks/{name}.py", *argv])
        self.rows, self._case = [], ""

    def cases(self, *options):
        """All combinations, the last changing fastest, as ``itertools.product``."""
        combinations = list(product(*options))
        for number, combination in enumerate(combinations, 1):
            self._case = f"{number}/{len(combinations)}"
            yield combination

    def compare(
        self, what, functions, *, dtype="float32", over=(), floors=None, prepare=None, rates=None,
        repeats=None, runs=None, memory=True, **columns,
    ):  # fmt: skip
        """Measure functions beside each other, on each number of threads; print and keep their rows.

        Args:
            functions: name -> callable.
            over: names of the peers with which the others are compared, where they were measured.
            floors: label -> names; the fastest of these is the floor.
            prepare: called, untimed, before each call.
            rates: label -> amount, kept as label: amount a second.
            repeats: name -> how many of its calls do the work of one call of the others.
            memory: False where it is of no interest.
            columns: what else belongs in the rows.
        """
        floors, rates, repeats = floors or {}, rates or {}, repeats or {}
        over = [name for name in over if name in functions]
        before = torch.get_num_threads()
        try:
            for threads in self.options.threads:
                torch.set_num_threads(threads)
                case = {"what": what, "dtype": dtype, "threads": threads, **columns}
                runs = runs or self.runs
                title = f"[{self._case}] {what} {dtype}, {threads} threads"
                with tqdm(total=len(functions) * (runs + 1), desc=title, leave=False) as bar:

                    def progress(name, bar=bar):
                        bar.set_postfix_str(name, refresh=False)
                        bar.update()

                    times = interleaved_times(functions, self.device, runs, prepare, progress)
                times = {name: seconds * repeats.get(name, 1) for name, seconds in times.items()}
                peaks = self._peaks(functions, prepare) if memory else {}
                base = {label: min(times[name] for name in names) for label, names in floors.items()}
                self.add(
                    {
                        **case,
                        "name": name,
                        "milliseconds": seconds * 1e3,
                        **({"peak_extra_bytes": peaks[name]} if memory else {}),
                        **{label: amount / seconds for label, amount in rates.items()},
                        "over": {peer: times[peer] / seconds for peer in over},
                        "times": {label: seconds / floor for label, floor in base.items()},
                    }
                    for name, seconds in times.items()
                )
        finally:
            torch.set_num_threads(before)

    def _peaks(self, functions, prepare):
        peaks = {}
        for name, function in functions.items():
            if prepare is not None:
                prepare()
            peaks[name] = peak_extra_bytes(function, self.device)
        return peaks

    def add(self, rows):
        rows = list(rows)
        self.rows += rows
        print_table(rows)
        self.path = write_result(
            f"{self.name}_{self.device}", self.rows, self.device, self.options.json, self.command
        )

    def close(self):
        print("\nwritten:", self.path)


def mebibytes(size):
    return "?" if size is None else f"{size / 2**20:.0f}"


def _cells(row):
    """heading -> text of what is measured in a row."""
    for key, value in row.items():
        if key in ("over", "times"):
            for label, ratio in value.items():
                yield f"{key} {label}", f"{ratio:.2f}"
        elif key == "milliseconds":
            yield "ms", f"{value:.2f}"
        elif key == "peak_extra_bytes":
            yield "extra MiB", mebibytes(value)
        elif isinstance(value, float):
            yield key.replace("_", " "), f"{value:.3g}"


def print_table(rows):
    """The rows of one case: what they share as the title, then a line for each name."""
    first = rows[0]
    shared = [key for key in first if key != "name" and not isinstance(first[key], (float, dict, type(None)))]
    shared = [key for key in shared if key != "peak_extra_bytes"]
    print(
        "\n"
        + ", ".join(f"{key} {first[key]}" if isinstance(first[key], int) else first[key] for key in shared)
    )
    table = [{heading.rjust(9): text for heading, text in _cells(row)} for row in rows]
    width = 2 + max(len(row["name"]) for row in rows)
    print(" " * (width + 2) + "  ".join(table[0]))
    for row, cells in zip(rows, table, strict=True):
        values = "  ".join(cells[heading].rjust(len(heading)) for heading in table[0])
        print(f"  {row['name']:{width}}{values}", flush=True)

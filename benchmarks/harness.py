"""Timing, memory and result files, for all benchmarks here."""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_times(functions, device="cpu", runs=7, prepare=None):
    """Median seconds of each function, of ``runs`` rounds in turn: the machine's drift hits all alike.

    functions: name -> callable. prepare: called, untimed, before each call.
    """
    times = {name: [] for name in functions}
    for round_ in range(runs + 1):  # the first is warm-up
        for name, function in functions.items():
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


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit():
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "csrc", "loku_kernels", "loku"],
            cwd=here.parent,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.stdout.strip() else "")


def environment(device="cpu"):
    """Where and on what a result was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def write_result(name, rows, device="cpu", path=None):
    """Write rows and environment to ``path`` or ``benchmarks/results/<name>.json``; returns the path."""
    path = Path(path) if path else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    return path

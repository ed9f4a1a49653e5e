"""Peak memory of this process: resident bytes, and those of its accelerator."""

import resource
import sys
from pathlib import Path

import torch


def forget_peak_memory():
    """Begin the peak anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # elsewhere the peak is that of the process so far
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """Resident bytes at their peak since ``forget_peak_memory``, or since the start of the process."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def peak_device_memory():
    """Bytes of tensors on the current CUDA device at their peak since ``forget_peak_memory``; None without
    one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

"""Peak memory of this process: its resident bytes and the bytes of its tensors on the accelerator."""

import resource
import sys
from pathlib import Path

import torch


def forget_peak_memory() -> None:
    """Begin both peaks anew, the resident one on Linux alone."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # elsewhere the resident peak counts from the start of the process
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return the peak of resident memory, in bytes.

    The peak counts from the last ``forget_peak_memory``, or from the start of the process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def peak_device_memory() -> int | None:
    """Return the peak of tensors on the current CUDA device, in bytes; None without a CUDA device.

    The peak counts from the last ``forget_peak_memory``, or from the start of the process.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

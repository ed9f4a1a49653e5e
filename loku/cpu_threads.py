"""The threads of the CPU: how they wait, and a warning where they wait for a busy core.

Between two operations the threads of OpenMP spin by default. If another process takes a core, each operation
waits until the system has run that process for a while. A small model then runs many times slower.
"""

from __future__ import annotations

import os
import time
import warnings

_REGION = 1 << 17  # elements: enough for several threads, and about 0.05 ms of work
_REGIONS = 30
_SLOW = 1e-3  # seconds of an operation, 20 times what it takes on free cores


def wait_passively() -> None:
    """Let waiting threads sleep, unless the user chose otherwise. It must come before the import of torch."""
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def seconds_of_an_operation() -> float:
    """Measure the mean time of a small operation on all threads, in seconds; 0 with one thread."""
    import torch  # not before ``wait_passively``

    if torch.get_num_threads() == 1:
        return 0.0
    values = torch.zeros(_REGION, dtype=torch.float32)
    values.add_(1)
    begin = time.perf_counter()
    for _ in range(_REGIONS):
        values.add_(1)
    return (time.perf_counter() - begin) / _REGIONS


def warn_of_busy_cores() -> None:
    """Warn if the threads wait for busy cores, and say what to set."""
    import torch

    seconds = seconds_of_an_operation()
    if seconds > _SLOW:
        passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        setting = "OMP_NUM_THREADS=1" if passive else "OMP_WAIT_POLICY=passive, or OMP_NUM_THREADS=1,"
        warnings.warn(
            f"other processes keep the cores busy: a small operation on {torch.get_num_threads()} threads "
            f"takes {1e3 * seconds:.1f} ms, where 0.05 ms is usual. Set {setting} in the environment before "
            "Python starts",
            stacklevel=3,
        )

"""The peak memory of this process, from /proc."""

import ctypes
import gc
import sys

import pytest

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class PeakMemory:
    """The peak of the resident memory, in bytes, above the memory at the start of the measurement."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # a pool that is counted already would hide the next allocation
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        self.before = self._status("VmRSS")

    def extra(self):
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(field):
        with open("/proc/self/status") as file:
            return int(dict(line.split(":", 1) for line in file)[field].split()[0]) << 10

"""Peak memory of this process."""

import ctypes
import gc
import sys

import pytest

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class PeakMemory:
    """Peak memory of this process above what it holds now, in bytes; read from /proc."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what is used next may come from a pool that is counted already
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        self.before = self._status("VmRSS")

    def extra(self):
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(field):
        with open("/proc/self/status") as file:
            return int(dict(line.split(":", 1) for line in file)[field].split()[0]) << 10

"""Inputs that random logits never give, and the yardstick for a kernel's error."""

import ctypes
import gc
import sys

import pytest
import torch

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100


def planted_logits(n, v, dtype, seed=0):
    """logits (n, v) and labels (n,): each row is one of the cases below, in turn.

    Random logits make every probability about 1/V, and then any answer passes.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 3
    labels = torch.randint(0, v, (n,), generator=generator)
    for i in range(n):
        row, t = logits[i], int(labels[i])
        other = (t + 1 + int(torch.randint(0, v - 1, (), generator=generator))) % v  # not t
        match i % 12:
            case 0:  # memorised: p_t = 1 - 1e-6 or so
                row[t] = row.logsumexp(0) + 13.8
            case 1:  # a confident runner-up
                row[other] = row.logsumexp(0) + 8
            case 2:  # all equal: the lowest index is runner-up
                row.fill_(1.5)
            case 3:  # a tie of target and runner-up
                row[t] = row[other] = row.max() + 1
            case 4:  # masked words, target and one other kept
                row[torch.rand(v, generator=generator) < 0.7] = -torch.inf
                row[t], row[other] = 0.5, 0.25
            case 5:  # everything but the target masked
                row.fill_(-torch.inf)
                row[t] = 1.0
            case 6:  # the target masked
                row[t] = -torch.inf
            case 7:  # a large offset
                row += 1000.0 if dtype != torch.float16 else 100.0
            case 8:  # ascending: a new runner-up all the time
                row.copy_(row.sort().values)
            case 9:  # extreme spread: exp underflows for all but one
                row.mul_(100.0)
            case 10:
                labels[i] = IGNORE
            case _:
                pass
    return logits.to(dtype), labels


def ulp(dtype):
    return torch.finfo(dtype).eps


def assert_as_good_as_eager(ours, eager, reference, dtype=None, ulps=4):
    """At most twice the error of eager torch in the same dtype, plus a few ulps of the row's largest entry.

    ours, eager: (N, ...); reference: the same in float64; dtype: of the ulp, if it is not that of ``ours``.
    """
    assert ours.dtype == eager.dtype and reference.dtype == torch.float64
    dtype = dtype or ours.dtype
    assert torch.isfinite(ours).all()
    error, allowed = ours.double() - reference, eager.double() - reference
    scale = reference.abs().flatten(1).amax(1) if reference.dim() > 1 else reference.abs()
    error, allowed = (x.abs().flatten(1).amax(1) if x.dim() > 1 else x.abs() for x in (error, allowed))
    # The oracle subtracts probabilities, so it is itself off by a few ulps of 1 in float64.
    oracle = 8 * ulp(torch.float64) + torch.finfo(ours.dtype).smallest_normal
    bound = 2 * allowed.nan_to_num(0.0) + ulps * ulp(dtype) * scale + oracle
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f} of what is allowed, at row {(error / bound).argmax().item()}"


def lean_eager_ihl(logits, labels):
    """IHL (N,) in plain torch, as one would write it with care but without a kernel."""
    p = logits.softmax(-1)
    index = labels[:, None]
    return 1 + p.gather(1, index)[:, 0] - p.scatter(1, index, -torch.inf).amax(1)


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

"""The compiled core as a Python module: how its functions read their arguments, what they raise, and that one
binary serves every Python. What they compute is tested through ``loku_kernels``."""

import sysconfig
import threading
import time

import pytest
import torch
from fresh_process import run_python

import loku_kernels  # noqa: F401  before its core

core = pytest.importorskip("loku_kernels._core")

LABELS = torch.tensor([1, 0, 2])
ADDRESS = LABELS.data_ptr()
ROWS = (0, 0, 9, 0, 9, 0)  # none


def test_arguments_that_fit():
    assert core.number_counted(ADDRESS, 3, -100) == 3
    assert core.number_counted(ADDRESS, 3, 2) == 2
    assert core.number_counted(ADDRESS, 0, 0) == 0
    assert core.scale_rows_(ROWS, 1.0, 0, 1) is None
    core.triplet_columns_(ROWS, 0, 0, 0, 30, True, 0, 0, 0, 0, 0, 1)  # an int for a float


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("number_counted", (), "too few arguments"),
        ("number_counted", (ADDRESS, 3), "too few arguments"),
        ("number_counted", (ADDRESS, 3, -100, 1), "too many arguments"),
        ("number_counted", (-1, 3, -100), "out of range"),
        ("number_counted", (2**64, 3, -100), "out of range"),
        ("number_counted", (ADDRESS, 2**63, -100), "out of range"),
        ("number_counted", (ADDRESS, -(2**63) - 1, -100), "out of range"),
        ("number_counted", (float(ADDRESS), 3, -100), "int"),
        ("number_counted", (ADDRESS, 3.0, -100), "int"),
        ("number_counted", (LABELS, 3, -100), "int"),
        ("scale_rows_", (None, 1.0, 0, 1), "tuple"),
        ("scale_rows_", (list(ROWS), 1.0, 0, 1), "tuple"),
        ("scale_rows_", (ROWS[:-1], 1.0, 0, 1), "too few arguments"),
        ("scale_rows_", ((*ROWS, 0), 1.0, 0, 1), "too many arguments"),
        ("scale_rows_", (ROWS, 1.0, 0, 2**31), "out of range"),
        ("scale_rows_", ((*ROWS[:-1], 2**31), 1.0, 0, 1), "out of range"),
        ("triplet_columns_", (ROWS, 0, 0, 0, 30.0, 1, 0, 0, 0, 0, 0, 1), "bool"),
        ("triplet_columns_", (ROWS, 0, 0, 0, "30", True, 0, 0, 0, 0, 0, 1), "real number"),
        ("triplet_columns_", (ROWS, 0, 0, 0, 10**400, True, 0, 0, 0, 0, 0, 1), "out of range"),
    ],
)
def test_arguments_that_do_not_fit(name, arguments, message):
    with pytest.raises(TypeError, match=message):
        getattr(core, name)(*arguments)


def test_keywords_are_refused():
    with pytest.raises(TypeError, match="keyword"):
        core.number_counted(ADDRESS, 3, ignore_index=-100)


# Too much for the system, for a vector, and for 64 bits.
@pytest.mark.parametrize("tokens", [2**50, 2**57, 2**60, 2**62])
def test_out_of_memory_is_an_exception(tokens):
    features, total = (0, 1, 1, 1), torch.zeros(1)
    with pytest.raises(MemoryError):
        core.accumulate_squared_grad_(
            1, tokens, 0, features, features, (total.data_ptr(), 1), (total.data_ptr(), 1), 1
        )


def test_a_label_for_each_row():
    rows, out = (0, 0, 9, 3, 9, 0), torch.empty(12, dtype=torch.float64).data_ptr()
    with pytest.raises(ValueError, match="got 2 labels of 3 rows"):
        core.triplet_forward(rows, ADDRESS, 2, -100, 0.0, out, out, 1)
    with pytest.raises(ValueError, match="got 2 labels of 3 rows"):
        core.triplet_backward(rows, 0, ADDRESS, 2, -100, out, out, out, 1.0, 0, 0.0, rows, 1)


def test_other_python_threads_run_meanwhile():
    count, vocab = 200_000, 2000
    logits, labels = torch.randn(vocab), torch.zeros(count, dtype=torch.int64)
    offsets = torch.zeros(count, dtype=torch.int64)  # the same row again and again
    triplet, runner_up_id = torch.empty(count, 3, dtype=torch.float64), torch.empty(count, dtype=torch.int64)
    rows = (logits.data_ptr(), offsets.data_ptr(), 0, count, vocab, 0)
    ends = []

    def work():
        ends.append(time.monotonic())
        core.triplet_forward(
            rows, labels.data_ptr(), count, -100, 0.0, triplet.data_ptr(), runner_up_id.data_ptr(), 1
        )
        ends.append(time.monotonic())

    worker = threading.Thread(target=work)
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.monotonic())
        time.sleep(1e-3)
    assert sum(ends[0] < tick < ends[1] for tick in ticks) >= 5


def test_a_daemon_thread_may_outlive_the_interpreter():
    """The call ends while CPython takes the modules apart, and CPython ends the thread."""
    code = """if True:
        import ctypes, threading, time, torch
        import loku_kernels
        from loku_kernels import _core

        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(1.5)

        slow = Slow()
        count, row = 200_000, torch.randn(2000)
        zeros, out = torch.zeros(count, dtype=torch.int64), torch.empty(count, 4, dtype=torch.float64)
        for tensor in (row, zeros, out):  # never freed
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))
        rows = (row.data_ptr(), zeros.data_ptr(), 0, count, len(row), 0)
        out_id = out.data_ptr() + count * 3 * 8
        arguments = rows, zeros.data_ptr(), count, -100, 0.0, out.data_ptr(), out_id, 1
        threading.Thread(target=_core.triplet_forward, args=arguments, daemon=True).start()
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_one_binary_serves_every_python():
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("no stable ABI for free-threaded Python")
    assert core.__file__.endswith(".abi3.so")

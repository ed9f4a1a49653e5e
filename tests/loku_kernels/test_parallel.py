"""The threads of the compiled core: little memory, labels that change during a call, and races.

What may end the process runs in a process of its own.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from fresh_process import run_python

from loku_kernels.backends import native

pytestmark = pytest.mark.skipif(native._core is None, reason="no compiled core")

SOURCES = Path(__file__).parent / "parallel"
CSRC = Path(__file__).parents[2] / "csrc"


def output_of(code, **environment):
    """Run code with two threads and return what it printed."""
    # Waiting threads sleep, so that a busy machine runs the others.
    result = run_python(code, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive", **environment)
    assert result.returncode == 0, (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
    return result.stdout


def test_little_memory_is_an_exception():
    """With address space for none, some or all of a call's memory, the call writes nothing or is right.

    The threads run already, because OpenMP ends a process in which it cannot start them.
    """
    code = """if True:
        import resource, torch
        from core_calls import calls, copies, same

        def address_space():
            return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

        assert torch.get_num_threads() == 2
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        for rows, vocab, dtype in [(4, 300_000, torch.bfloat16), (100_000, 2, torch.float32)]:
            for call in calls(rows, vocab, dtype, tokens=4000):
                before = copies(call.operands)
                expected = copies(call.results())
                errors, failures = 0, 0  # the core's, and all
                for step in range(12):
                    for operand, copy in zip(call.operands, before, strict=True):
                        operand.copy_(copy)
                    resource.setrlimit(resource.RLIMIT_AS, (address_space() + step * 2**20, hard))
                    try:
                        results = call.results()
                    except (MemoryError, RuntimeError) as error:
                        results = error
                    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
                    if isinstance(results, Exception):
                        failures += 1
                        errors += isinstance(results, MemoryError)
                        text = str(results)
                        assert isinstance(results, MemoryError) or "allocate memory" in text, text
                        assert same(call.operands, before), (call.name, step)
                    else:
                        assert same(results, expected), (call.name, step)
                assert failures < 12, call.name
                print(call.name, errors, flush=True)
    """
    # Large pieces of memory come from the system and go back to it at once.
    output = output_of(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_ARENA_MAX="1")
    names = {name for name, errors in map(str.split, output.splitlines()) if int(errors)}
    assert names >= {"inverted_hinge_", "rest_probabilities_", "triplet_columns_", "token_losses"}, output
    assert names >= {"hidden_gradient", "logits_loss", "accumulate_squared_grad_"}, output


def test_more_tokens_than_memory():
    """A sample whose stride is 0 may have any number of tokens, more than memory or 64 bits can count."""
    code = """if True:
        import torch, loku_kernels
        for exponent in (50, 57, 60, 62):
            tokens, fisher = torch.ones(1, 1, 1).expand(1, 2**exponent, 1), torch.zeros(1, 1)
            try:
                loku_kernels.accumulate_squared_grad_(fisher, tokens, tokens)
            except MemoryError:
                print(exponent, fisher.item())
    """
    assert output_of(code).split() == ["50", "0.0", "57", "0.0", "60", "0.0", "62", "0.0"]


def compiled(folder, source, *flags):
    """Compile a file of ``parallel/`` with g++ and return the path of the result."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    result = folder / source.removesuffix(".cpp")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        *flags,
        SOURCES / source,
        "-o",
        result,
    ]
    subprocess.run(command, check=True)
    return result


def test_an_exception_in_a_thread_arrives_after_all_threads(tmp_path):
    if not (CSRC / "parallel.h").exists():
        pytest.skip("no checkout")
    result = subprocess.run([compiled(tmp_path, "loops.cpp", "-fopenmp")], capture_output=True, text=True)
    assert result.returncode == 0, result
    assert result.stdout == "loops: 0 lost exceptions, 0 calls without scratch, 0 wrong shares\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_fails_at_any_allocation(tmp_path, threads):
    """Each allocation of each kernel fails once. The call writes nothing, and the next one is right."""
    library = compiled(tmp_path, "failing_new.cpp", "-shared", "-fPIC")
    code = f"""if True:
        import ctypes, torch
        from core_calls import calls, copies, same
        from loku_kernels.backends import native

        torch.set_num_threads({threads})
        fail = ctypes.CDLL({str(library)!r}).fail_allocation
        fail.argtypes, fail.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
        places = [line.split()[0] for line in open("/proc/self/maps") if native._core.__file__ in line]
        core = int(places[0].split("-")[0], 16), int(places[-1].split("-")[1], 16)
        for dtype in (torch.float32, torch.float16):
            for call in calls(600, 70, dtype):
                before = copies(call.operands)
                expected = copies(call.results())
                for nth in range(1, 100):
                    for operand, copy in zip(call.operands, before, strict=True):
                        operand.copy_(copy)
                    fail(*core, nth)
                    try:
                        results = call.results()
                    except MemoryError:
                        assert fail(0, 0, 0) <= 0, (call.name, nth)
                        assert same(call.operands, before), (call.name, nth)
                        continue
                    assert fail(0, 0, 0) > 0, (call.name, nth)  # no allocation failed
                    assert same(results, expected), (call.name, nth)
                    break
                print(call.name, nth - 1)
    """
    output = output_of(code, LD_PRELOAD=str(library))
    allocations = {}
    for name, number in map(str.split, output.splitlines()):
        allocations[name] = max(allocations.get(name, 0), int(number))
    none = {name for name, number in allocations.items() if number == 0}
    assert none == {"mean_scale", "scale_rows_", "_add_squares"}, output
    assert allocations["inverted_hinge_loss_"] >= 5, output


# Two labels between which another process goes back and forth.
@pytest.mark.parametrize("labels", [(1, 2**40), (2, -(2**62)), (1, -100), (1, 2)])
def test_labels_that_change_during_a_call(labels):
    """A call raises the error of a bad label, or has the result of one of the two labels."""
    code = f"""if True:
        import mmap, os, signal, torch
        from core_calls import calls, copies, same

        both, rows, row = {labels}, 1000, 999
        memory = mmap.mmap(-1, rows * 8)  # shared with the child
        shared = torch.frombuffer(memory, dtype=torch.int64)
        cases = [call for call in calls(rows, 300, torch.float32, tokens=2) if "labels" in call.arguments]
        shared.copy_(cases[0].arguments["labels"])
        before, allowed = [copies(call.operands) for call in cases], []

        def results(call, operands):  # nothing after the error of a bad label
            for operand, copy in zip(call.operands, operands, strict=True):
                operand.copy_(copy)
            call.arguments["labels"] = shared
            try:
                return copies(call.results())
            except (IndexError, ValueError):
                return []

        for call, operands in zip(cases, before, strict=True):
            allowed.append([])
            for label in both:
                shared[row] = label
                allowed[-1].append(results(call, operands))
        child = os.fork()
        if not child:
            view = memoryview(memory).cast("q")
            parent = os.getppid()
            while os.getppid() == parent:
                for _ in range(10000):
                    view[row] = both[0]
                    view[row] = both[1]
            os._exit(0)
        try:
            for turn in range(12):
                for call, operands, wanted in zip(cases, before, allowed, strict=True):
                    found = results(call, operands)
                    assert any(same(found, want) for want in wanted), call.name
        finally:
            os.kill(child, signal.SIGKILL)
    """
    output_of(code)

"""The two processes in which tests of Triton kernels run, and compilation for GPUs that need not be present.

``TRITON_INTERPRET`` must be set before triton is imported, so the interpreter has a process of its own.
``run_in_the_interpreter`` starts a test file there. In the first process the same tests need a GPU.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter does not round to the nearest bfloat16, and its products in bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
EXAMPLES = 8 if INTERPRETED else 60
TABLE_SCRIPT = Path(__file__).parents[2] / "scripts" / "triton_table.py"

outside = pytest.mark.skipif(INTERPRETED, reason="outside of the interpreter")
gpu_alone = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs in the interpreter and on a GPU."""
    if INTERPRETED:
        return test
    no_gpu = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="no CUDA device")(test))


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Move tensors to a device."""
    return [x.to(device) for x in tensors]


def run_in_the_interpreter(file: str) -> None:
    """Run a test file in the interpreter and assert that its tests pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def triton_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import ``scripts/triton_table.py``, or skip the test outside of a checkout."""
    if not TABLE_SCRIPT.exists():
        pytest.skip("no checkout")
    monkeypatch.syspath_prepend(TABLE_SCRIPT.parent)
    return importlib.import_module("triton_table")


def sources(table: Any, launcher: Callable[..., None], *args: Any) -> list[tuple[Any, ...]]:
    """List the kernel's name, its signature, constants and attributes for each launch of a launcher."""
    launches = table.record(launcher, *args)
    found = [table.source(kernel, arguments) for kernel, arguments, _ in launches]
    return [(source.fn.__name__, source.signature, source.constants, source.attrs) for source in found]

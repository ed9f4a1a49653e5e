"""The backends, and the one decision which of them computes an operation on a tensor.

A backend is a module with the functions of the protocol ``Backend``. ``reference`` has their full docstrings,
because its functions serve every device and dtype.

Logits (..., V) have a contiguous last dimension. A block of logits (..., C) holds the columns
[first_column, first_column + C). With a softcap, an entry is u = tanh(z / softcap) and stands for the logit
y = softcap * u. So neither y nor the slope dy/dz = 1 - u^2 is rounded to the dtype of the logits. A softcap
of 0 means none, and an entry is a logit.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from loku_kernels.backends import native, reference
from loku_kernels.backends.online_state import OnlineState


class Backend(Protocol):
    """The functions of every backend, with one signature in all of them."""

    def triplet_forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Compute the triplet and the runner-up's index of logits."""

    def triplet_backward(
        self,
        grad_triplet: Tensor,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        triplet: Tensor,
        runner_up_id: Tensor,
        *,
        first_column: int = 0,
        softcap: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits from that of the triplet."""

    def inverted_hinge_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the logits with a multiple of the gradient of IHL, and return triplet and index."""

    def triplet_columns_(
        self,
        logits: Tensor,
        labels: Tensor,
        state: OnlineState,
        *,
        first_column: int,
        softcap: float,
        out: Tensor | None = None,
    ) -> None:
        """Take a block of columns into the state."""

    def scale_rows_(self, logits: Tensor, factor: Tensor) -> None:
        """Multiply the rows of the logits, in place."""

    def accumulate_squared_grad_(
        self, fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
    ) -> None:
        """Add squared per-sample gradients to ``fisher``, in place."""


OPERATIONS = (
    "triplet_forward",
    "triplet_backward",
    "inverted_hinge_",
    "triplet_columns_",
    "scale_rows_",
    "accumulate_squared_grad_",
)

# (operation, dtype, V, compute capability) -> (backend, the committed result that shows it to be the faster
# one). The entry with the nearest V counts for another V. The table is empty, although one H200 has been
# measured: there the compiled core takes 0.50 ms for triplet_forward of 8192 x 128256 bfloat16 logits, and
# Triton 0.88 ms (benchmarks/results/gpu_h200.json).
MEASURED_ON_CUDA: dict[tuple[str, torch.dtype, int, tuple[int, int]], tuple[str, str]] = {}


def choose(operation: str, *tensors: Tensor) -> Backend:
    """Choose the backend of an operation on some tensors.

    The compiled core serves the CPU. Triton serves CUDA, unless ``MEASURED_ON_CUDA`` names the compiled core.
    Plain torch serves every other device or dtype. ``LOKU_BACKEND=reference|native|triton`` forces a backend.
    Plain torch then still serves the tensors that the forced backend cannot.

    Args:
        operation: One of ``OPERATIONS``.
        tensors: The tensors whose device and dtypes decide. The first one holds the logits (..., V), or the
            inputs (n, T, k) of ``accumulate_squared_grad_``.

    Returns:
        The module ``reference``, ``native`` or ``triton``.

    Raises:
        ValueError: ``LOKU_BACKEND`` names no backend.
        RuntimeError: ``LOKU_BACKEND`` names a backend that is not installed.
    """
    forced = os.environ.get("LOKU_BACKEND", "")
    if forced not in ("", "reference", "native", "triton"):
        raise ValueError(f"LOKU_BACKEND must be reference, native or triton, not {forced!r}")
    if forced == "triton":
        _check_triton(tensors[0])
    if forced == "native" and native._core is None:
        raise RuntimeError("LOKU_BACKEND=native, but loku_kernels was installed without its compiled core")
    for name in [forced] if forced else _by_preference(operation, tensors[0]):
        if name == "native" and all(map(native.serves, tensors)):
            return native
        if name == "triton" and (triton := _triton()) is not None and all(map(triton.serves, tensors)):
            return triton
    return reference


@functools.cache
def _triton() -> ModuleType | None:
    """Import the Triton kernels at their first use. Return None without the package triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from loku_kernels.backends import triton

    return triton


def _check_triton(tensor: Tensor) -> None:
    """Raise ``RuntimeError`` if Triton is forced and cannot run on the tensor's device."""
    triton = _triton()
    if triton is None:
        raise RuntimeError("LOKU_BACKEND=triton, but triton is not installed")
    if tensor.device.type == "cpu" and not triton.INTERPRETED:
        raise RuntimeError(
            "LOKU_BACKEND=triton, but the tensor is on the CPU, where Triton kernels run in Triton's "
            "interpreter only: set TRITON_INTERPRET=1 before the first use of triton"
        )


def _by_preference(operation: str, tensor: Tensor) -> list[str]:
    """List the backends to try before ``reference``, the best one first."""
    if tensor.device.type != "cuda":
        return ["native"]
    if MEASURED_ON_CUDA:
        capability, vocab = torch.cuda.get_device_capability(tensor.device), tensor.shape[-1]
        wanted = (operation, tensor.dtype, capability)
        measured = [key for key in MEASURED_ON_CUDA if (*key[:2], key[3]) == wanted]
        if measured:
            nearest = min(measured, key=lambda key: max(key[2], vocab) / min(key[2], vocab))
            if MEASURED_ON_CUDA[nearest][0] == "native":
                return ["native", "triton"]  # the core may lack CUDA, or the driver be too old for it
    return ["triton"]

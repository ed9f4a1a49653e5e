"""The backends, and the one decision which of them computes an operation on a tensor.

A backend is a module with the functions of ``OPERATIONS``, with one signature in all of them:

- ``triplet_forward(logits, labels, ignore_index)`` returns triplet and runner_up_id.
- ``triplet_backward(grad_triplet, logits, labels, ignore_index, triplet, runner_up_id, *, first_column,
  softcap, out)`` returns the gradient of the logits.
- ``inverted_hinge_(logits, labels, ignore_index, scale)`` overwrites the logits with a multiple of the
  gradient of IHL and returns triplet and runner_up_id.
- ``triplet_columns_(logits, labels, state, *, first_column, softcap, out)`` takes a block of columns into an
  ``OnlineState``.
- ``scale_rows_(logits, factor)`` multiplies the rows of the logits.
- ``accumulate_squared_grad_(fisher, inputs, grad_outputs, divisor)`` adds squared per-sample gradients.

``reference`` has the docstrings of all of them: its functions serve every device and dtype. Logits (..., V)
have a contiguous last dimension, or are the columns [first_column, first_column + C) of it. With a softcap,
an entry is u = tanh(z / softcap) and stands for the logit y = softcap * u. So neither y nor the slope dy/dz =
1 - u^2 is rounded to the dtype of the logits. A softcap of 0 means none: an entry is a logit.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from loku_kernels.backends import native, reference

OPERATIONS = (
    "triplet_forward",
    "triplet_backward",
    "inverted_hinge_",
    "triplet_columns_",
    "scale_rows_",
    "accumulate_squared_grad_",
)

# (operation, dtype, V, compute capability) -> (backend, the committed result that shows it to be the faster
# one). The entry with the nearest V counts for another V. Nothing has been entered yet.
MEASURED_ON_CUDA: dict[tuple[str, torch.dtype, int, tuple[int, int]], tuple[str, str]] = {}


def choose(operation: str, *tensors: Tensor) -> ModuleType:
    """Choose the backend of an operation on some tensors.

    On the CPU it is the compiled core. On CUDA it is Triton, or the compiled core where a measurement says
    so. For every other device or dtype it is plain torch. ``LOKU_BACKEND=reference|native|triton`` forces
    one, and plain torch still computes what that one cannot.

    Args:
        operation: One of ``OPERATIONS``.
        tensors: The tensors whose device and dtypes decide; the first is the logits (..., V), or the inputs
            (n, T, k) of ``accumulate_squared_grad_``.

    Returns:
        The module ``reference``, ``native`` or ``triton``.

    Raises:
        ValueError: ``LOKU_BACKEND`` names no backend.
        RuntimeError: ``LOKU_BACKEND`` names a backend that is not there.
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
    """The Triton kernels, imported where they are first needed; None without the package triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from loku_kernels.backends import triton

    return triton


def _check_triton(tensor: Tensor) -> None:
    triton = _triton()
    if triton is None:
        raise RuntimeError("LOKU_BACKEND=triton, but triton is not installed")
    if tensor.device.type == "cpu" and not triton.INTERPRETED:
        raise RuntimeError(
            "LOKU_BACKEND=triton, but the tensor is on the CPU, where Triton kernels run in Triton's "
            "interpreter only: set TRITON_INTERPRET=1 before the first use of triton"
        )


def _by_preference(operation: str, tensor: Tensor) -> list[str]:
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

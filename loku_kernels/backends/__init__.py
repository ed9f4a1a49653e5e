"""The backends, and the one decision which of them computes an operation on a tensor.

A backend is a module with functions of the protocol ``Backend``. ``reference`` has all of them with their
full docstrings, because it serves every device and dtype. ``native`` is the compiled core on the CPU. It
lacks ``divergence_``, whose time there is that of the products. ``triton`` serves CUDA and lacks
``triplet_columns_``, because only the CPU cuts rows into blocks of columns. ``cuda`` is the compiled row
kernel and has the two operations that overwrite whole rows.

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

from loku_kernels.backends import cuda, native, reference
from loku_kernels.backends.online_state import OnlineState
from loku_kernels.checks import Reduction, TokenLoss


class Backend(Protocol):
    """The functions of the backends, with one signature in all of them."""

    def triplet_forward(
        self, logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
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
        factor: Tensor | None = None,
        first_column: int = 0,
        softcap: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits from that of the triplet."""

    def inverted_hinge_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the logits with a multiple of the gradient of IHL, and return triplet and index."""

    def rest_probabilities_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, *, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the logits with the softmax of the rest, and return triplet and index."""

    def triplet_columns_(
        self,
        logits: Tensor,
        labels: Tensor,
        state: OnlineState,
        *,
        first_column: int,
        softcap: float,
        store: bool,
    ) -> None:
        """Take a block of columns into the state."""

    def scale_rows_(self, logits: Tensor, factor: Tensor) -> None:
        """Multiply the rows of the logits, in place."""

    def mean_scale(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Compute 1 over the number of labels that count."""

    def token_losses(
        self,
        loss: TokenLoss,
        triplet: Tensor,
        labels: Tensor,
        ignore_index: int,
        reduction: Reduction,
        dtype: torch.dtype,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the reduced loss of triplets, and its gradient in them."""

    def hidden_gradient(
        self,
        grad_triplet: Tensor,
        factor: Tensor | None,
        weight: Tensor,
        labels: Tensor,
        triplet: Tensor,
        runner_up_id: Tensor,
        direction: Tensor,
        *,
        softcap: float,
        logit_scale: float,
    ) -> Tensor:
        """Compute the gradient of the hidden states of a linear operator."""

    def divergence_(
        self, logits: Tensor, reference_logits: Tensor, *, softcap: float, store: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the KL divergence of each row, and overwrite the logits with its gradient."""

    def accumulate_squared_grad_(
        self, fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, divisor: Tensor | None
    ) -> None:
        """Add squared per-sample gradients to ``fisher``, in place."""


PLAIN: Backend = reference  # it serves every tensor

OPERATIONS = (
    "triplet_forward",
    "triplet_backward",
    "inverted_hinge_",
    "rest_probabilities_",
    "triplet_columns_",
    "scale_rows_",
    "mean_scale",
    "token_losses",
    "hidden_gradient",
    "divergence_",
    "accumulate_squared_grad_",
)

# (operation, dtype, V, compute capability) -> (backend, the committed result that shows it to be the faster
# one). The entry with the nearest V counts for another V. The result is one of an H200, of the prototype from
# which the row kernel is made: 1.13 to 1.24 times a copy for bfloat16, and 2.1 to 2.3 for Triton's kernel of
# that day.
MEASURED_ON_CUDA: dict[tuple[str, torch.dtype, int, tuple[int, int]], tuple[str, str]] = {
    (operation, torch.bfloat16, vocab, (9, 0)): ("cuda", "benchmarks/results/prototypes_fused_h200.json")
    for operation in ("inverted_hinge_", "rest_probabilities_")
    for vocab in (32000, 50257, 128256, 262144)
}


def choose(operation: str, *tensors: Tensor) -> Backend:
    """Choose the backend of an operation on some tensors.

    The compiled core serves the CPU. Triton serves CUDA, unless ``MEASURED_ON_CUDA`` names the compiled row
    kernel. Plain torch serves every other device or dtype. ``LOKU_BACKEND=reference|native|triton`` forces a
    backend. ``native`` stands for all compiled kernels, those for CUDA too. Triton serves the operations on
    CUDA that have none, and plain torch the tensors that the forced backend cannot serve.

    Args:
        operation: One of ``OPERATIONS``.
        tensors: The tensors whose device and dtypes decide. The first one holds the logits (..., V), the
            inputs (n, T, k) of ``accumulate_squared_grad_``, the direction of ``hidden_gradient``, or the
            labels of an operation on float64 triplets alone.

    Returns:
        One of the modules ``reference``, ``native``, ``cuda`` and ``triton``.

    Raises:
        ValueError: ``LOKU_BACKEND`` names no backend.
        RuntimeError: ``LOKU_BACKEND`` names a backend that is not installed.
    """
    forced = os.environ.get("LOKU_BACKEND", "")
    if not forced and tensors[0].is_cpu:  # the shortest way, for the small calls of a CPU
        served = hasattr(native, operation) and all(map(native.serves, tensors))
        return native if served else reference
    if forced not in ("", "reference", "native", "triton"):
        raise ValueError(f"LOKU_BACKEND must be reference, native or triton, not {forced!r}")
    if forced == "triton":
        _check_triton(tensors[0])
    if forced == "native":
        cuda.check_built(tensors[0])
    for name in _by_preference(operation, tensors[0], forced):
        module = _triton() if name == "triton" else {"native": native, "cuda": cuda}.get(name)
        if module is not None and hasattr(module, operation) and all(map(module.serves, tensors)):
            return module
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


def _by_preference(operation: str, tensor: Tensor, forced: str) -> list[str]:
    """List the backends to try before ``reference``, the best one first."""
    if forced in ("reference", "triton"):
        return [] if forced == "reference" else ["triton"]
    if tensor.device.type != "cuda":
        return ["native"]
    if forced == "native":
        return ["cuda", "triton"]
    if hasattr(cuda, operation):
        if _row_kernel_is_faster(operation, tensor.dtype, tensor.shape[-1], tensor.device):
            return ["cuda", "triton"]  # the row kernel may not be built, or a row may be too long for it
    return ["triton"]


@functools.cache
def _row_kernel_is_faster(operation: str, dtype: torch.dtype, vocab: int, device: torch.device) -> bool:
    """Say whether the nearest entry of ``MEASURED_ON_CUDA`` names the compiled row kernel."""
    wanted = (operation, dtype, torch.cuda.get_device_capability(device))
    measured = [key for key in MEASURED_ON_CUDA if (*key[:2], key[3]) == wanted]
    if not measured:
        return False
    nearest = min(measured, key=lambda key: max(key[2], vocab) / min(key[2], vocab))
    return MEASURED_ON_CUDA[nearest][0] == "cuda"

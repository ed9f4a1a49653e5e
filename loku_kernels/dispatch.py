"""Which backend computes an operation on a tensor: the only place that decides.

On the CPU the compiled core; on CUDA the Triton kernels or, where measured to be faster, the compiled core's;
elsewhere, and for float64, plain torch. ``LOKU_BACKEND=reference|native|triton`` forces one.
"""

import functools
import importlib.util
import os

import torch

from loku_kernels import native

# (op, dtype, V, compute capability) -> (backend, the committed result that shows it to be the faster one).
# For another V, the nearest entry counts. Nothing has been measured yet.
MEASURED_ON_CUDA: dict[tuple[str, torch.dtype, int, tuple[int, int]], tuple[str, str]] = {}

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = (
    "triplet_forward",
    "triplet_backward",
    "inverted_hinge_",
    "triplet_columns_",
    "scale_rows_",
    "accumulate_squared_grad_",
)


def backend(op, tensor):
    """The module with a function ``op`` for this tensor, or None for the reference.

    op: "triplet_forward", "triplet_backward", "inverted_hinge_", "triplet_columns_", "scale_rows_" or
    "accumulate_squared_grad_".
    tensor: what the op is about, logits (..., V), or inputs (n, T, k) for the last.

    Raises:
        ValueError, RuntimeError: ``LOKU_BACKEND`` names none, or one that is not there.
    """
    forced = os.environ.get("LOKU_BACKEND", "")
    if forced not in ("", "reference", "native", "triton"):
        raise ValueError(f"LOKU_BACKEND must be reference, native or triton, not {forced!r}")
    if forced == "triton":
        if _triton() is None:
            raise RuntimeError("LOKU_BACKEND=triton, but triton is not installed")
        if tensor.device.type == "cpu" and not _triton().INTERPRETED:
            raise RuntimeError(
                "LOKU_BACKEND=triton, but the tensor is on the CPU, where Triton kernels run in Triton's "
                "interpreter only: set TRITON_INTERPRET=1 before the first use of triton"
            )
    if forced == "native" and native._core is None:
        raise RuntimeError("LOKU_BACKEND=native, but loku_kernels was installed without its compiled core")
    for name in [forced] if forced else _by_preference(op, tensor):
        if name == "native" and op in OPS and native.serves(tensor):
            return native
        if name == "triton" and tensor.dtype in _TRITON_DTYPES and tensor.device.type in ("cuda", "cpu"):
            return _triton()
    return None


@functools.cache
def _triton():
    """The package of Triton kernels, imported where it is first needed; None without triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from loku_kernels import triton

    return triton


def _by_preference(op, tensor):
    if tensor.device.type != "cuda":
        return ["native"]
    if MEASURED_ON_CUDA:
        capability, vocab = torch.cuda.get_device_capability(tensor.device), tensor.shape[-1]
        measured = [key for key in MEASURED_ON_CUDA if (*key[:2], key[3]) == (op, tensor.dtype, capability)]
        if measured:
            nearest = min(measured, key=lambda key: max(key[2], vocab) / min(key[2], vocab))
            if MEASURED_ON_CUDA[nearest][0] == "native":
                return ["native", "triton"]  # the core may lack CUDA, or the driver be too old for it
    return ["triton"]

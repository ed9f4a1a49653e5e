"""The compiled row kernel of CUDA as a backend. It overwrites whole rows of logits."""

from __future__ import annotations

from torch import Tensor

from loku_kernels.backends import native


def check_built(tensor: Tensor) -> None:
    """Raise ``RuntimeError`` if ``LOKU_BACKEND=native`` asks for kernels that were not built.

    Args:
        tensor: A tensor of the device on which they are to run.
    """
    if native._core is None:
        raise RuntimeError("LOKU_BACKEND=native, but loku_kernels was installed without its compiled core")
    if tensor.device.type == "cuda" and not native._core.has_cuda:
        raise RuntimeError(
            "LOKU_BACKEND=native, but loku_kernels was installed without its CUDA kernels: "
            "install it again where nvcc is found, with LOKU_CUDA=1"
        )


def serves(tensor: Tensor) -> bool:
    """Say whether the kernel computes on tensors of a device, dtype and row length."""
    return False

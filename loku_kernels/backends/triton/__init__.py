"""Triton kernels as a backend. They serve CUDA tensors without nvcc or a C++ compiler at installation.

This package is imported at its first use.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loku_kernels.backends.triton.divergence import divergence_
from loku_kernels.backends.triton.fisher import accumulate_squared_grad_
from loku_kernels.backends.triton.triplet import (
    hidden_gradient,
    inverted_hinge_,
    mean_scale,
    rest_probabilities_,
    scale_rows_,
    token_losses,
    triplet_backward,
    triplet_forward,
)

__all__ = [
    "INTERPRETED",
    "accumulate_squared_grad_",
    "divergence_",
    "hidden_gradient",
    "inverted_hinge_",
    "mean_scale",
    "rest_probabilities_",
    "scale_rows_",
    "serves",
    "token_losses",
    "triplet_backward",
    "triplet_forward",
]

# True if TRITON_INTERPRET=1 was set at the import. Triton's interpreter then runs the kernels, on CPU
# tensors.
INTERPRETED = triton.knobs.runtime.interpret

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.int64))


def serves(tensor: Tensor) -> bool:
    """Say whether the kernels compute on tensors of a device and dtype.

    Args:
        tensor: A tensor of that device and dtype.

    Returns:
        True for float32, bfloat16 and float16 on CUDA and, in the interpreter, on the CPU. True for int64
        there too, because labels stand for the operations on float64 triplets.
    """
    return tensor.dtype in _DTYPES and tensor.device.type in ("cuda", "cpu")

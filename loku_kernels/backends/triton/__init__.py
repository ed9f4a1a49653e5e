"""Triton kernels as a backend: CUDA tensors get them without a compiler. Imported when first needed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loku_kernels.backends.triton.fisher import accumulate_squared_grad_
from loku_kernels.backends.triton.triplet import (
    inverted_hinge_,
    scale_rows_,
    triplet_backward,
    triplet_columns_,
    triplet_forward,
)

__all__ = [
    "INTERPRETED",
    "accumulate_squared_grad_",
    "inverted_hinge_",
    "scale_rows_",
    "serves",
    "triplet_backward",
    "triplet_columns_",
    "triplet_forward",
]

# Kernels are made for Triton's interpreter, which runs them on CPU tensors, if TRITON_INTERPRET=1 was set
# when this was imported.
INTERPRETED = triton.knobs.runtime.interpret


def serves(tensor: Tensor) -> bool:
    """Whether the kernels compute on tensors of this device and dtype."""
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and tensor.device.type in ("cuda", "cpu")

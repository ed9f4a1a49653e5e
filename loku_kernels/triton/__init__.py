"""Triton kernels: what CUDA tensors get without a compiler. Imported by ``dispatch.py`` when first needed."""

import triton

from loku_kernels.triton.fisher import accumulate_squared_grad_
from loku_kernels.triton.triplet import (
    INVERTED_HINGE,
    REST,
    scale_rows_,
    triplet_backward,
    triplet_forward,
    triplet_fused_,
)

__all__ = [
    "INTERPRETED",
    "INVERTED_HINGE",
    "REST",
    "accumulate_squared_grad_",
    "scale_rows_",
    "triplet_backward",
    "triplet_forward",
    "triplet_fused_",
]

# Kernels are made for Triton's interpreter, which runs them on CPU tensors, if TRITON_INTERPRET=1 was set
# when this was imported.
INTERPRETED = triton.knobs.runtime.interpret

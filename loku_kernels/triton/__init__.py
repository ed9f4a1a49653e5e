"""Triton kernels: what CUDA tensors get without a compiler. Imported by ``dispatch.py`` when first needed."""

import triton

from loku_kernels.triton.fisher import accumulate_squared_grad_
from loku_kernels.triton.triplet import (
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
    "triplet_backward",
    "triplet_columns_",
    "triplet_forward",
]

# Kernels are made for Triton's interpreter, which runs them on CPU tensors, if TRITON_INTERPRET=1 was set
# when this was imported.
INTERPRETED = triton.knobs.runtime.interpret

"""Kernels for unlearning: losses on the softmax triplet, squared per-sample gradients, row-scaled SVD."""

from loku_kernels.backends.native import warn_if_missing
from loku_kernels.divergence import linear_kl_divergence_loss
from loku_kernels.fisher import accumulate_squared_grad_
from loku_kernels.linear_triplet import linear_softmax_triplet
from loku_kernels.losses import (
    cross_entropy,
    cross_entropy_loss,
    ihl_loss,
    inverted_hinge,
    linear_cross_entropy_loss,
    linear_ihl_loss,
    reduce_loss,
    triplet_loss,
)
from loku_kernels.lowrank import row_scaled_svd
from loku_kernels.triplet import softmax_triplet

__version__ = "0.1.0"
__all__ = [
    "accumulate_squared_grad_",
    "cross_entropy",
    "cross_entropy_loss",
    "ihl_loss",
    "inverted_hinge",
    "linear_cross_entropy_loss",
    "linear_ihl_loss",
    "linear_kl_divergence_loss",
    "linear_softmax_triplet",
    "reduce_loss",
    "row_scaled_svd",
    "softmax_triplet",
    "triplet_loss",
]

warn_if_missing()

"""Plain torch: the formulas that every kernel is tested against, and the backend that serves every tensor."""

from loku_kernels.backends.reference.divergence import divergence_
from loku_kernels.backends.reference.fisher import accumulate_squared_grad_
from loku_kernels.backends.reference.triplet import (
    hidden_gradient,
    inverted_hinge_,
    inverted_hinge_loss,
    mean_scale,
    rest_probabilities_,
    scale_rows_,
    softmax_triplet,
    softmax_triplet_backward,
    token_losses,
    triplet_backward,
    triplet_columns_,
    triplet_forward,
)

__all__ = [
    "accumulate_squared_grad_",
    "divergence_",
    "hidden_gradient",
    "inverted_hinge_",
    "inverted_hinge_loss",
    "mean_scale",
    "rest_probabilities_",
    "scale_rows_",
    "softmax_triplet",
    "softmax_triplet_backward",
    "token_losses",
    "triplet_backward",
    "triplet_columns_",
    "triplet_forward",
]

"""The low-rank arithmetic of an initialisation on one weight.

It runs in float64, a block of rows at a time. So each element of the result is rounded once, autocast and
TF32 change nothing, and there is no second copy of a large weight. The factors of the authors' code alone are
float32, as they are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loku.precision import float32_products

# A direction whose singular value is below this share of the largest is numerical noise. S^(-1/2) would blow
# up its column of B. So its row of A and its column of B are zero.
_NOISE = 1e-6
_OFFICIAL_EPSILON = 1e-5  # what the authors' code adds to the row scales that it divides by
_BLOCK_ELEMENTS = 1 << 22  # the most elements of a weight that are in float64 at a time


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # others may lack float64


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _BLOCK_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def add_low_rank_(weight: Tensor, B: Tensor, A: Tensor, factor: float) -> None:
    """weight (d, k) += factor * B (d, r) A (r, k)."""
    dtype = _wide_dtype(weight.device)
    A = A.to(dtype)
    for w, b in _row_blocks(weight, B):
        w.copy_(torch.addmm(w.to(dtype), b.to(dtype), A, alpha=factor))


def fila_factors(weight: Tensor, S: Tensor, V: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """FILA's B (d, rank) and A (rank, k), each divided by sqrt(scaling).

    S (q,) and V (k, q) are the singular values and right singular vectors, q <= rank.
    """
    dtype = _wide_dtype(weight.device)
    S, V = S.to(dtype), V.to(dtype)
    kept = S > _NOISE * S[0]
    root = torch.where(kept, S.sqrt(), 0.0)
    inverse = torch.where(kept, S.rsqrt(), 0.0)
    B = torch.cat([w.to(dtype) @ V for (w,) in _row_blocks(weight)]) * inverse
    A = (V * root).T
    B, A = _of_rank(rank, B, A)
    return B / math.sqrt(scaling), A / math.sqrt(scaling)


def official_factors(weight: Tensor, row_scales: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B (d, rank) and A (rank, k), float32, as the authors' code computes them.

        U, S, V = torch.svd_lowrank(diag(s) W, q=rank)
        B = diag(1 / (s + 1e-5)) U sqrt(S / scaling),   A = sqrt(S / scaling) V^T

    The function draws from the global generator of torch. W is the weight (d, k), and s are its row scales
    (d,), float32.
    """
    with torch.autocast(weight.device.type, enabled=False), float32_products("ieee"):
        U, S, V = torch.svd_lowrank(row_scales[:, None] * weight.float(), q=min(rank, *weight.shape))
    root = (S / scaling).sqrt()
    return _of_rank(rank, U * root / (row_scales + _OFFICIAL_EPSILON)[:, None], (V * root).T)


def _of_rank(rank: int, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Fill up factors (d, q) and (q, k) with zeros: a small weight has fewer directions than the rank."""
    spare = rank - A.shape[0]
    return nn.functional.pad(B, (0, spare)), nn.functional.pad(A, (0, 0, 0, spare))

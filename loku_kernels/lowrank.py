"""The leading singular values and right singular vectors of diag(s) W, for a batch of weights W.

FILA (LoKU, section 3.3) initialises a LoRA adapter from the SVD of a weight whose rows are scaled by their
Fisher importance, diag(s) W = U S V^T. It needs S and V only: diag(1/s) U S = W V.

The method is randomised block Krylov (Musco and Musco, 2015). For M = diag(s) W and random Omega, the space
of (M M^T) Omega, (M M^T)^2 Omega, ... is kept orthonormal block by block, and what it captures of the energy
is watched: three blocks suffice for log-normal scales, a flat spectrum takes more.
"""

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

OVERSAMPLING = 8  # vectors beyond the rank in a block
MIN_DEPTH = 3  # blocks before convergence is judged
MAX_DEPTH = 12
MAX_PASSES = 4  # of orthogonalisation: one or two suffice but where a space is used up
TOLERANCE = 1.5e-3  # estimated share of the energy that Q still misses; V, half a step ahead, misses less
GROUP_BYTES = 8 << 20  # of the matrices that go together, and of their blocks: what a cache holds
FLOAT32_BYTES = 64 << 20  # of a weight in less than float32 that is in float32 at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_scaled_svd(
    weights: Tensor | Sequence[Tensor], row_scales: Tensor | Sequence[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Top ``rank`` singular values and right singular vectors of diag(row_scales[i]) weights[i].

    The same as, for every i and without forming the scaled matrix::

        _, S, Vh = torch.linalg.svd(row_scales[i][:, None] * weights[i].float(), full_matrices=False)
        S[:rank], Vh[:rank].T

    up to the accuracy of the method: V captures all but 1e-3 of the energy, the sum of S_i^2, that can be
    captured (all but 1e-2 where the spectrum is flat at ``rank``), and S is within 1% down to S_i of about
    1e-5 S_0, where float32 products end. S_i is ||diag(s) W v_i||, not an estimate of it.

    Args:
        weights: (batch, d, k), or a sequence of (d, k) tensors, which are not stacked; float32,
            bfloat16 or float16. As in ``nn.Linear``, d is the number of outputs.
        row_scales: (batch, d), or a sequence of (d,) tensors; float32, no unit.
        rank: at least 1, at most min(d, k).

    Returns:
        S (batch, rank) float32, descending, and V (batch, k, rank) float32 with orthonormal columns
        (||V^T V - I|| <= 1e-5). Columns of V that belong to S_i <= 1e-6 S_0 are arbitrary.

    The result is deterministic and leaves torch's global random state alone. It is not differentiable.
    Weights in less than float32 are converted, not scaled, at most 64 MiB at a time.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, a ``rank`` out of range, input that is
            not finite.
    """
    weights, scales = _checked(weights, row_scales, rank)
    (d, k), device = weights[0].shape, weights[0].device
    width = rank + OVERSAMPLING
    budget = GROUP_BYTES if device.type == "cpu" else 64 * GROUP_BYTES
    group = max(1, budget // (12 * min(width * MIN_DEPTH, d, k) * (d + k) + 4 * d * k))
    # On the CPU: the same on every device.
    noise = torch.randn(width, max(d, k), generator=torch.Generator().manual_seed(0)).to(device)
    s = torch.empty(len(weights), rank, dtype=torch.float32, device=device)
    v = torch.empty(len(weights), rank, k, dtype=torch.float32, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(weights), group):
            part = slice(start, start + group)
            s[part], v[part] = _krylov_svd(_ScaledRows(weights[part], scales[part]), rank, noise, start)
    return s, v.mT.contiguous()


class _ScaledRows:
    """M = diag(s) W for a few matrices of one shape. Thin operands are stored as rows: (batch, b, k) and
    (batch, b, d), because the library GEMMs are fastest on them there (up to 1.6x on a CPU)."""

    def __init__(self, weights: Tensor | Sequence[Tensor], scales: Tensor):
        # A common factor of s would only bring underflow or overflow.
        self.unit = scales.abs().amax(1)
        self.unit = torch.where(self.unit > 0, self.unit, 1.0)
        self.scales = (scales / self.unit[:, None])[:, None, :]
        self.d, self.k = weights[0].shape
        self.device = weights[0].device
        self.rows = self.d  # rows of W that are in float32 at a time
        if weights[0].dtype != torch.float32:
            if 4 * self.d * self.k > FLOAT32_BYTES:
                self.rows = max(1, FLOAT32_BYTES // (4 * self.k))
            else:
                weights = (
                    [w.float() for w in weights] if isinstance(weights, (list, tuple)) else weights.float()
                )
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    def times(self, x: Tensor) -> Tensor:
        """M x: (batch, b, k) -> (batch, b, d)"""
        if isinstance(self.weights, Tensor) and self.rows == self.d:
            return (x @ self.weights.mT).mul_(self.scales)
        out = x.new_empty(*x.shape[:2], self.d)
        for i, w in enumerate(self.weights):
            for start in range(0, self.d, self.rows):
                part = slice(start, start + self.rows)
                out[i, :, part] = x[i] @ w[part].float().T
        return out.mul_(self.scales)

    def transpose_times(self, y: Tensor) -> Tensor:
        """M^T y: (batch, b, d) -> (batch, b, k)"""
        y = y * self.scales
        if isinstance(self.weights, Tensor) and self.rows == self.d:
            return y @ self.weights
        out = y.new_zeros(*y.shape[:2], self.k)
        for i, w in enumerate(self.weights):
            for start in range(0, self.d, self.rows):
                part = slice(start, start + self.rows)
                out[i].addmm_(y[i, :, part], w[part].float())
        return out


def _krylov_svd(matrix: _ScaledRows, rank: int, noise: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """S (batch, rank) and V^T (batch, rank, k) of M, from random numbers (width, max(d, k)) that serve every
    matrix. ``first`` is the index of the first matrix, for messages."""
    width = len(noise)
    # The Krylov space holds left vectors Q, and V comes from their images M^T Q, half a power step ahead.
    # Where it would be no smaller than M, Q is the whole space, on the shorter side.
    whole = width * MIN_DEPTH >= min(matrix.d, matrix.k)
    left = matrix.d <= matrix.k or not whole
    image_of, back = (
        (matrix.transpose_times, matrix.times) if left else (matrix.times, matrix.transpose_times)
    )
    batch, side, other = len(matrix), *((matrix.d, matrix.k) if left else (matrix.k, matrix.d))
    rounding = noise[:, :side].roll(1, 1) * (1e-6 / side**0.5)
    capacity = side if whole else min(side, width * (MIN_DEPTH + 1))
    basis = torch.empty(batch, capacity, side, device=matrix.device)
    # Images and their Gram matrix in float64: its eigenvalues are the squares of S.
    images = torch.empty(batch, capacity, other, dtype=torch.float64, device=matrix.device)
    gram = torch.empty(batch, capacity, capacity, dtype=torch.float64, device=matrix.device)
    if whole:
        block = torch.eye(side, device=matrix.device).expand(batch, -1, -1)
    else:
        block = back(image_of(noise[:, :side].expand(batch, -1, -1)))
        _require_finite(block, first)
    size, energies = 0, []
    for depth in count(1):
        if not whole:
            fresh = rounding.roll(depth, 1)[: block.shape[1]]  # as good as drawn anew
            block = _orthonormal_rows(block, basis[:, :size], fresh)
        old, size = size, size + block.shape[1]
        if size > capacity:
            capacity = min(side, 2 * capacity)
            basis, images = (_grown(x, (batch, capacity, x.shape[2])) for x in (basis, images))
            gram = _grown(gram, (batch, capacity, capacity))
        basis[:, old:size] = block
        image = image_of(block)
        images[:, old:size] = image
        gram[:, old:size, :size] = images[:, old:size] @ images[:, :size].mT
        gram[:, :old, old:size] = gram[:, old:size, :old].mT
        if whole:
            _require_finite(gram, first)
        part = gram[:, :size, :size]
        if size == side or depth >= MIN_DEPTH:
            values, vectors = torch.linalg.eigh(part)
        else:
            values = torch.linalg.eigvalsh(part)
        energies.append(values[:, -rank:].clamp_min(0).sum(1))
        if size == side or depth == MAX_DEPTH or (depth >= MIN_DEPTH and _converged(*energies[-3:])):
            break
        block = back(image)[:, : side - size]

    rotation = vectors[:, :, -rank:].flip(2).mT
    v = rotation @ images[:, :size] if left else (rotation.float() @ basis[:, :size]).double()
    # Directions without energy have no image to normalise: any orthonormal completion will do.
    energy = values[:, -rank:].flip(1)[..., None].clamp_min(0)
    v = torch.where(energy <= 1e-12 * energy[:, :1], noise[:rank, : matrix.k], v)
    for _ in range(2):
        v, _ = _gram_schmidt(v)
    # V is ahead of Q: Rayleigh-Ritz on V itself.
    image = matrix.times(v.float()).double()
    values, vectors = torch.linalg.eigh(image @ image.mT)
    s = values.flip(1).clamp_min(0).sqrt() * matrix.unit[:, None]
    return s.float(), (vectors.flip(2).mT @ v).float()


def _require_finite(product: Tensor, first: int) -> None:
    """Every entry of a matrix and its scales has a part in each product: NaN and infinity show there."""
    finite = product.isfinite().all(2).all(1)
    if not finite.all():
        bad = first + int((~finite).nonzero()[0])
        raise ValueError(f"expected finite weights and row_scales, got others (or too large) in matrix {bad}")


def _grown(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = x.new_empty(shape)
    out[:, : x.shape[1], : x.shape[2]] = x
    return out


def _converged(before: Tensor, last: Tensor, now: Tensor) -> bool:
    """Whether the captured energies (batch,) of three successive depths have levelled out, assuming that the
    gains go on shrinking at their present rate."""
    gain, previous = (now - last).clamp_min(0), (last - before).clamp_min(0)
    rate = (gain / previous.clamp_min(1e-300)).clamp(max=0.9)
    return bool((gain * rate / (1 - rate) <= TOLERANCE * now).all())


def _orthonormal_rows(block: Tensor, basis: Tensor, noise: Tensor) -> Tensor:
    """Rows (batch, b, n) made orthonormal among themselves and to the rows of ``basis``, float32.

    Noise at the level of float32 rounding stands in for directions that the block lacks (a matrix of low
    rank, a space that is used up), so the Cholesky factor always exists."""
    for _ in range(MAX_PASSES):
        before = torch.linalg.vector_norm(block, dim=2, keepdim=True).clamp_min_(1e-30)
        block = torch.addcmul(noise, block, 1 / before)
        if basis.shape[1]:
            block = torch.baddbmm(block, block @ basis.mT, basis, alpha=-1)
        block, left = _gram_schmidt(block)
        # Where little is left of a row beside what was taken off, rounding errors are part of it: once more.
        if left.min() > 1e-2:
            break
    return block


def _gram_schmidt(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (batch, b, n) made orthonormal in their order, by the Cholesky factor of their Gram matrix,
    and the length of what was left of each (batch, b). A Gram matrix in float32 would be unsafe above a
    condition number of 4e3."""
    exact = rows.double()
    factor = torch.linalg.cholesky(exact @ exact.mT)
    eye = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False).to(rows.dtype)
    return inverse @ rows, factor.diagonal(dim1=1, dim2=2)


def _checked(weights, row_scales, rank):
    for name, value in (("weights", weights), ("row_scales", row_scales)):
        if not isinstance(value, (Tensor, list, tuple)):
            raise ValueError(
                f"expected {name} to be a tensor or a sequence of tensors, got {type(value).__name__}"
            )
    if isinstance(weights, Tensor) and weights.dim() != 3:
        raise ValueError(f"expected weights of shape (batch, d, k), got {tuple(weights.shape)}")
    if len(weights) == 0:
        raise ValueError("expected at least one weight, got an empty batch")
    first = weights[0]
    for weight in weights:
        if weight.dim() != 2 or weight.shape != first.shape:
            raise ValueError(
                f"expected weights of one shape (d, k), got {tuple(first.shape)} and {tuple(weight.shape)}"
            )
        if weight.dtype not in DTYPES or weight.dtype != first.dtype:
            raise ValueError(
                "expected weights that are all float32, bfloat16 or float16, "
                f"got {first.dtype} and {weight.dtype}"
            )
        if weight.device != first.device:
            raise ValueError(f"expected weights on one device, got {first.device} and {weight.device}")
    d, k = first.shape
    shapes = {tuple(scale.shape) for scale in row_scales}
    if len(row_scales) != len(weights) or shapes != {(d,)}:
        raise ValueError(
            f"expected row_scales of shape {(len(weights), d)}, got {len(row_scales)} of {sorted(shapes)}"
        )
    scales = row_scales if isinstance(row_scales, Tensor) else torch.stack(tuple(row_scales))
    if scales.dtype != torch.float32 or scales.device != first.device:
        raise ValueError(
            f"expected row_scales in float32 on {first.device}, got {scales.dtype} on {scales.device}"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(d, k):
        raise ValueError(f"expected an integer rank from 1 to min(d, k) = {min(d, k)}, got {rank!r}")
    return weights, scales.detach()

"""The leading singular values and right singular vectors of diag(row_scales) W, for a batch of weights W.

FILA (LoKU, section 3.3) initialises a LoRA adapter from the SVD of a weight whose rows are scaled by their
Fisher importance. With the row scales s it is diag(s) W = U S V^T. FILA needs only S and V, because
diag(1/s) U S = W V.

The method is randomised block Krylov (Musco and Musco, 2015). For M = diag(s) W and random Omega, it builds
an orthonormal basis of (M M^T) Omega, (M M^T)^2 Omega, ... block by block. It stops when the captured energy
levels out. Three blocks suffice for log-normal scales. A flat spectrum takes more.
"""

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

OVERSAMPLING = 8  # vectors beyond the rank in a block
MIN_DEPTH = 3  # blocks before convergence is judged
MAX_DEPTH = 12  # blocks at most
MAX_PASSES = 4  # passes of orthogonalisation; one or two suffice unless a space is used up
TOLERANCE = 1.5e-3  # estimated share of the energy that Q still misses; V, half a step ahead, misses less
GROUP_BYTES = 8 << 20  # bytes of a group of matrices and their blocks on the CPU: the size of a cache
FLOAT32_BYTES = 64 << 20  # bytes of the float32 copy of a narrower weight, at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_scaled_svd(
    weights: Tensor | Sequence[Tensor], row_scales: Tensor | Sequence[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Compute the top singular values and right singular vectors of diag(row_scales[i]) weights[i].

    They equal, for every i and without forming the scaled matrix::

        _, S, Vh = torch.linalg.svd(row_scales[i][:, None] * weights[i].float(), full_matrices=False)
        S[:rank], Vh[:rank].T

    up to the accuracy of the method. The energy of a matrix is the sum of S_i^2. V captures all but 1e-3 of
    the energy that ``rank`` vectors can capture, or all but 1e-2 if the spectrum is flat at ``rank``. S is
    within 1% down to S_i of about 1e-5 S_0, where the precision of float32 products ends. S_i is
    ||diag(s) W v_i|| itself and not an estimate.

    The result is deterministic and leaves torch's global random state alone. It is not differentiable.
    Weights narrower than float32 are converted, at most 64 MiB at a time.

    Args:
        weights: The weights (batch, d, k), or a sequence of (d, k) tensors, which are not stacked. float32,
            bfloat16 or float16. As in ``nn.Linear``, d is the number of outputs.
        row_scales: The scales (batch, d) of the rows, or a sequence of (d,) tensors. float32, without a unit.
        rank: The number of singular values, from 1 to min(d, k).

    Returns:
        S (batch, rank), float32, descending, and V (batch, k, rank), float32, with orthonormal columns:
        ||V^T V - I|| <= 1e-5. The columns of V for S_i <= 1e-6 S_0 are arbitrary.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together, ``rank`` is out of range, or the input is
            not finite.
    """
    weights, row_scales = _checked(weights, row_scales, rank)
    (d, k), device = weights[0].shape, weights[0].device
    width = rank + OVERSAMPLING
    budget = GROUP_BYTES if device.type == "cpu" else 64 * GROUP_BYTES
    group = max(1, budget // (12 * min(width * MIN_DEPTH, d, k) * (d + k) + 4 * d * k))
    # Drawn on the CPU, so that every device gets the same numbers.
    noise = torch.randn(width, max(d, k), generator=torch.Generator().manual_seed(0)).to(device)
    s = torch.empty(len(weights), rank, dtype=torch.float32, device=device)
    v = torch.empty(len(weights), rank, k, dtype=torch.float32, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(weights), group):
            part = slice(start, start + group)
            s[part], v[part] = _krylov_svd(_ScaledRows(weights[part], row_scales[part]), rank, noise, start)
    return s, v.mT.contiguous()


class _ScaledRows:
    """M = diag(row_scales) W for a few matrices of one shape.

    Thin operands are stored as rows, (batch, b, k) and (batch, b, d). The library's GEMMs are faster on rows
    than on columns (up to 1.6 times on a CPU).

    Args:
        weights: The matrices W (batch, d, k), or a sequence of (d, k) tensors.
        row_scales: The scales (batch, d) of their rows, float32.
    """

    def __init__(self, weights: Tensor | Sequence[Tensor], row_scales: Tensor) -> None:
        # The largest scale of each matrix is divided out, because it could only cause underflow or overflow.
        self.unit = row_scales.abs().amax(1)
        self.unit = torch.where(self.unit > 0, self.unit, 1.0)
        self.row_scales = (row_scales / self.unit[:, None])[:, None, :]
        self.d, self.k = weights[0].shape
        self.device = weights[0].device
        self.rows = self.d  # rows of the float32 copy of W, at a time
        if weights[0].dtype != torch.float32:
            if 4 * self.d * self.k > FLOAT32_BYTES:
                self.rows = max(1, FLOAT32_BYTES // (4 * self.k))
            else:
                weights = weights.float() if isinstance(weights, Tensor) else [w.float() for w in weights]
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    def times(self, x: Tensor) -> Tensor:
        """Compute M x (batch, b, d) for x (batch, b, k)."""
        if isinstance(self.weights, Tensor) and self.rows == self.d:
            return (x @ self.weights.mT).mul_(self.row_scales)
        out = x.new_empty(*x.shape[:2], self.d)
        for i, w in enumerate(self.weights):
            for start in range(0, self.d, self.rows):
                part = slice(start, start + self.rows)
                out[i, :, part] = x[i] @ w[part].float().T
        return out.mul_(self.row_scales)

    def transpose_times(self, y: Tensor) -> Tensor:
        """Compute M^T y (batch, b, k) for y (batch, b, d)."""
        y = y * self.row_scales
        if isinstance(self.weights, Tensor) and self.rows == self.d:
            return y @ self.weights
        out = y.new_zeros(*y.shape[:2], self.k)
        for i, w in enumerate(self.weights):
            for start in range(0, self.d, self.rows):
                part = slice(start, start + self.rows)
                out[i].addmm_(y[i, :, part], w[part].float())
        return out


def _krylov_svd(matrix: _ScaledRows, rank: int, noise: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Compute S (batch, rank) and V^T (batch, rank, k) of M.

    Args:
        matrix: The matrices M.
        rank: The number of singular values.
        noise: Random numbers (width, max(d, k)), the same for every matrix.
        offset: The index of the first matrix in the caller's batch, for messages.
    """
    width = len(noise)
    # The Krylov space holds left vectors Q. V comes from their images M^T Q, half a power step ahead. Q is
    # the whole space of the shorter side if the Krylov space would be no smaller than that.
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
        _require_finite(block, offset)
    size = 0
    energies: list[Tensor] = []
    for depth in count(1):
        if not whole:
            fresh = rounding.roll(depth, 1)[: block.shape[1]]  # as good as new random numbers
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
            _require_finite(gram, offset)
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
    # A direction without energy has no image to normalise. Any orthonormal completion will do.
    energy = values[:, -rank:].flip(1)[..., None].clamp_min(0)
    v = torch.where(energy <= 1e-12 * energy[:, :1], noise[:rank, : matrix.k], v)
    for _ in range(2):
        v, _ = _gram_schmidt(v)
    # V is ahead of Q, so the Rayleigh-Ritz step uses V itself.
    image = matrix.times(v.float()).double()
    values, vectors = torch.linalg.eigh(image @ image.mT)
    s = values.flip(1).clamp_min(0).sqrt() * matrix.unit[:, None]
    return s.float(), (vectors.flip(2).mT @ v).float()


def _require_finite(product: Tensor, offset: int) -> None:
    """Raise ``ValueError`` for a matrix with NaN or infinity.

    Each entry of a matrix and of its scales is a part of ``product`` (batch, *, *), so both show there.
    ``offset`` is the index of the first matrix in the caller's batch.
    """
    finite = product.isfinite().all(2).all(1)
    if not finite.all():
        bad = offset + int((~finite).nonzero()[0])
        raise ValueError(f"expected finite weights and row_scales, got others (or too large) in matrix {bad}")


def _grown(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Copy x (batch, a, b) to the begin of a larger tensor."""
    out = x.new_empty(shape)
    out[:, : x.shape[1], : x.shape[2]] = x
    return out


def _converged(before: Tensor, last: Tensor, now: Tensor) -> bool:
    """Say whether the captured energies (batch,) of three successive depths have levelled out.

    The estimate of the missing energy assumes that the gains go on shrinking at their present rate.
    """
    gain, previous = (now - last).clamp_min(0), (last - before).clamp_min(0)
    rate = (gain / previous.clamp_min(1e-300)).clamp(max=0.9)
    return bool((gain * rate / (1 - rate) <= TOLERANCE * now).all())


def _orthonormal_rows(block: Tensor, basis: Tensor, noise: Tensor) -> Tensor:
    """Make rows (batch, b, n) orthonormal among themselves and to the rows of ``basis``, in float32.

    A matrix of low rank, or a space that is used up, leaves the block without some directions. Noise (b, n)
    at the level of float32 rounding replaces them, so the Cholesky factor always exists.
    """
    for _ in range(MAX_PASSES):
        before = torch.linalg.vector_norm(block, dim=2, keepdim=True).clamp_min_(1e-30)
        block = torch.addcmul(noise, block, 1 / before)
        if basis.shape[1]:
            block = torch.baddbmm(block, block @ basis.mT, basis, alpha=-1)
        block, left = _gram_schmidt(block)
        # A row of which little is left consists of rounding errors in part, and needs another pass.
        if left.min() > 1e-2:
            break
    return block


def _gram_schmidt(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Make rows (batch, b, n) orthonormal, in their order.

    The method is the Cholesky factor of their Gram matrix in float64. In float32 it would be unsafe above a
    condition number of 4e3.

    Returns:
        The orthonormal rows, and the length (batch, b) of the rest of each row after subtracting its
        projections on the rows before it.
    """
    exact = rows.double()
    factor = torch.linalg.cholesky(exact @ exact.mT)
    eye = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False).to(rows.dtype)
    return inverse @ rows, factor.diagonal(dim1=1, dim2=2)


def _checked(
    weights: Tensor | Sequence[Tensor], row_scales: Tensor | Sequence[Tensor], rank: int
) -> tuple[Tensor | Sequence[Tensor], Tensor]:
    """Check the arguments of ``row_scaled_svd`` and stack the row scales (batch, d)."""
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
    shapes = {tuple(scales.shape) for scales in row_scales}
    if len(row_scales) != len(weights) or shapes != {(d,)}:
        raise ValueError(
            f"expected row_scales of shape {(len(weights), d)}, got {len(row_scales)} of {sorted(shapes)}"
        )
    if not isinstance(row_scales, Tensor):
        row_scales = torch.stack(tuple(row_scales))
    if row_scales.dtype != torch.float32 or row_scales.device != first.device:
        raise ValueError(
            f"expected row_scales in float32 on {first.device}, got {row_scales.dtype} on {row_scales.device}"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(d, k):
        raise ValueError(f"expected an integer rank from 1 to min(d, k) = {min(d, k)}, got {rank!r}")
    return weights, row_scales.detach()

"""The leading singular values and right singular vectors of diag(s) W, for a batch of weights W.

FILA (Cha et al., section 3.3) initialises a LoRA adapter from the SVD of a weight whose rows are
scaled by their Fisher importance, diag(s) W = U S V^T. It needs S and V only: diag(1/s) U S = W V.

The method is randomised block Krylov (Musco and Musco, 2015) with a Rayleigh-Ritz step: the space
spanned by Q, (M M^T) Q, (M M^T)^2 Q, ... for M = diag(s) W and a random Q, kept orthonormal block by
block. Its depth follows the spectrum: three products with M M^T suffice for log-normal scales, a
flat spectrum takes more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLING = 8  # columns beyond the rank in a block
MIN_DEPTH = 3  # products with M M^T before convergence is judged
MAX_DEPTH = 12
TOLERANCE = 2e-4  # estimated share of the captured energy that is still missing
WORKSPACE = 64 << 20  # bytes of scratch memory: bounds how many matrices go together
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_scaled_svd(
    weights: Tensor | Sequence[Tensor], row_scales: Tensor | Sequence[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Top ``rank`` singular values and right singular vectors of diag(row_scales[i]) weights[i].

    The same as, for every i and without forming the scaled matrix::

        _, S, Vh = torch.linalg.svd(row_scales[i][:, None] * weights[i].float(), full_matrices=False)
        S[:rank], Vh[:rank].T

    up to the accuracy of the method: V captures all but 1e-3 of the energy sum S_i^2 that the best
    rank-``rank`` subspace captures (1e-2 where the spectrum is flat at ``rank``) and S is within 1%.

    Args:
        weights: (batch, d, k), or a sequence of (d, k) tensors, which are not stacked; float32,
            bfloat16 or float16. As in ``nn.Linear``, d is the number of outputs.
        row_scales: (batch, d), or a sequence of (d,) tensors; float32, no unit.
        rank: at least 1, at most min(d, k).

    Returns:
        S (batch, rank) float32, descending, and V (batch, k, rank) float32 with orthonormal columns
        (||V^T V - I|| <= 1e-5). Columns of V that belong to S_i <= 1e-6 S_0 are arbitrary.

    The result is deterministic and leaves torch's global random state alone. It is not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``rank`` is out of range, or the input is not finite.
    """
    weights, scales = _checked(weights, row_scales, rank)
    (d, k), device = weights[0].shape, weights[0].device
    upcast = 0 if weights[0].dtype == torch.float32 else 4 * d * k
    width = min((rank + OVERSAMPLING) * (MIN_DEPTH + 1), d, k)
    group = max(1, WORKSPACE // (12 * width * (d + k) + upcast))
    s = torch.empty(len(weights), rank, dtype=torch.float32, device=device)
    v = torch.empty(len(weights), rank, k, dtype=torch.float32, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(weights), group):
            part = slice(start, start + group)
            s[part], v[part] = _krylov_svd(_ScaledRows(weights[part], scales[part]), rank, start)
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
            if len(weights) == 1 and 4 * self.d * self.k > WORKSPACE:
                self.rows = max(1, WORKSPACE // (4 * self.k))
            else:
                weights = [w.float() for w in weights] if isinstance(weights, (list, tuple)) else weights.float()
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


def _krylov_svd(matrix: _ScaledRows, rank: int, first: int) -> tuple[Tensor, Tensor]:
    """S (batch, rank) and V^T (batch, rank, k) of M; ``first`` is the index of its first matrix, for messages."""
    # The Krylov space lives on the smaller side. On a wide or square M it holds left vectors, whose
    # images M^T q become V; on a tall M it holds right vectors.
    wide = matrix.d <= matrix.k
    image_of, back = (
        (matrix.transpose_times, matrix.times) if wide else (matrix.times, matrix.transpose_times)
    )
    side = min(matrix.d, matrix.k)
    generator = torch.Generator().manual_seed(0)

    def noise(rows):  # drawn on the CPU: the same on every device, and for every matrix
        return torch.randn(rows, side, generator=generator).to(matrix.device).expand(len(matrix), -1, -1)

    width = rank + OVERSAMPLING
    if 2 * width >= side:  # a sketch would be no smaller: the whole space, an eigendecomposition of the Gram matrix
        blocks = [torch.eye(side, device=matrix.device).expand(len(matrix), -1, -1)]
    else:
        blocks = [_orthonormal_rows(noise(width), [], 0.0)]
    images, energies = [], []
    gram = torch.empty(len(matrix), 0, 0, dtype=torch.float64, device=matrix.device)
    while True:
        image = image_of(blocks[-1])
        images.append(image.double())
        gram = _bordered(gram, images)
        if not gram.isfinite().all():
            bad = first + int((~gram.isfinite().all(2).all(1)).nonzero()[0])
            raise ValueError(f"expected finite weights and row_scales, got values that are not finite in matrix {bad}")
        depth = len(blocks) - 1
        whole = gram.shape[1] >= side
        if depth >= MIN_DEPTH - 2 and not whole:
            energies.append(torch.linalg.eigvalsh(gram)[:, -rank:].clamp_min(0).sum(1))
        if whole or depth >= MAX_DEPTH or (depth >= MIN_DEPTH and _converged(*energies[-3:])):
            break
        extra = min(width, side - gram.shape[1])
        blocks.append(_orthonormal_rows(back(image)[:, :extra], blocks, noise(extra)))

    values, vectors = torch.linalg.eigh(gram)
    s = values[:, -rank:].flip(1).clamp_min(0).sqrt()
    rotation = vectors[:, :, -rank:].flip(2).mT
    v = rotation @ torch.cat(images, 1) if wide else rotation @ torch.cat(blocks, 1).double()
    # Directions without energy have no image to normalise: any orthonormal completion will do.
    lost = s[..., None] <= 1e-6 * s[:, :1, None]
    fill = torch.randn(rank, matrix.k, generator=generator, dtype=torch.float64).to(v)
    v = torch.where(lost, fill, v)
    for _ in range(2):
        v = _cholesky_qr(v)
    return (s * matrix.unit[:, None]).float(), v.float()


def _bordered(gram: Tensor, images: list[Tensor]) -> Tensor:
    """Gram matrix of the rows of all ``images``, float64, from that of all but the last."""
    old = gram.shape[1]
    size = old + images[-1].shape[1]
    out = gram.new_empty(len(gram), size, size)
    out[:, :old, :old] = gram
    start = 0
    for image in images:
        part = slice(start, start := start + image.shape[1])
        product = images[-1] @ image.mT
        out[:, old:, part] = product
        out[:, part, old:] = product.mT
    return out


def _converged(before: Tensor, last: Tensor, now: Tensor) -> bool:
    """Whether the captured energies (batch,) of three successive depths have levelled out, assuming that the
    gains go on shrinking at their present rate."""
    gain, previous = (now - last).clamp_min(0), (last - before).clamp_min(0)
    rate = (gain / previous.clamp_min(1e-300)).clamp(max=0.9)
    return bool((gain * rate / (1 - rate) <= TOLERANCE * now).all())


def _orthonormal_rows(block: Tensor, basis: list[Tensor], noise: Tensor | float) -> Tensor:
    """Rows (batch, b, n) made orthonormal among themselves and to the blocks of ``basis``, float32.

    Noise at the level of float32 rounding stands in for directions that the block lacks (a matrix of low
    rank, a space that is used up), so the Cholesky factor always exists. Twice, because the first pass
    leaves what cancellation uncovers."""
    for again in (False, True):
        for other in basis:
            block = torch.baddbmm(block, block @ other.mT, other, alpha=-1)
        block = block / torch.linalg.vector_norm(block, dim=2, keepdim=True).clamp_min(1e-30)
        if not again:
            block = block + noise * (1e-6 / block.shape[2] ** 0.5)
        block = _cholesky_qr(block.double()).float()
        if not basis:
            break
    return block


def _cholesky_qr(rows: Tensor) -> Tensor:
    """Gram-Schmidt on the rows (batch, b, n) of a float64 tensor. float32 Gram matrices would be unsafe above
    a condition number of 4e3."""
    rows = rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True).clamp_min(1e-300)
    factor = torch.linalg.cholesky(rows @ rows.mT)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False) @ rows


def _checked(weights, row_scales, rank):
    for name, value in (("weights", weights), ("row_scales", row_scales)):
        if not isinstance(value, (Tensor, list, tuple)):
            raise ValueError(f"expected {name} to be a tensor or a sequence of tensors, got {type(value).__name__}")
    if isinstance(weights, Tensor) and weights.dim() != 3:
        raise ValueError(f"expected weights of shape (batch, d, k), got {tuple(weights.shape)}")
    if len(weights) == 0:
        raise ValueError("expected at least one weight, got an empty batch")
    first = weights[0]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape != first.shape:
            raise ValueError(
                f"expected weights of one shape (d, k), got {tuple(first.shape)} and, at {i}, {tuple(weight.shape)}"
            )
        if weight.dtype not in DTYPES or weight.dtype != first.dtype:
            raise ValueError(f"expected weights that are all float32, bfloat16 or float16, got {weight.dtype} at {i}")
        if weight.device != first.device:
            raise ValueError(f"expected weights on one device, got {first.device} and, at {i}, {weight.device}")
    d, k = first.shape
    shapes = {tuple(scale.shape) for scale in row_scales}
    if len(row_scales) != len(weights) or shapes != {(d,)}:
        raise ValueError(
            f"expected row_scales of shape {(len(weights), d)}, got {len(row_scales)} of shape {sorted(shapes)}"
        )
    scales = row_scales if isinstance(row_scales, Tensor) else torch.stack(tuple(row_scales))
    if scales.dtype != torch.float32 or scales.device != first.device:
        raise ValueError(f"expected row_scales in float32 on {first.device}, got {scales.dtype} on {scales.device}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(d, k):
        raise ValueError(f"expected an integer rank from 1 to min(d, k) = {min(d, k)}, got {rank!r}")
    return weights, scales.detach()

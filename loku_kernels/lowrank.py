"""The leading singular values and right singular vectors of diag(row_scales) W, for a batch of weights W.

FILA (LoKU, section 3.3) initialises a LoRA adapter from the SVD of a weight whose rows are scaled by their
Fisher importance. With the row scales s it is diag(s) W = U S V^T. FILA needs only S and V, because
diag(1/s) U S = W V.

The method is randomised block Krylov (Musco and Musco, 2015). For M = diag(s) W and random Omega, it builds
an orthonormal basis of (M M^T) Omega, (M M^T)^2 Omega, ... block by block. It stops when the captured energy
levels out. Three blocks suffice for log-normal scales. A flat spectrum takes more, and the basis is then
restarted from its best vectors (thick restart). So its size is bounded.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from loku_kernels.krylov import KrylovSpace, eigh, eigvalsh
from loku_kernels.logits_blocks import product_dtype
from loku_kernels.tracing import check_not_transformed

OVERSAMPLING = 8  # vectors beyond the rank in a block
MIN_DEPTH = 3  # blocks before convergence is judged
CAPACITY = 6  # blocks that are held at once; with fewer, a flat spectrum takes more depths
MAX_DEPTH = 12  # blocks at most
MAX_PASSES = 4  # passes of orthogonalisation; one or two suffice unless a space is used up
TOLERANCE = 1.5e-3  # estimated share of the energy that Q still misses; V, half a step ahead, misses less
GROUP_BYTES = 8 << 20  # bytes of a group of matrices and their blocks on the CPU: the size of a cache
DEVICE_GROUP_BYTES = 3 << 30  # bytes of the blocks of a group elsewhere: all 128 of 4096 x 4096 at rank 32
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
    Weights narrower than float32 are converted, at most 64 MiB at a time. A GPU multiplies bfloat16 weights
    as they are, by the three bfloat16 parts of each float32 number. TF32 and autocast change nothing.

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
        RuntimeError: A transform of ``torch.func`` or forward mode is active.
    """
    check_not_transformed("row_scaled_svd")
    weights, row_scales = _checked(weights, row_scales, rank)
    (d, k), device = weights[0].shape, weights[0].device
    width, group = rank + OVERSAMPLING, _group_size(device, d, k, rank)
    if device.type != "cpu":
        weights = list(weights)  # a part of the matrices is then taken without a copy
    # Drawn on the CPU, so that every device gets the same numbers.
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(width, max(d, k), generator=generator, device="cpu", dtype=torch.float32).to(device)
    s = torch.empty(len(weights), rank, dtype=torch.float32, device=device)
    v = torch.empty(len(weights), rank, k, dtype=torch.float32, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _float32_products():
        for start in range(0, len(weights), group):
            part = slice(start, start + group)
            s[part], v[part] = _krylov_svd(_ScaledRows(weights[part], row_scales[part]), rank, noise, start)
    return s, v.mT.contiguous()


def _group_size(device: torch.device, d: int, k: int, rank: int) -> int:
    """Choose the number of matrices (d, k) that are decomposed together.

    The CPU takes as many as fit in its cache. Elsewhere the small eigenproblems and Cholesky factors are slow
    one by one, so a group is as large as the memory of its blocks allows.
    """
    width = rank + OVERSAMPLING
    if device.type == "cpu":
        return max(1, GROUP_BYTES // (12 * min(width * MIN_DEPTH, d, k) * (d + k) + 4 * d * k))
    held, temporary = CAPACITY * (4 * d + 8 * k), 24 * (d + k)
    return max(1, DEVICE_GROUP_BYTES // (width * (held + temporary)))


@contextmanager
def _float32_products() -> Iterator[None]:
    """A context in which float32 products are computed in float32, not in TF32 or bfloat16."""
    backends: Any = torch.backends
    with ExitStack() as stack:
        for library in (backends.cuda.matmul, backends.mkldnn.matmul):
            stack.callback(setattr, library, "fp32_precision", library.fp32_precision)
            library.fp32_precision = "ieee"
        yield


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
        first = weights[0]
        self.by_parts = first.dtype == torch.bfloat16 and product_dtype(first) == torch.float32
        if first.dtype != torch.float32 and not self.by_parts:
            if 4 * self.d * self.k > FLOAT32_BYTES:
                self.rows = max(1, FLOAT32_BYTES // (4 * self.k))
            elif self.device.type == "cpu":  # elsewhere a group is larger, and a copy of all of it too large
                weights = weights.float() if isinstance(weights, Tensor) else [w.float() for w in weights]
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    def only(self, indices: list[int]) -> "_ScaledRows":
        """Return some of the matrices, by their ascending indices."""
        if len(indices) == len(self):
            return self
        part = copy.copy(self)
        if isinstance(self.weights, Tensor):
            part.weights = self.weights[indices]
        else:
            part.weights = [self.weights[i] for i in indices]
        part.unit, part.row_scales = self.unit[indices], self.row_scales[indices]
        return part

    def times(self, x: Tensor) -> Tensor:
        """Compute M x (batch, b, d) for x (batch, b, k)."""
        if isinstance(self.weights, Tensor) and self.rows == self.d and not self.by_parts:
            return (x @ self.weights.mT).mul_(self.row_scales)
        out = x.new_empty(*x.shape[:2], self.d)
        if self.by_parts:
            for i, (w, parts) in enumerate(zip(self.weights, _bfloat16_parts(x), strict=True)):
                _sum_of_parts(_wide_product(parts, w.T), out[i])
            return out.mul_(self.row_scales)
        for i, w in enumerate(self.weights):
            for start in range(0, self.d, self.rows):
                part = slice(start, start + self.rows)
                torch.mm(x[i], w[part].float().T, out=out[i, :, part])
        return out.mul_(self.row_scales)

    def transpose_times(self, y: Tensor) -> Tensor:
        """Compute M^T y (batch, b, k) for y (batch, b, d)."""
        y = y * self.row_scales
        if isinstance(self.weights, Tensor) and self.rows == self.d and not self.by_parts:
            return y @ self.weights
        out = y.new_empty(*y.shape[:2], self.k)
        if self.by_parts:
            for i, (w, parts) in enumerate(zip(self.weights, _bfloat16_parts(y), strict=True)):
                _sum_of_parts(_wide_product(parts, w), out[i])
            return out
        for i, w in enumerate(self.weights):
            torch.mm(y[i, :, : self.rows], w[: self.rows].float(), out=out[i])
            for start in range(self.rows, self.d, self.rows):
                part = slice(start, start + self.rows)
                out[i].addmm_(y[i, :, part], w[part].float())
        return out


# A bfloat16 number has 8 significant bits and float32's exponents. So a float32 number is the sum of three of
# them, and the products with a bfloat16 weight are exact in float32. The tensor cores sum them in float32.


def _bfloat16_parts(x: Tensor) -> Tensor:
    """Split x (batch, b, n), float32, into three bfloat16 parts (batch, 3 * b, n), the largest last."""
    largest = x.bfloat16()
    rest = x - largest
    middle = rest.bfloat16()
    return torch.cat([(rest - middle).bfloat16(), middle, largest], 1)


def _sum_of_parts(products: Tensor, out: Tensor) -> None:
    """Add up the products (3 * b, n) of the parts to ``out`` (b, n), the smallest first."""
    smallest, middle, largest = products.chunk(3)
    torch.add(smallest.add_(middle), largest, out=out)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bfloat16 matrices into float32."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _taken(x: Tensor, indices: list[int]) -> Tensor:
    """Return a part of a batch by ascending indices, without a copy if it is all of it."""
    return x if len(indices) == len(x) else x[indices]


def _krylov_svd(matrix: _ScaledRows, rank: int, noise: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Compute S (batch, rank) and V^T (batch, rank, k) of M.

    Args:
        matrix: The matrices M.
        rank: The number of singular values.
        noise: Random numbers (width, max(d, k)), the same for every matrix.
        offset: The index of the first matrix in the caller's batch, for messages.
    """
    width, d = len(noise), matrix.d
    if width * MIN_DEPTH >= min(d, matrix.k):
        return _whole_svd(matrix, rank, noise, offset)
    # The Krylov space holds left vectors Q. V comes from their images M^T Q, half a power step ahead.
    block = matrix.times(matrix.transpose_times(noise[:, :d].expand(len(matrix), -1, -1)))
    _require_finite(block, offset)
    rounding = noise[:, :d].roll(1, 1) * (1e-6 / d**0.5)
    capacity = min(d, width * CAPACITY)
    at_first = min(capacity, width * (MIN_DEPTH + 1))
    space = KrylovSpace(len(matrix), at_first, capacity, d, matrix.k, matrix.device)
    s, v = block.new_empty(len(matrix), rank), block.new_empty(len(matrix), rank, matrix.k)
    places = list(range(len(matrix)))  # of the matrices that are left
    energies: list[Tensor] = []
    for depth in count(1):
        fresh = rounding.roll(depth, 1)[: d - space.size]  # as good as new random numbers
        block = _orthonormal_rows(block[:, : len(fresh)], space.basis, fresh)
        if space.size + len(fresh) > capacity:
            space.restart(capacity - width)
        image = matrix.transpose_times(block)
        space.append(block, image)
        if depth < MIN_DEPTH:
            energies.append(_energy(eigvalsh(space.gram), rank))
            block = matrix.times(image)
            continue
        space.solve()
        energies = [*energies[-2:], _energy(space.values, rank)]
        converged = _converged(*energies).tolist()
        if depth == MAX_DEPTH or all(converged):
            done = list(range(len(places)))
        else:
            done = [i for i in range(len(places)) if converged[i] and _stops_alone(matrix.device)]
        if done:
            there = [places[i] for i in done]
            rotation = _taken(space.vectors, done)[:, :, -rank:].flip(2).mT
            basis, values = rotation @ _taken(space.images, done), _taken(space.values, done)
            part = _from_right_vectors(matrix.only(done), basis, values, noise)
            if len(done) == len(s):
                return part
            s[there], v[there] = part
            left = [i for i in range(len(places)) if i not in done]
            if not left:
                break
            space.keep(left)
            matrix, places = matrix.only(left), [places[i] for i in left]
            image, energies = image[left], [energy[left] for energy in energies]
        block = matrix.times(image)
    return s, v


def _whole_svd(matrix: _ScaledRows, rank: int, noise: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Compute the same from the images of the whole space of the shorter side of M."""
    wide = matrix.d <= matrix.k
    image_of = matrix.transpose_times if wide else matrix.times
    identity = torch.eye(min(matrix.d, matrix.k), dtype=torch.float32, device=matrix.device)
    images = image_of(identity.expand(len(matrix), -1, -1)).double()
    gram = images @ images.mT
    _require_finite(gram, offset)
    values, vectors = eigh(gram)
    rotation = vectors[:, :, -rank:].flip(2).mT
    return _from_right_vectors(matrix, rotation @ images if wide else rotation, values, noise)


def _from_right_vectors(
    matrix: _ScaledRows, v: Tensor, values: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S (batch, rank) and V^T (batch, rank, k) from a basis of the right subspace.

    Args:
        matrix: The matrices M.
        v: The basis (batch, rank, k), float64, not normalised, by descending energy.
        values: The energies (batch, n) of the whole space, ascending; the last ``rank`` are those of ``v``.
        noise: Random numbers (width, max(d, k)).
    """
    rank = v.shape[1]
    # A direction without energy has no image to normalise. Any orthonormal completion will do.
    energy = values[:, -rank:].flip(1)[..., None].clamp_min(0)
    v = torch.where(energy <= 1e-12 * energy[:, :1], noise[:rank, : matrix.k], v)
    for _ in range(2):
        v, _ = _gram_schmidt(v)
    # V is ahead of Q, so the Rayleigh-Ritz step uses V itself.
    image = matrix.times(v.float()).double()
    values, vectors = eigh(image @ image.mT)
    s = values.flip(1).clamp_min(0).sqrt() * matrix.unit[:, None]
    return s.float(), (vectors.flip(2).mT @ v).float()


def _stops_alone(device: torch.device) -> bool:
    """Say whether a matrix stops before its group. A group of the CPU is too small to be taken apart."""
    return device.type != "cpu"


def _energy(values: Tensor, rank: int) -> Tensor:
    """The energy (batch,) of the ``rank`` leading directions, from ascending eigenvalues (batch, n)."""
    return values[:, -rank:].clamp_min(0).sum(1)


def _require_finite(product: Tensor, offset: int) -> None:
    """Raise ``ValueError`` for a matrix with NaN or infinity.

    Each entry of a matrix and of its scales is a part of ``product`` (batch, *, *), so both show there.
    ``offset`` is the index of the first matrix in the caller's batch.
    """
    finite = product.isfinite().all(2).all(1)
    if not finite.all():
        bad = offset + int((~finite).nonzero()[0])
        raise ValueError(f"expected finite weights and row_scales, got others (or too large) in matrix {bad}")


def _converged(before: Tensor, last: Tensor, now: Tensor) -> Tensor:
    """Say which of the captured energies (batch,) of three successive depths have levelled out.

    The estimate of the missing energy assumes that the gains go on shrinking at their present rate.
    """
    gain, previous = (now - last).clamp_min(0), (last - before).clamp_min(0)
    rate = (gain / previous.clamp_min(1e-300)).clamp(max=0.9)
    return gain * rate / (1 - rate) <= TOLERANCE * now


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

"""The growing basis of the row-scaled SVD, and the small eigenproblems in it."""

import torch
from torch import Tensor

# torch before 2.12 solves a batch of eigenproblems on a CUDA device one by one, in about 1 ms each, if they
# are larger than 32 x 32. One core of the host takes 0.7 ms for one of 120 x 120.
_SOLVES_ONE_BY_ONE = torch.version.hip is None and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def solver_device(device: torch.device, size: int) -> torch.device:
    """Choose the device that solves eigenproblems (batch, size, size) of a device."""
    one_by_one = device.type == "cuda" and size > 32 and _SOLVES_ONE_BY_ONE
    return torch.device("cpu") if one_by_one else device


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the ascending eigenvalues (batch, n) and eigenvectors (batch, n, n) of x (batch, n, n)."""
    values, vectors = torch.linalg.eigh(x.to(solver_device(x.device, x.shape[-1])))
    return values.to(x.device), vectors.to(x.device)


def eigvalsh(x: Tensor) -> Tensor:
    """Compute the ascending eigenvalues (batch, n) of x (batch, n, n)."""
    values: Tensor = torch.linalg.eigvalsh(x.to(solver_device(x.device, x.shape[-1])))
    return values.to(x.device)


class KrylovSpace:
    """Subspaces of left vectors, one for each matrix M, with their images M^T Q.

    Args:
        batch: The number of matrices.
        capacity: The number of vectors that there is memory for at first.
        most: The number of vectors that there is memory for when ``capacity`` does not suffice.
        d: The length of a left vector.
        k: The length of an image.
        device: The device of the matrices.
    """

    def __init__(self, batch: int, capacity: int, most: int, d: int, k: int, device: torch.device) -> None:
        self.size, self.most = 0, most
        self._basis = torch.empty(batch, capacity, d, dtype=torch.float32, device=device)
        # Images and their Gram matrix in float64: its eigenvalues are the squares of S.
        self._images = torch.empty(batch, capacity, k, dtype=torch.float64, device=device)
        self._gram = torch.empty(batch, capacity, capacity, dtype=torch.float64, device=device)
        self.values = self.vectors = self._gram[:, :0]  # the Gram matrix's eigenvalues and eigenvectors

    @property
    def basis(self) -> Tensor:
        """The vectors Q (batch, size, d), float32, orthonormal."""
        return self._basis[:, : self.size]

    @property
    def images(self) -> Tensor:
        """The images (batch, size, k) of the vectors, float64."""
        return self._images[:, : self.size]

    @property
    def gram(self) -> Tensor:
        """The Gram matrix (batch, size, size) of the images, float64."""
        return self._gram[:, : self.size, : self.size]

    def append(self, block: Tensor, image: Tensor) -> None:
        """Add vectors (batch, b, d), orthonormal to the held ones, and their images (batch, b, k)."""
        new = slice(self.size, self.size + block.shape[1])
        if new.stop > self._basis.shape[1]:
            self._basis = _grown(self._basis, self.most, block.shape[2])
            self._images = _grown(self._images, self.most, image.shape[2])
            self._gram = _grown(self._gram, self.most, self.most)
        self._basis[:, new], self._images[:, new] = block, image
        self.size = new.stop
        self._gram[:, new, : new.stop] = self._images[:, new] @ self.images.mT
        self._gram[:, : new.start, new] = self._gram[:, new, : new.start].mT

    def solve(self) -> None:
        """Compute the ascending eigenvalues (batch, size) and the eigenvectors of the Gram matrix."""
        self.values, self.vectors = eigh(self.gram)

    def restart(self, size: int) -> None:
        """Keep the ``size`` leading eigenvectors that ``solve`` found, and nothing else."""
        rotation = self.vectors[:, :, -size:].flip(2).mT
        basis, images = rotation.float() @ self.basis, rotation @ self.images
        self.size = size
        self._basis[:, :size], self._images[:, :size] = basis, images
        self._gram[:, :size, :size] = self.values[:, -size:].flip(1).diag_embed()

    def keep(self, indices: list[int]) -> None:
        """Keep the spaces of some of the matrices alone, by their indices."""
        self._basis, self._images, self._gram = (x[indices] for x in (self._basis, self._images, self._gram))
        self.values, self.vectors = self.values[indices], self.vectors[indices]


def _grown(x: Tensor, rows: int, columns: int) -> Tensor:
    """Copy x (batch, a, b) to the begin of a larger tensor (batch, rows, columns)."""
    out = x.new_empty(len(x), rows, columns)
    out[:, : x.shape[1], : x.shape[2]] = x
    return out

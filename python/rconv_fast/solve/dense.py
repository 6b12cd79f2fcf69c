"""Rank-revealing least squares on a dense matrix: what is determined, and the minimum norm for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.solve.rows import System

# A value is determined when its unit vector lies in the row space: the rest has less squared length.
NULL_SPACE_TOLERANCE = 1e-10


@dataclass(frozen=True)
class DenseSolution:
    """Minimum-norm least-squares solution of one dense matrix."""

    x: Tensor
    rank: int
    determined: Tensor
    condition: float


def solve_rank_revealing(matrix: Tensor, rhs: Tensor, rtol: float) -> DenseSolution:
    """``min ||matrix x - rhs||`` by SVD, matrix (m, n), rhs (m, c).

    Singular values below `rtol` of the largest count as 0. A tall or a wide matrix is first reduced to a
    square one by QR.
    """
    m, n = matrix.shape
    if m > n:
        q, triangle = torch.linalg.qr(matrix)
        u, s, vh = torch.linalg.svd(triangle)
        u = q @ u
    elif m < n:
        q, triangle = torch.linalg.qr(matrix.mT)
        u, s, vh = torch.linalg.svd(triangle.mT)
        vh = vh @ q.mT
    else:
        u, s, vh = torch.linalg.svd(matrix)
    rank = int((s > rtol * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    x = vh.mT @ ((u.mT @ rhs) / s[:, None])
    # One step of refinement: the SVD solves to about condition * eps, the given matrix's residual is exact.
    x = x + vh.mT @ ((u.mT @ (rhs - matrix @ x)) / s[:, None])
    determined = (1 - vh.square().sum(dim=0)) < NULL_SPACE_TOLERANCE
    return DenseSolution(x, rank, determined, float(s[0] / s[-1]) if rank else float("inf"))


def normal_matrix(system: System) -> Tensor:
    """``M^T M`` (unknowns, unknowns), column by column from products; 0 for values outside the support."""
    unit = system.rhs[0].new_zeros(system.shape)
    flat = unit.reshape(-1)
    columns = flat.new_zeros(flat.numel(), flat.numel())
    support = None if system.support is None else system.support.reshape(-1).tolist()
    for j in range(flat.numel()):
        if support is not None and not support[j]:
            continue
        flat[j] = 1
        columns[j] = system.adjoint(system.apply(unit)).reshape(-1)
        flat[j] = 0
    return columns


@dataclass(frozen=True)
class PseudoInverse:
    """``(M^T M)^+`` by eigenvectors, its rank, which values lie in its range, and its null space."""

    vectors: Tensor
    values: Tensor
    determined: Tensor
    null: Tensor

    @classmethod
    def create(cls, normal: Tensor) -> PseudoInverse:
        """Eigenvalues below the largest's rounding are 0: singular values below 1e-7 or so of the largest."""
        values, vectors = torch.linalg.eigh(normal)
        kept = values > RANK_ROUNDINGS * torch.finfo(normal.dtype).eps * len(normal) * values[-1]
        null, values, vectors = vectors[:, ~kept], values[kept], vectors[:, kept]
        determined = (1 - vectors.square().sum(dim=1)) < NULL_SPACE_TOLERANCE
        return cls(vectors, values, determined, null)

    @property
    def rank(self) -> int:
        """Number of eigenvalues kept."""
        return len(self.values)

    @property
    def condition(self) -> float:
        """Condition number of M on its row space."""
        return float((self.values[-1] / self.values[0]).sqrt()) if self.rank else float("inf")

    def solve(self, v: Tensor) -> Tensor:
        """Apply it to an unknown-shaped tensor."""
        coefficients = self.vectors.mT @ v.reshape(-1)
        return (self.vectors @ (coefficients / self.values)).reshape(v.shape)


# Eigenvalues of a singular matrix come out at a few roundings of the largest.
RANK_ROUNDINGS = 1.0

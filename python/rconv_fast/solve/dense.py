"""Rank-revealing least squares on a dense matrix: what is determined, and the minimum norm for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.errors import LinAlgError
from rconv_fast.solve.phases.gram import sum_of
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
    """``min ||matrix x - rhs||`` by SVD in float64, matrix (m, n), rhs (m, c).

    Singular values below `rtol` of the largest, or below its rounding, count as 0.
    """
    matrix, rhs, dtype = matrix.double(), rhs.double(), matrix.dtype
    u, s, vh = _thin_svd(matrix)
    smallest = max(rtol, max(matrix.shape) * torch.finfo(s.dtype).eps)
    rank = int((s > smallest * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    x = vh.mT @ ((u.mT @ rhs) / s[:, None])
    # One step of refinement: the SVD solves to about condition * eps, the given matrix's residual is exact.
    x = x + vh.mT @ ((u.mT @ (rhs - matrix @ x)) / s[:, None])
    determined = (1 - vh.square().sum(dim=0)) < NULL_SPACE_TOLERANCE
    return DenseSolution(x.to(dtype), rank, determined, float(s[0] / s[-1]) if rank else float("inf"))


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``u diag(s) vh`` with min(m, n) singular values; a tall or a wide matrix is first made square by QR."""
    m, n = matrix.shape
    if m > n:
        q, triangle = torch.linalg.qr(matrix)
        u, s, vh = torch.linalg.svd(triangle)
        return q @ u, s, vh
    if m < n:
        q, triangle = torch.linalg.qr(matrix.mT)
        u, s, vh = torch.linalg.svd(triangle.mT)
        return u, s, vh @ q.mT
    u, s, vh = torch.linalg.svd(matrix)
    return u, s, vh


def normal_matrix(system: System) -> Tensor:
    """``M^T M`` (n, n), n all values of x."""
    return sum_of(block.normal() for block in system.blocks)


def row_matrix(system: System, free: Tensor) -> Tensor:
    """M on the values that `free` marks, (rows that are not 0, n), row by row from products."""
    units = [torch.zeros_like(part) for part in system.rhs]
    rows = []
    for unit in units:
        flat = unit.view(-1)
        for i in range(flat.numel()):
            flat[i] = 1
            row = system.adjoint(units).reshape(-1)[free]
            flat[i] = 0
            if bool(row.any()):
                rows.append(row)
    return torch.stack(rows) if rows else units[0].new_zeros(0, int(free.sum()))


# Eigenvalues and eigenvectors take about ten n^3 flops, at a rate that one core reaches.
EIGEN_FLOPS, FLOPS_A_SECOND = 10.0, 5e9


def eigen_seconds(n: int) -> float:
    """How long the eigenvalues and eigenvectors of an (n, n) matrix take."""
    return EIGEN_FLOPS * n**3 / FLOPS_A_SECOND


def _eigen(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a positive semidefinite matrix."""
    try:
        values, vectors = torch.linalg.eigh(normal)
    except LinAlgError:  # LAPACK gives up on some with many equal values
        _, singular, vh = torch.linalg.svd(normal)
        values, vectors = singular.flip(0), vh.mT.flip(1)
    return values, vectors


def free_values(system: System) -> tuple[Tensor, Tensor]:
    """Bool, one a value of x: those not known to be 0; of them those that some equation holds."""
    touched = (system.diagonal() > 0).expand(system.shape).reshape(-1)
    support = torch.ones_like(touched) if system.support is None else system.support.reshape(-1)
    return support, touched & support


def null_basis(vectors: Tensor, support: Tensor, free: Tensor) -> Tensor:
    """The columns of `vectors`, null vectors on the free values, and a unit vector a value that no equation holds."""
    untouched = (support & ~free).nonzero().flatten()
    inside = vectors.shape[1]
    null: Tensor = vectors.new_zeros(len(support), inside + len(untouched))
    null[free, :inside] = vectors
    null[untouched, torch.arange(inside, null.shape[1], device=null.device)] = 1
    return null


# M has so few rows for its columns that its singular values cost less than the eigenvalues of M^T M.
WIDE = 0.6


@dataclass(frozen=True)
class PseudoInverse:
    """``(M^T M)^+`` by eigenvectors.

    Attributes
    ----------
    vectors, values : Tensor
        Eigenvectors, (n, rank), and eigenvalues of ``M^T M`` that are not 0, on the n values of `free`.
    support, free : Tensor
        Bool, one a value of x: not known to be 0; and, of those, in some equation.
    """

    vectors: Tensor
    values: Tensor
    support: Tensor
    free: Tensor

    @classmethod
    def create(cls, system: System) -> PseudoInverse:
        """Eigenvalues below the largest's rounding are 0: singular values below 1e-7 or so of the largest."""
        support, free = free_values(system)
        if system.count < WIDE * int(free.sum()):
            _, singular, vh = _thin_svd(row_matrix(system, free))
            values, vectors = singular.square().flip(0), vh.mT.flip(1)
        else:
            values, vectors = _eigen(normal_matrix(system)[free][:, free])
        rounding = RANK_ROUNDINGS * torch.finfo(values.dtype).eps * len(vectors)
        kept = values > rounding * (values[-1] if len(values) else 0.0)
        return cls(vectors[:, kept], values[kept], support, free)

    @property
    def rank(self) -> int:
        """Number of eigenvalues kept."""
        return len(self.values)

    @property
    def condition(self) -> float:
        """Condition number of M on its row space."""
        return float((self.values[-1] / self.values[0]).sqrt()) if self.rank else float("inf")

    @property
    def determined(self) -> Tensor:
        """Bool, one a value of x: known to be 0, or in the row space."""
        determined = ~self.support
        determined[self.free] = (1 - self.vectors.square().sum(dim=1)) < NULL_SPACE_TOLERANCE
        return determined

    @property
    def null(self) -> Tensor:
        """Orthonormal basis of what the equations leave open, (values of x, support - rank)."""
        q, _ = torch.linalg.qr(self.vectors, mode="complete")
        return null_basis(q[:, self.rank :], self.support, self.free)

    def solve(self, v: Tensor) -> Tensor:
        """Apply it to a tensor of x's shape."""
        flat = v.reshape(-1)
        solved = torch.zeros_like(flat)
        solved[self.free] = self.vectors @ ((self.vectors.mT @ flat[self.free]) / self.values)
        return solved.reshape(v.shape)


# Eigenvalues of a singular matrix come out at a few roundings of the largest.
RANK_ROUNDINGS = 1.0

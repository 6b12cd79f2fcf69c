"""Rank-revealing least squares on a dense matrix: what is determined, and the minimum norm for the rest."""

from __future__ import annotations

import math
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

    Singular values below `rtol` of the largest count as 0.
    """
    u, s, vh = _thin_svd(matrix)
    rank = int((s > rtol * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    x = vh.mT @ ((u.mT @ rhs) / s[:, None])
    # One step of refinement: the SVD solves to about condition * eps, the given matrix's residual is exact.
    x = x + vh.mT @ ((u.mT @ (rhs - matrix @ x)) / s[:, None])
    determined = (1 - vh.square().sum(dim=0)) < NULL_SPACE_TOLERANCE
    return DenseSolution(x, rank, determined, float(s[0] / s[-1]) if rank else float("inf"))


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
    """``M^T M`` on the support, (n, n), column by column from products."""
    free = _support(system).nonzero().flatten()
    unit = system.rhs[0].new_zeros(system.shape)
    flat = unit.reshape(-1)
    columns = flat.new_empty(len(free), len(free))
    for row, j in enumerate(free.tolist()):
        flat[j] = 1
        columns[row] = system.adjoint(system.apply(unit)).reshape(-1)[free]
        flat[j] = 0
    return columns


def row_matrix(system: System) -> Tensor:
    """M on the support, (rows that are not 0, n), row by row from products."""
    free = _support(system).nonzero().flatten()
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
    return torch.stack(rows) if rows else units[0].new_zeros(0, len(free))


def _support(system: System) -> Tensor:
    """Bool, one a value: not known to be 0."""
    if system.support is None:
        return torch.ones(math.prod(system.shape), dtype=torch.bool, device=system.rhs[0].device)
    return system.support.reshape(-1)


# M has so few rows for its columns that its singular values cost less than the eigenvalues of M^T M.
WIDE = 0.6


@dataclass(frozen=True)
class PseudoInverse:
    """``(M^T M)^+`` on the support, by eigenvectors.

    Attributes
    ----------
    vectors, values : Tensor
        Eigenvectors, (support, rank), and eigenvalues of ``M^T M`` that are not 0.
    support : Tensor
        Bool, one a value of x: not known to be 0.
    """

    vectors: Tensor
    values: Tensor
    support: Tensor

    @classmethod
    def create(cls, system: System) -> PseudoInverse:
        """Eigenvalues below the largest's rounding are 0: singular values below 1e-7 or so of the largest."""
        if system.count < WIDE * system.unknowns:
            _, singular, vh = _thin_svd(row_matrix(system))
            values, vectors = singular.square().flip(0), vh.mT.flip(1)
        else:
            values, vectors = torch.linalg.eigh(normal_matrix(system))
        rounding = RANK_ROUNDINGS * torch.finfo(values.dtype).eps * system.unknowns
        kept = values > rounding * (values[-1] if len(values) else 0.0)
        return cls(vectors[:, kept], values[kept], _support(system))

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
        determined[self.support] = (1 - self.vectors.square().sum(dim=1)) < NULL_SPACE_TOLERANCE
        return determined

    @property
    def null(self) -> Tensor:
        """Orthonormal basis of what the equations leave open, (values of x, support - rank)."""
        q, _ = torch.linalg.qr(self.vectors, mode="complete")
        null: Tensor = q.new_zeros(len(self.support), q.shape[1] - self.rank)
        null[self.support] = q[:, self.rank :]
        return null

    def solve(self, v: Tensor) -> Tensor:
        """Apply it to a tensor of x's shape."""
        flat = v.reshape(-1)
        solved = torch.zeros_like(flat)
        solved[self.support] = self.vectors @ ((self.vectors.mT @ flat[self.support]) / self.values)
        return solved.reshape(v.shape)


# Eigenvalues of a singular matrix come out at a few roundings of the largest.
RANK_ROUNDINGS = 1.0

"""A normal matrix with no or few null vectors, by Cholesky factors: thirty times cheaper than all its eigenvalues.

Null vectors V of ``N = M^T M`` come from inverse iteration with a factor of ``N + s``, s a few roundings of N. That
there are no others is proven by a factor of ``N + c V V^T - s``: it exists only if that matrix is positive definite.
The pseudo-inverse is then ``P (N + c V V^T)^-1 P``, ``P = 1 - V V^T`` (Golub and Van Loan 2013, sections 4.2 and 8.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.solve.dense import NULL_SPACE_TOLERANCE, free_values, normal_matrix, null_basis
from rconv_fast.solve.phases.gram import gram_condition
from rconv_fast.solve.rows import System

# The normal matrix and its factors are known to a few times n roundings of its norm.
SHIFT_ROUNDINGS = 10
# Null vectors looked for, and steps until they are found: where they stand out, each step gains many digits.
MAX_NULL, STEPS = 32, 4


@dataclass(frozen=True)
class DeflatedInverse:
    """``(M^T M)^+`` by a factor.

    Attributes
    ----------
    factor : Tensor, shape (n, n)
        Of ``N + c V V^T - s`` on the n values of `free`, lower.
    vectors : Tensor, shape (n, d)
        V, orthonormal.
    support, free : Tensor
        As in `rconv_fast.solve.dense.PseudoInverse`.
    condition : float
        Condition number of M on its row space.
    """

    factor: Tensor
    vectors: Tensor
    support: Tensor
    free: Tensor
    condition: float

    @classmethod
    def create(cls, system: System) -> DeflatedInverse | None:
        """None where more null vectors may be left than were looked for."""
        support, free = free_values(system)
        n = int(free.sum())
        if n - system.count >= MAX_NULL:
            return None
        normal = normal_matrix(system)[free][:, free]
        size = float(normal.abs().sum(dim=0).max())
        shift = SHIFT_ROUNDINGS * n * torch.finfo(normal.dtype).eps * size
        vectors = normal.new_empty(n, 0)
        factor = _factor(normal, -shift)
        if factor is None:
            vectors = _null_vectors(normal, shift)
            if vectors.shape[1] in (0, MAX_NULL):
                return None
            factor = _factor(normal + float(normal.diagonal().mean()) * vectors @ vectors.mT, -shift)
        if factor is None:
            return None
        found = cls(factor, vectors, support, free, 1.0)
        condition = float(gram_condition(normal, found.solve_free))
        return cls(factor, vectors, support, free, condition)

    @property
    def rank(self) -> int:
        """Of M."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    @property
    def determined(self) -> Tensor:
        """Bool, one a value of x: known to be 0, or in the row space."""
        determined = ~self.support
        determined[self.free] = self.vectors.square().sum(dim=1) < NULL_SPACE_TOLERANCE
        return determined

    @property
    def null(self) -> Tensor:
        """Orthonormal basis of what the equations leave open, (values of x, support - rank)."""
        return null_basis(self.vectors, self.support, self.free)

    def solve_free(self, v: Tensor) -> Tensor:
        """Apply it to columns of free values."""
        solved = torch.cholesky_solve(v - self.vectors @ (self.vectors.mT @ v), self.factor)
        return solved - self.vectors @ (self.vectors.mT @ solved)

    def solve(self, v: Tensor) -> Tensor:
        """Apply it to a tensor of x's shape."""
        flat = v.reshape(-1)
        solved = torch.zeros_like(flat)
        solved[self.free] = self.solve_free(flat[self.free, None]).squeeze(1)
        return solved.reshape(v.shape)


def _factor(matrix: Tensor, shift: float) -> Tensor | None:
    """Lower Cholesky factor of ``matrix + shift``, None where there is none."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted)
    return factor if int(info) == 0 else None  # synchronize!


def _null_vectors(normal: Tensor, shift: float) -> Tensor:
    """Orthonormal eigenvectors of eigenvalues up to `shift`, `MAX_NULL` at the most."""
    factor = _factor(normal, shift)
    n = len(normal)
    if factor is None:
        return normal.new_empty(n, 0)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, min(MAX_NULL, n), generator=generator, dtype=torch.float64).to(normal)
    for _ in range(STEPS):
        v, _ = torch.linalg.qr(torch.cholesky_solve(v, factor))
    values, turned = torch.linalg.eigh(v.mT @ normal @ v)
    null: Tensor = (v @ turned)[:, values <= shift]
    return null

"""An information matrix, factored once: its inverse as preconditioner, as error bars, and to draw errors from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.errors import LinAlgError

# A direction with this share of its value's information or less says nothing; it is open.
OPEN = 1e-12
# With the shift by OPEN alone a fully open value would have the variance 1 / OPEN.
OPEN_VARIANCE = 1e-3 / OPEN


@dataclass(frozen=True)
class Information:
    """``F`` (n, n) about an input of some shape, scaled to unit diagonal and factored: ``D^-1 F D^-1 + shift = L L^T``.

    Attributes
    ----------
    shape : torch.Size
        Of the input.
    size : Tensor
        D, (n,).
    factor : Tensor
        L, (n, n), lower triangular.
    inverse : Tensor
        ``F^-1`` (n, n).
    is_open : Tensor
        Bool (n,): values that the gradients do not fix.
    """

    shape: torch.Size
    size: Tensor
    factor: Tensor
    inverse: Tensor
    is_open: Tensor

    @classmethod
    def create(cls, fisher: Tensor, shape: Sequence[int]) -> Information:
        """Factor F."""
        size = fisher.diagonal().clamp_min(0).sqrt()
        live = size > math.sqrt(OPEN) * float(size.max())
        size = torch.where(live, size, 1.0)
        scaled = fisher / size[:, None] / size
        scaled.diagonal()[~live] = 1.0
        factor = _cholesky(scaled)
        inverse = torch.cholesky_inverse(factor)
        is_open = ~live | (inverse.diagonal() > OPEN_VARIANCE)
        return cls(torch.Size(shape), size, factor, inverse / size[:, None] / size, is_open)

    def solve(self, v: Tensor) -> Tensor:
        """``F^-1 v``, v of the input's shape."""
        solved: Tensor = self.inverse @ v.reshape(-1)
        return solved.reshape(self.shape)

    @property
    def variance(self) -> Tensor:
        """``diag F^-1``, inf where open, of the input's shape."""
        return self.inverse.diagonal().clamp_min(0).masked_fill(self.is_open, math.inf).reshape(self.shape)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Errors with the covariance ``F^-1``, (count, *shape); open directions are left out."""
        white = torch.randn(len(self.size), count, generator=generator, dtype=torch.float64).to(self.factor)
        errors = torch.linalg.solve_triangular(self.factor.mT, white, upper=True) / self.size[:, None]
        closed: Tensor = errors.masked_fill(self.is_open[:, None], 0.0)
        return closed.mT.reshape(count, *self.shape)


def _cholesky(matrix: Tensor) -> Tensor:
    """Of a matrix with unit diagonal that rounding may have made slightly indefinite."""
    shift = OPEN
    while shift < 1:
        factor, failed = torch.linalg.cholesky_ex(matrix + shift * torch.eye(len(matrix)).to(matrix))
        if not bool(failed):
            root: Tensor = factor
            return root
        shift *= 10
    raise LinAlgError("Information: F is no matrix of squares; its values left float64")

"""Random combinations of equations: a few dense rows that stand for many where those have little to add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.solve.rows import GradientRows, Rows

# Rows of a sketch for each unknown of a sample's edge, sqrt(unknowns): the directions that a nearly square
# convolution leaves nearly open live at the border of the picture.
ROWS_PER_EDGE = 1.0

# Combinations are formed so many at a time, as a convolution has an overhead but falls out of the cache.
MAX_TOGETHER, UNKNOWNS_TOGETHER = 8, 100_000


def sketch_size(shape: torch.Size) -> int:
    """How many combinations a system of this shape (B, C, *in) needs."""
    return shape[0] * math.ceil(ROWS_PER_EDGE * math.sqrt(math.prod(shape[1:])))


@dataclass(frozen=True)
class SketchRows:
    """Dense rows ``U x = rhs``, ``U = S M / sqrt(k)`` with Gaussian S of k rows; matrix: U, (k, B, C, *in)."""

    matrix: Tensor
    rhs: Tensor

    @classmethod
    def create(cls, blocks: Sequence[Rows], shape: torch.Size, like: Tensor) -> SketchRows:
        """Combine the rows of all blocks, if any, in the dtype of `like`; never more combinations than rows."""
        size = min(sketch_size(shape), sum(block.count for block in blocks))
        generator = torch.Generator().manual_seed(0)
        matrix, rhs = like.new_zeros(size, *shape), like.new_zeros(size)
        step = max(1, min(MAX_TOGETHER, UNKNOWNS_TOGETHER // math.prod(shape)))
        for block in blocks:
            for u, b in zip(matrix.split(step), rhs.split(step), strict=True):
                s = torch.randn(len(b), *block.rhs.shape, generator=generator).to(like) / math.sqrt(size)
                u += _adjoints(block, s)
                b += s.flatten(1) @ block.rhs.flatten()
        return cls(matrix, rhs)

    @property
    def count(self) -> int:
        """Number of combinations."""
        return len(self.rhs)

    def apply(self, x: Tensor) -> Tensor:
        """``U x``."""
        return self.matrix.flatten(1) @ x.flatten()

    def adjoint(self, y: Tensor) -> Tensor:
        """``U^T y``."""
        return (y @ self.matrix.flatten(1)).view(self.matrix.shape[1:])

    def diagonal(self) -> Tensor:
        """Squared norms of the columns."""
        return self.matrix.square().sum(dim=0)

    def normal(self) -> Tensor:
        """``U^T U``."""
        return self.matrix.flatten(1).mT @ self.matrix.flatten(1)

    def scaled(self, factor: float) -> SketchRows:
        """The block times `factor`."""
        return SketchRows(self.matrix * factor, self.rhs * factor)

    def to(self, dtype: torch.dtype) -> SketchRows:
        """The block in another dtype."""
        return SketchRows(self.matrix.to(dtype), self.rhs.to(dtype))


def _adjoints(block: Rows, s: Tensor) -> Tensor:
    """``M^T`` times each of s."""
    return block.adjoints(s) if isinstance(block, GradientRows) else torch.stack([block.adjoint(y) for y in s])

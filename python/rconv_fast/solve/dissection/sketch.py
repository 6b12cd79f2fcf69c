"""Random combinations of equations: a few dense rows that stand for many where those have little to add."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection.border import is_square, open_directions, winds
from rconv_fast.solve.rows import GradientRows, Rows, WeightRows

# Rows of a sketch for each unknown of a sample's edge, sqrt(unknowns): the directions that a nearly square
# convolution leaves nearly open live at the border of the picture. Where they can be counted, so many for each and some
# more; they grow from one border to the other, and with fewer outputs than that they have not grown far.
ROWS_PER_EDGE, ROWS_PER_DIRECTION, MORE_ROWS, FEW_OUTPUTS = 1.0, 1.2, 50, 32

# Combinations are formed so many at a time, as a convolution has an overhead but falls out of the cache.
MAX_TOGETHER, UNKNOWNS_TOGETHER = 28, 100_000


def sketch_size(rows: WeightRows) -> int:
    """How many combinations of other rows complete these."""
    g = rows.geometry
    needed = math.ceil(ROWS_PER_EDGE * math.sqrt(g.in_channels * g.n_input))
    if is_square(g) and max(g.out_size) > FEW_OUTPUTS:
        needed = max(needed, math.ceil(ROWS_PER_DIRECTION * open_directions(g, rows.weight)) + MORE_ROWS)
    return len(rows.rhs) * needed


def leaves_open(geometry: ConvGeometry, weight: Tensor) -> bool:
    """Whether a large square convolution is known to leave directions nearly open."""
    return max(geometry.out_size) > FEW_OUTPUTS and winds(geometry, weight)


def are_few(blocks: Sequence[Rows], size: int) -> bool:
    """Whether the rows take no more memory than a sketch of this size, of which also the rows are kept."""
    return sum(block.rhs.numel() for block in blocks) <= 2 * size


def each_row(blocks: Sequence[Rows], together: int) -> Iterator[Tensor]:
    """The rows themselves as dense vectors, (n, B, C, *in) with n up to `together`."""
    for block in blocks:
        if isinstance(block, SketchRows):
            yield from block.matrix.split(together)
            continue
        size = block.rhs.numel()
        for first in range(0, size, together):
            last = min(first + together, size)
            yield block.dense(first, last) if isinstance(block, GradientRows) else _some_rows(block, first, last)


def _some_rows(block: Rows, first: int, last: int) -> Tensor:
    index = torch.arange(first, last, device=block.rhs.device)
    units = torch.nn.functional.one_hot(index, block.rhs.numel()).to(block.rhs)
    return _adjoints(block, units.view(len(index), *block.rhs.shape))


@dataclass(frozen=True)
class SketchRows:
    """Dense rows ``U x = rhs``, ``U = S M / sqrt(k)`` with Gaussian S of k rows; matrix: U, (k, B, C, *in)."""

    matrix: Tensor
    rhs: Tensor

    @classmethod
    def create(cls, blocks: Sequence[Rows], size: int, shape: torch.Size, like: Tensor) -> SketchRows:
        """Combine the rows of all blocks, if any, in the dtype of `like`; never more combinations than rows."""
        size = min(size, sum(block.count for block in blocks))
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
    if isinstance(block, GradientRows):
        return block.adjoints(s)
    return torch.stack([block.adjoint(y) for y in s])

"""Blocks of equations of linear maps that are known by their products only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rconv_fast.solve.rows import Rows


@dataclass(frozen=True)
class MapRows:
    """Rows of any other linear map (average pooling, padding), given as a function and its adjoint."""

    forward: Callable[[Tensor], Tensor]
    shape: torch.Size
    row_weight: Tensor
    rhs: Tensor

    @classmethod
    def create(
        cls, forward: Callable[[Tensor], Tensor], shape: torch.Size, value: Tensor, row_weight: Tensor
    ) -> MapRows:
        """Rows ``w forward(x) = w value`` for x of the given shape."""
        return cls(forward, shape, row_weight, torch.where(row_weight > 0, value, 0.0) * row_weight)

    @cached_property
    def count(self) -> int:
        """Known outputs of the map."""
        return int((self.row_weight > 0).sum())

    def apply(self, x: Tensor) -> Tensor:
        """``w M x``."""
        with torch.no_grad():  # the map may hold the model's parameters
            return self.forward(x) * self.row_weight

    def adjoint(self, y: Tensor) -> Tensor:
        """``M^T w y``."""
        with torch.enable_grad():
            x = y.new_zeros(self.shape).requires_grad_()
            (gradient,) = torch.autograd.grad(self.forward(x), x, y * self.row_weight)
        return gradient

    def diagonal(self) -> Tensor:
        """The mean of the diagonal, by random signs."""
        return mean_diagonal(self, self.shape, self.rhs)

    def normal(self) -> Tensor:
        """``M^T w^2 M``, column by column."""
        return normal_by_columns(self, self.shape, self.rhs)

    def scaled(self, factor: float) -> MapRows:
        """The block times `factor`."""
        return replace(self, row_weight=self.row_weight * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> MapRows:
        """The block in another dtype; the map, which may hold parameters, is computed in its own."""
        own = self.rhs.dtype
        return MapRows(
            lambda x: self.forward(x.to(own)).to(dtype), self.shape, self.row_weight.to(dtype), self.rhs.to(dtype)
        )


@dataclass(frozen=True)
class ThroughRows:
    """Rows ``R y = r`` of a tensor ``y = J x + c``, as rows of x: ``R J x = r - R c``; J is known by products."""

    block: Rows
    shape: torch.Size
    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    rhs: Tensor

    @classmethod
    def create(
        cls,
        block: Rows,
        shape: torch.Size,
        forward: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        constant: Tensor,
    ) -> ThroughRows:
        """`forward` is J for x of the given shape, `back` its transpose, `constant` c."""
        return cls(block, shape, forward, back, block.rhs - block.apply(constant))

    @property
    def count(self) -> int:
        """Rows of the block."""
        return self.block.count

    def apply(self, x: Tensor) -> Tensor:
        """``R J x``."""
        return self.block.apply(self.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """``J^T R^T y``."""
        return self.back(self.block.adjoint(y))

    def diagonal(self) -> Tensor:
        """The mean of the diagonal, by random signs."""
        return mean_diagonal(self, self.shape, self.rhs)

    def normal(self) -> Tensor:
        """``J^T R^T R J``, column by column."""
        return normal_by_columns(self, self.shape, self.rhs)

    def scaled(self, factor: float) -> ThroughRows:
        """The block times `factor`."""
        return replace(self, block=self.block.scaled(factor), rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> ThroughRows:
        """The block in another dtype; J is computed in its own."""
        own = self.rhs.dtype
        return ThroughRows(
            self.block.to(dtype),
            self.shape,
            lambda x: self.forward(x.to(own)).to(dtype),
            lambda y: self.back(y.to(own)).to(dtype),
            self.rhs.to(dtype),
        )


def mean_diagonal(block: Rows, shape: torch.Size, like: Tensor) -> Tensor:
    """The mean of the diagonal of ``M^T M``: ``E ||M v||^2 / n`` over random signs v."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, shape, generator=generator).to(like) * 2 - 1
    return block.apply(signs).square().sum() / signs.numel()


def normal_by_columns(block: Rows, shape: torch.Size, like: Tensor) -> Tensor:
    """``M^T M`` (n, n) of a block for unknowns of this shape, from one product with each unit vector."""
    units = torch.eye(math.prod(shape), dtype=like.dtype, device=like.device)
    return torch.stack([block.adjoint(block.apply(unit.view(shape))).flatten() for unit in units])

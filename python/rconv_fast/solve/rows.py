"""The equations of one layer input ``x (B, C, *in)``, as blocks of rows ``M x = b`` without the matrix.

Every block offers the same six things: ``apply`` (``M x``), ``adjoint`` (``M^T y``), ``diagonal`` (of ``M^T M``),
``normal`` (``M^T M`` itself, for small unknowns), ``rhs`` (``b``) and ``count``; ``scaled`` and ``to`` give the block
times a number and in another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.phases.gram import input_gram


class Rows(Protocol):
    """One block of equations ``M x = rhs``."""

    @property
    def rhs(self) -> Tensor:
        """Right-hand side."""

    @property
    def count(self) -> int:
        """Number of equations that say something."""

    def apply(self, x: Tensor) -> Tensor:
        """``M x``, in the shape of ``rhs``."""

    def adjoint(self, y: Tensor) -> Tensor:
        """``M^T y``, in the shape of the unknown."""

    def diagonal(self) -> Tensor:
        """Diagonal of ``M^T M``, in a shape that broadcasts to the unknown's."""

    def normal(self) -> Tensor:
        """``M^T M`` (n, n), n all values of the unknown."""

    def scaled(self, factor: float) -> Rows:
        """The block times `factor`, on both sides."""

    def to(self, dtype: torch.dtype) -> Rows:
        """The block in another dtype."""


@dataclass(frozen=True)
class GradientRows:
    """Gradient constraints ``dW[f,c,k] = sum_{b,u} g[b,f,u] x[b,c,i]`` (R-CONV, equation 11).

    `grad_output` and `rhs` are scaled filter by filter to the same rounding: the filters of one layer differ by orders
    of magnitude, and the relative rounding of each ``dW[f]`` is the same. So is that of ``g_f``, unless it passed a
    saturated activation.
    """

    geometry: ConvGeometry
    grad_output: Tensor
    rhs: Tensor

    @classmethod
    def create(
        cls, geometry: ConvGeometry, grad_weight: Tensor, grad_output: Tensor, noise: Tensor | None = None
    ) -> GradientRows:
        """Scale the rows of each filter to unit noise; filters without gradient become empty rows.

        The noise of `grad_output`, in roundings and element by element, is at least its size (and that if not given).
        """
        scale = cls.scales(grad_output if noise is None else noise)
        spatial = (1,) * geometry.ndim
        return cls(
            geometry,
            grad_output * scale.reshape(1, -1, *spatial),
            grad_weight.to(scale.dtype, copy=True).mul_(scale.reshape(-1, 1, *spatial)),  # one copy, not two
        )

    @staticmethod
    def scales(noise: Tensor) -> Tensor:
        """One over the norm of each filter's part of (B, F, ...), 0 where that is 0: (F,)."""
        norm = noise.transpose(0, 1).flatten(1).norm(dim=1)
        return torch.where(norm > 0, 1 / norm, 0.0).nan_to_num(0.0, 0.0, 0.0)

    @cached_property
    def live_filters(self) -> Tensor:
        """Which filters have a gradient at all, (F,) bool."""
        return self.grad_output.transpose(0, 1).flatten(1).any(dim=1)

    @cached_property
    def count(self) -> int:
        """Rows of the live filters, for all channels."""
        return int(self.live_filters.sum()) * self.geometry.n_taps * self.geometry.in_channels // self.geometry.groups

    def apply(self, x: Tensor) -> Tensor:
        """``B x``."""
        return apply_gradient(self.geometry, x, self.grad_output)

    def adjoint(self, y: Tensor) -> Tensor:
        """``B^T y``."""
        return apply_weight_adjoint(self.geometry, self.grad_output, y)

    def adjoints(self, y: Tensor) -> Tensor:
        """``B^T y`` of each y, (n, F, C/groups, *K) -> (n, B, C, *in), by one convolution of n C channels."""
        g, n = self.geometry, len(y)
        merged = apply_weight_adjoint(
            replace(g, in_channels=n * g.in_channels), self.grad_output, y.transpose(0, 1).flatten(1, 2)
        )
        split = merged.reshape(len(merged), g.groups, n, g.in_channels // g.groups, *g.input_size)
        return split.movedim(2, 0).flatten(2, 3)

    def dense(self, first: int, last: int) -> Tensor:
        """Some of the rows as vectors, (n, B, C, *in): g of a filter at the places of a tap, 0 elsewhere."""
        g, (per_group, *kernel) = self.geometry, self.rhs.shape[1:]
        inputs = tuple(slice(p, p + size) for p, size in zip(g.padding, g.input_size, strict=True))
        everywhere = (slice(None),)
        widened = [size + 2 * p for p, size in zip(g.padding, g.input_size, strict=True)]
        rows = self.rhs.new_zeros(last - first, len(self.grad_output), g.in_channels, *widened)
        for row, index in zip(rows, range(first, last), strict=True):
            f, c, *taps = np.unravel_index(index, (g.out_channels, per_group, *kernel))
            places = tuple(
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip(map(int, taps), g.dilation, g.out_size, g.stride, strict=True)
            )
            channel = int(f) * g.groups // g.out_channels * per_group + int(c)
            row[:, channel][everywhere + places] = self.grad_output[:, int(f)]
        return rows[everywhere * 3 + inputs]

    def diagonal(self) -> Tensor:
        """``sum_{f,k} g[b,f,u]^2``: the same for all channels of a group."""
        geometry = replace(self.geometry, in_channels=self.geometry.groups)
        ones = self.rhs.new_ones(geometry.out_channels, 1, *geometry.kernel_size)
        per_group = apply_weight_adjoint(geometry, self.grad_output.square(), ones)
        return per_group.repeat_interleave(self.geometry.in_channels // self.geometry.groups, dim=1)

    def normal(self) -> Tensor:
        """``B^T B``: 0 between two channels, the same for all channels of a group."""
        batch, channels, n = len(self.grad_output), self.geometry.in_channels, self.geometry.n_input
        per_group = channels // self.geometry.groups
        total = self.rhs.new_zeros(batch, channels, n, batch, channels, n)
        for group in range(self.geometry.groups):
            gram = input_gram(self.geometry, self.grad_output, group).view(batch, n, batch, n)
            for channel in range(group * per_group, (group + 1) * per_group):
                total[:, channel, :, :, channel] = gram
        return total.view(batch * channels * n, -1)

    def scaled(self, factor: float) -> GradientRows:
        """The block times `factor`."""
        return replace(self, grad_output=self.grad_output * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> GradientRows:
        """The block in another dtype."""
        return replace(self, grad_output=self.grad_output.to(dtype), rhs=self.rhs.to(dtype))


def gradient_part(block: Rows) -> GradientRows | None:
    """The gradient constraints that a block is, or that it would be if g did not depend on x (its ``main``)."""
    main = getattr(block, "main", block)
    return main if isinstance(main, GradientRows) else None


# Columns of a normal matrix that are computed by one convolution.
COLUMNS_TOGETHER = 512


@dataclass(frozen=True)
class WeightRows:
    """Weight constraints ``w (o - bias) = w A x`` (R-CONV, section 4); ``row_weight`` w: 0 for unknown o."""

    geometry: ConvGeometry
    stored: Tensor
    row_weight: Tensor
    rhs: Tensor

    @cached_property
    def weight(self) -> Tensor:
        """The layer's weight in the precision of the rows; a large one is converted only if a product needs it."""
        return self.stored.to(self.rhs.dtype)

    @classmethod
    def create(cls, geometry: ConvGeometry, weight: Tensor, output: Tensor, row_weight: Tensor) -> WeightRows:
        """`output` is the pre-activation without bias, read only where `row_weight` is positive."""
        rhs = torch.where(row_weight > 0, output, 0.0) * row_weight
        return cls(geometry, weight, row_weight, rhs)

    @cached_property
    def uniform(self) -> bool:
        """Whether all outputs are known and count the same, so that all samples share one matrix."""
        first = self.row_weight.flatten()[0]
        return bool(first > 0) and bool((self.row_weight == first).all())

    @cached_property
    def count(self) -> int:
        """Known outputs."""
        return int((self.row_weight > 0).sum())

    def apply(self, x: Tensor) -> Tensor:
        """``w A x``."""
        return apply_weight(self.geometry, x, self.weight).mul_(self.row_weight)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T w y``."""
        return apply_weight_adjoint(self.geometry, y * self.row_weight, self.weight)

    def diagonal(self) -> Tensor:
        """``sum_{f,u} W[f,c,k]^2 w[b,f,u]^2``."""
        return apply_weight_adjoint(self.geometry, self.row_weight.square(), self.weight.square())

    def normal(self) -> Tensor:
        """``A^T w^2 A``, no sample with another, some columns at a time."""
        batch, size = len(self.row_weight), (self.geometry.in_channels, *self.geometry.input_size)
        n = math.prod(size)
        total = self.rhs.new_zeros(batch, n, batch, n)
        for first in range(0, n, COLUMNS_TOGETHER):
            columns = slice(first, min(first + COLUMNS_TOGETHER, n))
            units = self.rhs.new_zeros(columns.stop - first, n)
            units[:, columns].fill_diagonal_(1)
            outputs = apply_weight(self.geometry, units.view(-1, *size), self.weight)
            for b, w in enumerate(self.row_weight.square()):
                total[b, columns, b] = apply_weight_adjoint(self.geometry, outputs * w, self.weight).flatten(1)
        return total.view(batch * n, -1)

    def scaled(self, factor: float) -> WeightRows:
        """The block times `factor`."""
        return replace(self, row_weight=self.row_weight * factor, rhs=self.rhs * factor)

    def to(self, dtype: torch.dtype) -> WeightRows:
        """The block in another dtype."""
        return replace(
            self,
            row_weight=self.row_weight.to(dtype),
            rhs=self.rhs.to(dtype),
        )


@dataclass(frozen=True)
class PointRows:
    """Values known directly: ``w x = w value``; ``row_weight`` w is 0 where they are not."""

    row_weight: Tensor
    rhs: Tensor

    @classmethod
    def create(cls, value: Tensor, row_weight: Tensor) -> PointRows:
        """`value` is read only where `row_weight` is positive."""
        return cls(row_weight, torch.where(row_weight > 0, value, 0.0) * row_weight)

    @cached_property
    def count(self) -> int:
        """Known values."""
        return int((self.row_weight > 0).sum())

    def apply(self, x: Tensor) -> Tensor:
        """``w x``."""
        return x * self.row_weight

    def adjoint(self, y: Tensor) -> Tensor:
        """``w y``."""
        return y * self.row_weight

    def diagonal(self) -> Tensor:
        """``w^2``."""
        return self.row_weight.square()

    def normal(self) -> Tensor:
        """``w^2``."""
        return self.diagonal().flatten().diag()

    def scaled(self, factor: float) -> PointRows:
        """The block times `factor`."""
        return PointRows(self.row_weight * factor, self.rhs * factor)

    def to(self, dtype: torch.dtype) -> PointRows:
        """The block in another dtype."""
        return PointRows(self.row_weight.to(dtype), self.rhs.to(dtype))


@dataclass(frozen=True)
class System:
    """All blocks of one unknown, stacked; `support` (bool, None: all) marks the values not known to be 0."""

    shape: torch.Size
    blocks: tuple[Rows, ...]
    support: Tensor | None = None

    @property
    def unknowns(self) -> int:
        """Number of values to find."""
        return math.prod(self.shape) if self.support is None else int(self.support.sum())

    @property
    def count(self) -> int:
        """Number of equations."""
        return sum(block.count for block in self.blocks)

    @property
    def rhs(self) -> list[Tensor]:
        """Right-hand sides, one a block."""
        return [block.rhs for block in self.blocks]

    def apply(self, x: Tensor) -> list[Tensor]:
        """``M x``, one tensor a block."""
        return [block.apply(x) for block in self.blocks]

    def adjoint(self, y: list[Tensor]) -> Tensor:
        """``M^T y``, restricted to the support."""
        total = self.blocks[0].adjoint(y[0])
        for block, part in zip(self.blocks[1:], y[1:], strict=True):
            total = total + block.adjoint(part)
        return total if self.support is None else total * self.support

    def diagonal(self) -> Tensor:
        """Diagonal of ``M^T M``."""
        total = self.rhs[0].new_zeros(self.shape)
        for block in self.blocks:
            total = total + block.diagonal()
        return total

    def to(self, dtype: torch.dtype) -> System:
        """The system in another dtype."""
        if all(part.dtype == dtype for part in self.rhs):
            return self
        return replace(self, blocks=tuple(block.to(dtype) for block in self.blocks))

    def rows(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Parts of a residual in the precision of the system."""
        return [part.to(own.dtype) for part, own in zip(parts, self.rhs, strict=True)]

    def residual(self, x: Tensor) -> float:
        """``||b - M x|| / ||b||``, in float64."""
        miss = norm(b.double() - q.double() for b, q in zip(self.rhs, self.apply(x), strict=True))
        return miss / (norm(self.rhs) or 1.0)


def balance(system: System, gradient_weight: float) -> System:
    """Scale every block to mean column norm 1 (gradient rows to the root of `gradient_weight`)."""
    blocks = []
    for block in system.blocks:
        mean = float(block.diagonal().mean())
        weight = 1.0 if gradient_part(block) is None else gradient_weight
        blocks.append(block.scaled(math.sqrt(weight / mean)) if mean > 0 else block)
    return System(system.shape, tuple(blocks), system.support)


def norm(parts: Iterable[Tensor]) -> float:
    """The 2-norm of all parts together, in float64, read back once."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

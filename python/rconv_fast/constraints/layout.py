"""How the entries of a constraint matrix are laid out: one description for both matrices.

On each axis row ``r`` and entry ``e`` meet input position ``i = r*row_step + e*entry_step - padding``:

===========  =================  =================  ==============  ================
matrix       rows ``r``         entries ``e``      planes          source of values
===========  =================  =================  ==============  ================
gradient     offsets ``k``, d   outputs ``u``, s   samples ``b``   ``g[b, f, u]``
weight       outputs ``u``, s   offsets ``k``, d   channels ``c``  ``W[f, c, k]``
===========  =================  =================  ==============  ================

The same numbers, flattened, are what the kernels take (``csrc/geometry.hpp``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from rconv_fast.geometry import ConvGeometry

INT32_MAX = 2**31 - 1
# A layout travels as its numbers: what operators take and torch.compile understands.
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a layout: input size, then count and step of the rows and of the entries, then padding."""

    size: int
    n_rows: int
    row_step: int
    n_entries: int
    entry_step: int
    padding: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """The axis as a flat tuple."""
        return (self.size, self.n_rows, self.row_step, self.n_entries, self.entry_step, self.padding)

    @property
    def reach(self) -> int:
        """Positions of the padded input."""
        return self.size + 2 * self.padding

    @cached_property
    def n_meetings(self) -> int:
        """Pairs (r, e) that meet inside the input, counted along the shorter side."""
        if self.n_rows <= self.n_entries:
            return sum(self._met(r * self.row_step, self.entry_step, self.n_entries) for r in range(self.n_rows))
        return sum(self._met(e * self.entry_step, self.row_step, self.n_rows) for e in range(self.n_entries))

    def _met(self, offset: int, step: int, count: int) -> int:
        # The j in [0, count) with 0 <= offset - padding + j*step < size.
        begin = max(0, -((offset - self.padding) // step))
        end = min(count, (self.size - 1 - offset + self.padding) // step + 1)
        return max(0, end - begin)


@dataclass(frozen=True)
class ConstraintLayout:
    """Sizes of one constraint matrix; ``filter_stride`` and ``plane_stride`` are those of the source."""

    n_filters: int
    n_planes: int
    n_groups: int
    filter_stride: int
    plane_stride: int
    axes: tuple[Axis, ...]

    @classmethod
    def of_gradient(cls, geometry: ConvGeometry, batch: int) -> ConstraintLayout:
        """Layout of the gradient constraints of `batch` samples; every filter has the same columns."""
        axes = tuple(
            Axis(i, k, d, u, s, p)
            for i, k, d, u, s, p in zip(
                geometry.input_size,
                geometry.kernel_size,
                geometry.dilation,
                geometry.out_size,
                geometry.stride,
                geometry.padding,
                strict=True,
            )
        )
        n_filters, n_entries = geometry.out_channels, geometry.n_output
        return cls(n_filters, batch, 1, n_entries, n_filters * n_entries, axes)

    @classmethod
    def of_weight(cls, geometry: ConvGeometry) -> ConstraintLayout:
        """Layout of the weight constraints; a filter has the columns of its group's channels."""
        axes = tuple(
            Axis(i, u, s, k, d, p)
            for i, k, d, u, s, p in zip(
                geometry.input_size,
                geometry.kernel_size,
                geometry.dilation,
                geometry.out_size,
                geometry.stride,
                geometry.padding,
                strict=True,
            )
        )
        n_channels, n_entries = geometry.in_channels // geometry.groups, geometry.n_taps
        return cls(geometry.out_channels, n_channels, geometry.groups, n_channels * n_entries, n_entries, axes)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConstraintLayout:
        """Undo ``numbers``."""
        axes = (Axis(*numbers[a : a + 6]) for a in range(5, len(numbers), 6))
        return cls(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], tuple(axes))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The layout as one flat list, the form operators and kernels take."""
        head = (self.n_filters, self.n_planes, self.n_groups, self.filter_stride, self.plane_stride)
        return head + sum((axis.numbers for axis in self.axes), ())

    @cached_property
    def n_rows(self) -> int:
        """Rows of the matrix when none is left out."""
        return self.n_filters * math.prod(axis.n_rows for axis in self.axes)

    @cached_property
    def n_cols(self) -> int:
        """Columns of the matrix."""
        return self.n_groups * self.n_planes * math.prod(axis.size for axis in self.axes)

    @cached_property
    def n_source(self) -> int:
        """Elements of the tensor the values come from."""
        return self.n_filters * self.n_planes * math.prod(axis.n_entries for axis in self.axes)

    @cached_property
    def nnz(self) -> int:
        """Entries of the matrix when no row is left out."""
        return self.n_filters * self.n_planes * math.prod(axis.n_meetings for axis in self.axes)

    @cached_property
    def index_dtype(self) -> torch.dtype:
        """``int32`` while offsets, columns, source indices and padded positions fit, else ``int64``."""
        padded = math.prod(max(axis.reach, axis.row_step, axis.entry_step) for axis in self.axes)
        fits = max(self.nnz, self.n_cols, self.n_source, self.n_rows, padded) <= INT32_MAX
        return torch.int32 if fits else torch.int64


@lru_cache(maxsize=256)
def layout_of(numbers: Numbers) -> ConstraintLayout:
    """The layout of these numbers, remembered with its counts."""
    return ConstraintLayout.from_numbers(numbers)

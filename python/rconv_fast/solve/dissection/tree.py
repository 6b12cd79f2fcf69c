"""Nested dissection of a picture: which unknowns and which rows each front of the sparse factor holds.

Row ``u`` of ``A x = o`` meets the positions ``u*s - p + [0, extent)`` of an axis, ``extent = d*(k-1) + 1``. A
cut starts where a row starts, ``a = -p (mod s)``: the rows that begin before ``a`` end before
``a + extent - s``, so ``[a, a + extent - s)`` separates left from right. No separator is narrower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from rconv_fast.geometry import ConvGeometry, Size

Indices = npt.NDArray[np.int64]

# A front of up to this many unknowns is not cut: call overhead binds smaller ones, flops larger ones.
LEAF_UNKNOWNS = 200


@dataclass(frozen=True)
class Interval:
    """Interior ``[lo, hi)`` of a front on an axis, the rows that meet it, the hull of what they meet."""

    lo: int
    hi: int
    row_lo: int
    row_hi: int
    hull_lo: int
    hull_hi: int


@dataclass(frozen=True)
class Axis:
    """One axis of the convolution."""

    size: int
    out_size: int
    stride: int
    padding: int
    extent: int

    @property
    def separator(self) -> int:
        """Width of a separator."""
        return max(self.extent - self.stride, 0)

    def interval(self, lo: int, hi: int) -> Interval:
        """Add rows and hull to the interior ``[lo, hi)``."""
        s, p = self.stride, self.padding
        # u*s - p + extent - 1 >= lo and u*s - p <= hi - 1
        row_lo = min(max(0, -((self.extent - 1 - lo - p) // s)), self.out_size)
        row_hi = max(row_lo, min(self.out_size, (hi - 1 + p) // s + 1))
        if row_lo == row_hi:
            return Interval(lo, hi, row_lo, row_hi, lo, hi)
        hull_lo = max(0, min(lo, row_lo * s - p))
        hull_hi = min(self.size, max(hi, (row_hi - 1) * s - p + self.extent))
        return Interval(lo, hi, row_lo, row_hi, hull_lo, hull_hi)

    def key(self, part: Interval) -> Size:
        """Return numbers that two intervals share only if they are translates, with rows, hulls and cuts."""
        n_rows = part.row_hi - part.row_lo
        first_row = part.row_lo * self.stride - self.padding - part.lo if n_rows else 0
        phase = (part.lo + self.padding) % self.stride
        return part.hi - part.lo, part.hull_lo - part.lo, part.hull_hi - part.lo, n_rows, first_row, phase

    def cut(self, part: Interval) -> tuple[Interval, Interval] | None:
        """Left and right of a separator in the middle half, or None if one of them would be empty.

        Cuts lie on the coarsest grid of ``s 2^j`` that has a line there: parts between two cuts are then
        translates of one another, which without row weights share one factor.
        """
        s, p, last = self.stride, self.padding, part.hi - self.separator - 1
        margin = (part.hi - part.lo) // 4
        starts = _multiples(s, p, max(part.lo + 1, part.lo + margin), min(last, last + 1 - margin))
        starts = starts or _multiples(s, p, part.lo + 1, last)
        if not starts:
            return None
        middle = (part.lo + last + 1) / 2
        line = max(starts, key=lambda m: (m & -m, -abs(m * s - p - middle)))
        start = line * s - p
        return self.interval(part.lo, start), self.interval(start + self.separator, part.hi)


def _multiples(s: int, p: int, first: int, last: int) -> range:
    """All m with ``first <= m s - p <= last``."""
    return range(-(-(first + p) // s), (last + p) // s + 1)


Box = tuple[Interval, ...]


@dataclass(eq=False)
class FrontKind:
    """Fronts that are translates of one another, so that without row weights one factor serves them all.

    A front eliminates its interior less the interiors of its children, and leaves rows on its boundary (its
    hull less its interior) to its parent. Its columns are the eliminated positions, then the boundary, each
    position with all its channels; its rows are those its children left, and its own.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    box : tuple of Interval
        The first front of the kind, per axis.
    children : tuple of (tuple of Interval, FrontKind)
        Left and right child of the first front; none for a leaf.
    own_rows : tuple of range
        Rows of the first front that no child holds, per axis.
    height : int
        0 for a leaf; larger than the children's.
    shifts : list of array, shape (n, ndim)
        Translations from the first front to each front, in positions, as their parents listed them.
    child_offsets : list of int
        Where the children of these fronts begin in the list of fronts of the child's kind.
    """

    geometry: ConvGeometry
    box: Box
    children: tuple[tuple[Box, FrontKind], ...]
    own_rows: tuple[range, ...]
    height: int
    shifts: list[Indices] = field(default_factory=list)
    child_offsets: list[int] = field(default_factory=list)

    @cached_property
    def shift(self) -> Indices:
        """All translations, shape (n_fronts, ndim)."""
        return np.concatenate(self.shifts)

    @property
    def n_fronts(self) -> int:
        """Number of fronts of this kind."""
        return sum(map(len, self.shifts))

    @property
    def n_own(self) -> int:
        """Own rows of one filter."""
        return math.prod(map(len, self.own_rows))

    @property
    def n_interior(self) -> int:
        """Positions that this front and those below it eliminate."""
        return math.prod(p.hi - p.lo for p in self.box)

    @cached_property
    def n_eliminated(self) -> int:
        """Positions that this front eliminates."""
        return self.n_interior - sum(kind.n_interior for _, kind in self.children)

    @cached_property
    def n_boundary(self) -> int:
        """Positions of the boundary."""
        return math.prod(p.hull_hi - p.hull_lo for p in self.box) - self.n_interior

    @cached_property
    def column(self) -> Indices:
        """Column of each position of the hull, -1 in the interiors of the children; shape of the hull."""
        column = np.full([p.hull_hi - p.hull_lo for p in self.box], -1, dtype=np.int64)
        boundary = np.ones(column.shape, dtype=bool)
        boundary[self._window(self.box)] = False
        eliminated = ~boundary
        for box, _ in self.children:
            eliminated[self._window(box)] = False
        column[eliminated] = np.arange(self.n_eliminated)
        column[boundary] = np.arange(self.n_eliminated, self.n_eliminated + self.n_boundary)
        return column

    def _window(self, box: Box) -> tuple[slice, ...]:
        return tuple(slice(q.lo - p.hull_lo, q.hi - p.hull_lo) for p, q in zip(self.box, box, strict=True))

    @cached_property
    def positions(self) -> Indices:
        """Flat input positions of the columns of every front, shape (n_fronts, n_eliminated + n_boundary)."""
        held = self.column >= 0
        hull = np.argwhere(held) + [p.hull_lo for p in self.box]
        first = np.empty(len(hull), dtype=np.int64)
        first[self.column[held]] = hull @ row_major(self.geometry.input_size)
        return first + (self.shift @ row_major(self.geometry.input_size))[:, None]

    @cached_property
    def rows(self) -> Indices:
        """Flat output positions of the own rows of every front, shape (n_fronts, n_own)."""
        weights = row_major(self.geometry.out_size)
        axes = [np.arange(r.start, r.stop) * w for r, w in zip(self.own_rows, weights, strict=True)]
        first: Indices = functools.reduce(np.add.outer, axes).ravel()
        shift: Indices = self.shift // self.geometry.stride @ weights
        return np.add(first, shift[:, None])

    @cached_property
    def entries(self) -> tuple[Indices, Indices, Indices]:
        """Nonzeros of the own rows of one filter: row, kernel offset and column, each of shape (nnz,)."""
        g = self.geometry
        index, inside = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
        for axis, (part, rows) in enumerate(zip(self.box, self.own_rows, strict=True)):
            start = np.arange(rows.start, rows.stop) * g.stride[axis] - g.padding[axis] - part.hull_lo
            here = start[:, None] + np.arange(g.kernel_size[axis]) * g.dilation[axis]
            length = part.hull_hi - part.hull_lo
            shape = (index.shape[0] * here.shape[0], index.shape[1] * here.shape[1])
            index = (index[:, None, :, None] * length + here[None, :, None, :]).reshape(shape)
            inside = (inside[:, None, :, None] & ((here >= 0) & (here < length))[None, :, None, :]).reshape(shape)
        row, tap = np.nonzero(inside)
        return row, tap, self.column.ravel()[index[inside]]

    @cached_property
    def child_columns(self) -> list[Indices]:
        """Per child, the columns of this front that the child's boundary falls on."""
        result = []
        for box, kind in self.children:
            window = tuple(
                slice(q.hull_lo - p.hull_lo, q.hull_hi - p.hull_lo) for p, q in zip(self.box, box, strict=True)
            )
            boundary = kind.column >= kind.n_eliminated
            columns = np.empty(kind.n_boundary, dtype=np.int64)
            columns[kind.column[boundary] - kind.n_eliminated] = self.column[window][boundary]
            result.append(columns)
        return result


def row_major(size: Sequence[int]) -> Indices:
    """Weights of a row-major flat index, shape (ndim,)."""
    return np.cumprod([1, *size[:0:-1]], dtype=np.int64)[::-1]


class _Dissection:
    """Cuts boxes and collects the kinds of fronts; equal keys mean equal subtrees."""

    def __init__(self, geometry: ConvGeometry) -> None:
        g = geometry
        self.geometry = g
        self.channels = g.in_channels // g.groups
        self.axes = [
            Axis(n, o, s, p, d * (k - 1) + 1)
            for n, o, s, p, d, k in zip(
                g.input_size, g.out_size, g.stride, g.padding, g.dilation, g.kernel_size, strict=True
            )
        ]
        self.kinds: dict[tuple[Size, ...], FrontKind] = {}

    def kind(self, box: Box) -> FrontKind:
        key = tuple(axis.key(part) for axis, part in zip(self.axes, box, strict=True))
        if key not in self.kinds:
            self.kinds[key] = self._new_kind(box)
        return self.kinds[key]

    def _new_kind(self, box: Box) -> FrontKind:
        rows = [range(p.row_lo, p.row_hi) for p in box]
        cut = self._best_cut(box)
        if cut is None:
            return FrontKind(self.geometry, box, (), tuple(rows), height=0)
        axis, left, right = cut
        boxes = [(*box[:axis], part, *box[axis + 1 :]) for part in (left, right)]
        rows[axis] = range(left.row_hi, max(left.row_hi, min(right.row_lo, box[axis].row_hi)))
        children = tuple((b, self.kind(b)) for b in boxes)
        return FrontKind(self.geometry, box, children, tuple(rows), height=1 + max(c.height for _, c in children))

    def _best_cut(self, box: Box) -> tuple[int, Interval, Interval] | None:
        """Cut across the axis with the smallest separator."""
        lengths = [p.hi - p.lo for p in box]
        if math.prod(lengths) * self.channels <= LEAF_UNKNOWNS:
            return None
        for axis in sorted(range(len(box)), key=lambda a: self.axes[a].separator / lengths[a]):
            halves = self.axes[axis].cut(box[axis])
            if halves:
                return axis, *halves
        return None


@lru_cache(maxsize=16)
def dissect(geometry: ConvGeometry) -> tuple[FrontKind, ...]:
    """Dissect one group's picture; children come before their parents, the root last."""
    dissection = _Dissection(geometry)
    root = dissection.kind(tuple(axis.interval(0, axis.size) for axis in dissection.axes))
    kinds = sorted(dissection.kinds.values(), key=lambda kind: kind.height)
    root.shifts.append(np.zeros((1, geometry.ndim), dtype=np.int64))
    for kind in reversed(kinds):
        for box, child in kind.children:
            kind.child_offsets.append(child.n_fronts)
            step = [q.lo - p.lo for p, q in zip(child.box, box, strict=True)]
            child.shifts.append(kind.shift + np.asarray(step))
    return tuple(kinds)

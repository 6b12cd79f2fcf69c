"""The order of an elimination by nested dissection, and the sweeps of a solve through its fronts, level by level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection.tree import dissect


@dataclass(frozen=True)
class Level:
    """Where a vector in the order of the elimination has the columns of all fronts of one height.

    Attributes
    ----------
    shapes : tuple of (m, e, b, sides)
        For each kind, m different fronts of e eliminated and b later columns, each `sides` times.
    eliminated : slice
        The eliminated columns, for each kind an array (m, sides, e).
    index : Tensor
        All columns, for each kind an array (m, sides, e + b).
    """

    shapes: tuple[tuple[int, int, int, int], ...]
    eliminated: slice
    index: Tensor

    def parts(self, eliminated: Tensor, every: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each kind, views of the rows that one product takes: (m, rows, e) and (m, rows, e + b).

        Rows are the sides of one vector, in one product, or many vectors, in a product for each side.
        """
        own = eliminated.split([m * e * sides for m, e, _, sides in self.shapes])
        both = every.split([m * (e + b) * sides for m, e, b, sides in self.shapes])
        for (m, e, b, sides), o, t in zip(self.shapes, own, both, strict=True):
            vectors = o.shape[1]
            if vectors == 1:
                yield [(o.view(m, sides, e), t.view(m, sides, e + b))]
            else:
                each = (o.view(m, sides, e, vectors).unbind(1), t.view(m, sides, e + b, vectors).unbind(1))
                yield [(one.mT, other.mT) for one, other in zip(*each, strict=True)]


@dataclass(frozen=True)
class Elimination:
    """The flat input positions ``(c, *i)`` in the order of the elimination, and each height's columns in it."""

    order: Tensor
    levels: tuple[Level, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(m, e, b, sides) of every kind of front."""
        return [shape for level in self.levels for shape in level.shapes]


@lru_cache(maxsize=8)
def eliminated_in_order(geometry: ConvGeometry, row_weights: bool, device: torch.device) -> Elimination:
    """The order of the elimination; `row_weights` as in `DissectionFactor.estimate`."""
    per_group = geometry.in_channels // geometry.groups
    channels = torch.arange(geometry.in_channels).view(geometry.groups, 1, 1, per_group) * geometry.n_input
    levels = []
    for _, kinds in itertools.groupby(dissect(geometry), key=lambda kind: kind.height):
        shapes, eliminated, every = [], [], []
        for kind in kinds:
            distinct = kind.n_fronts if row_weights else 1
            columns = channels + torch.from_numpy(kind.positions)[:, :, None]  # (groups, n_fronts, n, channels)
            columns = columns.view(geometry.groups * distinct, kind.n_fronts // distinct, -1)
            e, b = kind.n_eliminated * per_group, kind.n_boundary * per_group
            shapes.append((len(columns), e, b, columns.shape[1]))
            eliminated.append(columns[..., :e].flatten())
            every.append(columns.flatten())
        levels.append((tuple(shapes), torch.cat(eliminated), torch.cat(every)))
    order = torch.cat([eliminated for _, eliminated, _ in levels])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    ends = list(itertools.accumulate((len(eliminated) for _, eliminated, _ in levels), initial=0))
    found = tuple(
        Level(shapes, slice(first, last), place[every].to(device))
        for (shapes, _, every), (first, last) in zip(levels, itertools.pairwise(ends), strict=True)
    )
    return Elimination(order.to(device), found)


@dataclass(frozen=True)
class FrontSolve:
    """What the fronts of one kind do in a solve.

    Attributes
    ----------
    matrix : Tensor, shape (m, e, e + b)
        ``S = R_EE^-1 [I  -R_EB]``: one product with it is the whole step, each way.
    diagonal : Tensor, shape (m, e)
        ``|diag R_EE|``.
    """

    matrix: Tensor
    diagonal: Tensor

    @classmethod
    def create(cls, r_ee: Tensor, r_eb: Tensor, matrix: Tensor) -> FrontSolve:
        """From the upper triangle of ``R_EE`` (m, e, e) and ``R_EB`` (m, e, b); S is written into `matrix`."""
        e = r_ee.shape[1]
        one = torch.eye(e, dtype=r_ee.dtype, device=r_ee.device).expand_as(r_ee)
        inverse = torch.linalg.solve_triangular(r_ee, one, upper=True)
        matrix[..., :e] = inverse
        matrix[..., e:] = (inverse @ r_eb).neg_()
        return cls(matrix, r_ee.diagonal(dim1=1, dim2=2).abs())


class Sweep:
    """The memory of a solve with some number of vectors, cut once into what each front reads and writes.

    Attributes
    ----------
    x : Tensor, shape (n, vectors)
        What is solved for, in place.
    """

    def __init__(self, levels: Sequence[Level], fronts: Sequence[FrontSolve], vectors: int) -> None:
        like = fronts[0].matrix
        self.x = like.new_empty(sum(e.stop - e.start for e in (level.eliminated for level in levels)), vectors)
        left = iter(fronts)
        self._levels = []
        for level in levels:
            own, every = self.x[level.eliminated], like.new_empty(len(level.index), vectors)
            of_level = zip(itertools.islice(left, len(level.shapes)), level.parts(own, every), strict=True)
            cut = [(front.matrix, *rows) for front, products in of_level for rows in products]
            self._levels.append((level.index, own, every, cut))

    def forward(self) -> None:
        """``y_E = R_EE^-T x_E``, then ``x_B -= R_EB^T y_E``, leaves first."""
        narrow = self.x.shape[1] == 1  # torch adds to a vector much faster than to a column
        x = self.x.squeeze(1) if narrow else self.x
        for index, eliminated, changes, cut in self._levels:
            for matrix, own, every in cut:
                torch.bmm(own, matrix, out=every)
            eliminated.zero_()
            x.index_add_(0, index, changes.squeeze(1) if narrow else changes)

    def backward(self) -> None:
        """``x_E = R_EE^-1 (y_E - R_EB x_B)``, the root first."""
        for index, _, values, cut in reversed(self._levels):
            torch.index_select(self.x, 0, index, out=values)
            for matrix, own, every in cut:
                torch.bmm(every, matrix.mT, out=own)

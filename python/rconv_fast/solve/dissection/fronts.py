"""The dense half of the sparse factor: assemble the fronts of one kind, eliminate their columns.

The columns of a front are positions x channels. Without row weights the fronts of a kind are one and the same
matrix and n, the number of distinct fronts, is 1; with row weights it is the number of fronts.

Two ways to the same R. ``QrFronts`` stacks rows, what the children left and those of the convolution, and
meets the condition number, not its square. ``CholeskyFronts`` adds Gram matrices: there damping is free (a QR
takes it as one more row per unknown, at five times the cost) and bounds the squared condition number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rconv_fast.errors import LinAlgError
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection.tree import FrontKind

# Bytes of fronts that are factored in one batch: bounds the work space.
BATCH_BYTES = 1 << 27

Eliminated = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Indices:
    """Indices of a kind on a device: ``FrontKind.entries`` and ``FrontKind.child_columns``."""

    row: Tensor
    tap: Tensor
    column: Tensor
    children: tuple[Tensor, ...]


@lru_cache(maxsize=512)
def _indices(kind: FrontKind, device: torch.device) -> _Indices:
    """Copied to the device once, for all factors."""
    row, tap, column = (torch.from_numpy(index).to(device) for index in kind.entries)
    return _Indices(row, tap, column, tuple(torch.from_numpy(columns).to(device) for columns in kind.child_columns))


class Fronts(ABC):
    """The weights of the convolution, arranged for fronts.

    Parameters
    ----------
    geometry : ConvGeometry
        The convolution.
    weight : Tensor, shape (F, C / groups, *K)
        Its weights.
    row_weights : Tensor, shape (F, *out), or None
        Factor of each row.
    """

    def __init__(self, geometry: ConvGeometry, weight: Tensor, row_weights: Tensor | None) -> None:
        g = geometry
        self.groups = g.groups
        self.channels, self.filters = g.in_channels // g.groups, g.out_channels // g.groups
        # (taps, groups, 1, C, F)
        taps = weight.reshape(g.groups, self.filters, self.channels, g.n_taps)
        self.taps = taps.permute(3, 0, 2, 1).unsqueeze(2).contiguous()
        self.row_weights = None
        if row_weights is not None:  # (groups, n_output, F)
            self.row_weights = row_weights.reshape(g.groups, self.filters, g.n_output).mT.contiguous()

    def factor(self, kind: FrontKind, left: list[Tensor]) -> Eliminated:
        """Assemble the distinct fronts of a kind and eliminate their columns E, which leaves the boundary B.

        Parameters
        ----------
        kind : FrontKind
            The fronts.
        left : list of Tensor, shape (groups, n, b_child, rows)
            What each of their children left: its rows transposed (QR), or its Gram matrix (Cholesky).

        Returns
        -------
        r_ee : Tensor, shape (groups, n, e, e)
            Its upper triangle.
        r_eb : Tensor, shape (groups, n, e, b)
            Coupling of E to B.
        rest : Tensor, shape (groups, n, b, rows)
            What is left for the parents.
        """
        n = 1 if self.row_weights is None else kind.n_fronts
        weights = None
        if self.row_weights is not None:  # (groups, n, n_own, F)
            weights = self.row_weights[:, torch.from_numpy(kind.rows).to(self.taps.device)]
        n_columns = (kind.n_eliminated + kind.n_boundary) * self.channels
        n_rows = max(kind.n_own * self.filters + sum(rest.shape[3] for rest in left), n_columns)
        step = max(1, BATCH_BYTES // max(1, self.groups * n_columns * n_rows * self.taps.element_size()))
        parts = [self._factor_batch(kind, left, weights, slice(i, min(i + step, n))) for i in range(0, n, step)]
        if len(parts) == 1:
            return parts[0]
        r_ee, r_eb, rest = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return r_ee, r_eb, rest

    @abstractmethod
    def _factor_batch(self, kind: FrontKind, left: list[Tensor], weights: Tensor | None, batch: slice) -> Eliminated:
        """Factor the fronts in `batch`; the other arguments are of all distinct fronts of the kind."""

    def _write_own(self, kind: FrontKind, own: Tensor, weights: Tensor | None) -> None:
        """Write ``w[f,u] W[f,c,k]`` into zero rows: own (groups, n, positions, C, n_own, F)."""
        indices = _indices(kind, own.device)
        values = self.taps[indices.tap]  # (nnz, groups, 1, C, F)
        if weights is not None:
            values = values * weights[:, :, indices.row].movedim(2, 0).unsqueeze(3)
        own[:, :, indices.column, :, indices.row] = values


class QrFronts(Fronts):
    """Fronts as rows, held transposed because LAPACK wants columns contiguous: (groups, n, columns, rows).

    Parameters
    ----------
    geometry, weight, row_weights
        As in `Fronts`; rows of weight 0 are left out.
    pins : Tensor, shape (groups, n_input, C / groups), or None
        Adds the row ``pins[j] * x[j]`` for each unknown j with a nonzero pin.
    """

    def __init__(self, geometry: ConvGeometry, weight: Tensor, row_weights: Tensor | None, pins: Tensor | None) -> None:
        super().__init__(geometry, weight, row_weights)
        self.pins = pins

    def _factor_batch(self, kind: FrontKind, left: list[Tensor], weights: Tensor | None, batch: slice) -> Eliminated:
        e = kind.n_eliminated * self.channels
        n_own = kind.n_own * self.filters
        if weights is not None:
            n_own = int((weights != 0).flatten(2).sum(-1).max())  # synchronize!
        pins = self._pins_of(kind)
        counts = [n_own, 0 if pins is None else e, *(rest.shape[3] for rest in left)]
        n, n_columns = batch.stop - batch.start, kind.n_eliminated + kind.n_boundary
        front = self.taps.new_zeros(self.groups, n, n_columns, self.channels, max(sum(counts), e))
        own, pinned, *inherited = torch.split(front[..., : sum(counts)], counts, dim=-1)
        for columns, to, rest in zip(_indices(kind, front.device).children, inherited, left, strict=True):
            to.index_copy_(2, columns, _by_position(rest[:, batch], 2, self.channels))
        if weights is None:
            self._write_own(kind, own.view(*own.shape[:4], kind.n_own, self.filters), None)
        else:
            self._write_weighted(kind, own, weights[:, batch])
        if pins is not None:
            pinned.flatten(2, 3).diagonal(dim1=2, dim2=3).copy_(pins[:, batch])
        return triangularise(front.flatten(2, 3), e)

    def _pins_of(self, kind: FrontKind) -> Tensor | None:
        """Pins of the eliminated unknowns, (groups, n, e), or None if all are zero."""
        if self.pins is None:
            return None
        n = 1 if self.row_weights is None else kind.n_fronts
        positions = torch.from_numpy(kind.positions[:n, : kind.n_eliminated]).to(self.taps.device)
        pins = self.pins[:, positions].flatten(2)
        return pins if pins.any() else None  # synchronize!

    def _write_weighted(self, kind: FrontKind, own: Tensor, weights: Tensor) -> None:
        """Write the rows of nonzero weight, in their order; own (groups, n, positions, C, kept)."""
        every = own.new_zeros(*own.shape[:4], kind.n_own, self.filters)
        self._write_own(kind, every, weights)
        known = (weights != 0).flatten(2).to(torch.uint8)
        order = torch.sort(known, dim=-1, descending=True, stable=True).indices[:, :, None, None, : own.shape[4]]
        own.copy_(every.flatten(4).gather(4, order.expand(own.shape)))


class CholeskyFronts(Fronts):
    """Fronts as Gram matrices, (groups, n, columns, columns).

    Parameters
    ----------
    geometry, weight, row_weights
        As in `Fronts`.
    damping : float
        Added to the diagonal.
    """

    def __init__(self, geometry: ConvGeometry, weight: Tensor, row_weights: Tensor | None, damping: float) -> None:
        super().__init__(geometry, weight, row_weights)
        self.damping = damping

    def _factor_batch(self, kind: FrontKind, left: list[Tensor], weights: Tensor | None, batch: slice) -> Eliminated:
        e, columns = kind.n_eliminated * self.channels, (kind.n_eliminated + kind.n_boundary, self.channels)
        n = batch.stop - batch.start
        own = self.taps.new_zeros(self.groups, n, *columns, kind.n_own, self.filters)
        self._write_own(kind, own, None if weights is None else weights[:, batch])
        own = own.flatten(4).flatten(2, 3)
        front = own @ own.mT
        front.diagonal(dim1=2, dim2=3)[..., :e] += self.damping
        for child, rest in zip(_indices(kind, front.device).children, left, strict=True):
            wide = rest.new_zeros(self.groups, n, rest.shape[2], *columns)
            wide.index_copy_(3, child, _by_position(rest[:, batch], 3, self.channels))
            by_position = _by_position(wide.flatten(3), 2, self.channels).flatten(3)
            _by_position(front, 2, self.channels).flatten(3).index_add_(2, child, by_position)
        return condense(front, e)


def _by_position(x: Tensor, dim: int, channels: int) -> Tensor:
    """Split the columns in dimension `dim` into positions and channels, without a copy."""
    return x.view(*x.shape[:dim], x.shape[dim] // channels, channels, *x.shape[dim + 1 :])


def triangularise(front: Tensor, n_eliminated: int) -> Eliminated:
    """Householder QR of the first columns of transposed fronts (groups, n, columns, rows >= e).

    ``Q^T [F_E  F_B] = [[R_EE  R_EB], [0  S]]``; returns ``R_EE``, ``R_EB`` and ``S^T``. S is triangularised
    too if it has more rows than columns. Below the diagonal of ``R_EE`` stands what LAPACK left there.
    """
    e = n_eliminated
    matrix, n_columns = front.mT, front.shape[2]
    if matrix.shape[2] >= n_columns:
        r = torch.geqrf(matrix)[0]
        return r[..., :e, :e], r[..., :e, e:], r[..., e:n_columns, e:].triu().mT
    if e == 0:
        return matrix[..., :0, :0], matrix[..., :0, :], front
    reflectors, tau = torch.geqrf(matrix[..., :e])
    rest = torch.ormqr(reflectors, tau, matrix[..., e:], left=True, transpose=True)
    return reflectors[..., :e, :], rest[..., :e, :], rest[..., e:, :].mT


def condense(front: Tensor, n_eliminated: int) -> Eliminated:
    """Cholesky elimination of the first columns of Gram matrices (groups, n, columns, columns).

    ``F_EE = R_EE^T R_EE``, ``R_EB = R_EE^-T F_EB``, ``S = F_BB - R_EB^T R_EB``, returned in this order.
    """
    e = n_eliminated
    lower, info = torch.linalg.cholesky_ex(front[..., :e, :e])
    if info.any():  # synchronize!
        raise LinAlgError(
            "DissectionFactor: damping must exceed the rounding errors of A^T diag(w)^2 A, "
            "about 1e-14 of its largest eigenvalue in float64 and 1e-5 in float32"
        )
    r_eb = torch.linalg.solve_triangular(lower, front[..., :e, e:], upper=False)
    return lower.mT, r_eb, front[..., e:, e:] - r_eb.mT @ r_eb

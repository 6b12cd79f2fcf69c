"""Sparse direct factor of the weight constraints: nested dissection of the picture, dense fronts.

``diag(w) A = Q R`` for the convolution ``A`` of one sample, Q never kept, R as what its solves need. Undamped,
R comes from Householder QR: a square first layer has condition numbers of 1e6 and more, whose squares a
Cholesky factor would meet.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_weight_adjoint
from rconv_fast.errors import LinAlgError, require
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection.fronts import CholeskyFronts, Fronts, QrFronts
from rconv_fast.solve.dissection.sweep import Elimination, FrontSolve, Sweep, eliminated_in_order
from rconv_fast.solve.dissection.tree import FrontKind, dissect


class DissectionFactor:
    """Triangular factor R of ``diag(w) A``: ``R^T R = A^T diag(w)^2 A + damping I``.

    Rows are the outputs ``(f, *u)`` of one sample, columns the inputs ``(c, *i)``. Without damping, an
    unknown that no row meets gets a row that sets it to 0, its minimum-norm value: R stays nonsingular.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    n_untouched : int
        Unknowns that no row of nonzero weight meets; 0 with damping.

    Notes
    -----
    R has the order of the elimination; all other vectors are pictures ``(C, *in)``, one or many.
    Without row weights, fronts that are translates of one another are factored and stored once. A picture of
    n x n positions takes O(n^3) flops and O(n^2 log n) memory. On the GPU, ``solve_*`` adds with atomics, so
    results differ in the last bits between calls.
    """

    def __init__(
        self, geometry: ConvGeometry, fronts: list[FrontSolve], n_untouched: int, elimination: Elimination
    ) -> None:
        self.geometry = geometry
        self.n_untouched = n_untouched
        self._fronts = fronts  # children before parents
        self._elimination = elimination

    @classmethod
    def factor(
        cls,
        geometry: ConvGeometry,
        weight: Tensor,
        row_weights: Tensor | None = None,
        *,
        damping: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> DissectionFactor:
        """Factor ``[diag(w) A; sqrt(damping) I]``.

        Parameters
        ----------
        geometry : ConvGeometry
            The convolution.
        weight : Tensor, shape (F, C / groups, *K)
            Its weights; the factor lives on their device.
        row_weights : Tensor, shape (F, *out), optional
            Factor of each row, 0 for an unknown output. All ones if left out, which is several times cheaper.
        damping : float, optional
            Keeps R nonsingular when the rows do not determine every unknown. R then comes from Cholesky
            factorisation, and damping must exceed ``A^T diag(w)^2 A``'s rounding errors: 1e-14 of its largest
            eigenvalue is a good choice in float64.
        dtype : torch.dtype, optional
            Precision of the factorisation, float32 or float64; solves are always in the weight's.

        Returns
        -------
        DissectionFactor
            The factor. See `rank_estimate` and `is_singular` when rows may be missing.

        Raises
        ------
        ArgumentError
            If a shape does not fit the geometry or damping is negative.
        torch.linalg.LinAlgError
            If damping is positive but lost in rounding errors.
        """
        g = geometry
        shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        require(weight.shape == shape, "factor", "weight", f"have shape {shape}", tuple(weight.shape))
        require(damping >= 0, "factor", "damping", "be >= 0", damping)
        solve_dtype, weight = weight.dtype, weight.detach().to(dtype or weight.dtype)
        if row_weights is not None:
            shape = (g.out_channels, *g.out_size)
            got = tuple(row_weights.shape)
            require(got == shape, "factor", "row_weights", f"have shape {shape}", got)
            row_weights = row_weights.detach().to(weight)
        untouched, scale = _untouched(g, weight, row_weights)
        fronts: Fronts
        if damping > 0:
            fronts = CholeskyFronts(g, weight, row_weights, damping)
        else:
            fronts = QrFronts(g, weight, row_weights, untouched * scale if untouched.any() else None)
        elimination = eliminated_in_order(g, row_weights is not None, weight.device)
        sizes = [m * e * (e + b) for m, e, b, _ in elimination.shapes]
        memory = weight.new_empty(sum(sizes), dtype=solve_dtype).split(sizes)
        matrices = [part.view(m, e, e + b) for part, (m, e, b, _) in zip(memory, elimination.shapes, strict=True)]
        solves = _factor_all(g, fronts, matrices)
        return cls(g, solves, 0 if damping > 0 else int(untouched.sum()), elimination)

    def solve_normal(self, v: Tensor) -> Tensor:
        """``(R^T R)^-1 v``, v of shape (C, *in) or (vectors, C, *in); returned in the shape and dtype of v."""
        return self.solve_r(self.solve_rt(v)).reshape(v.shape).to(v.dtype)

    def solve_rt(self, v: Tensor) -> Tensor:
        """``R^-T v``, v of shape (C, *in) or (vectors, C, *in); returned in R's order, (n,) or (n, vectors)."""
        self._require_nonsingular()
        columns = v.reshape(-1, len(self._elimination.order))
        columns = columns.gather(1, self._elimination.order.expand_as(columns))
        sweep = self._sweep(len(columns))
        sweep.x.copy_(columns.mT)
        sweep.forward()
        x = sweep.x.clone() if len(columns) == 1 else sweep.x  # the memory of many vectors is not used again
        return x if v.ndim > self.geometry.ndim + 1 else x.squeeze(1)

    def solve_r(self, y: Tensor) -> Tensor:
        """``R^-1 y``, y in R's order, of shape (n,) or (n, vectors); returned as (C, *in) or (vectors, C, *in)."""
        self._require_nonsingular()
        columns = y.reshape(len(y), -1)
        sweep = self._sweep(columns.shape[1])
        sweep.x.copy_(columns)
        sweep.backward()
        solved = torch.empty_like(sweep.x).index_copy_(0, self._elimination.order, sweep.x)
        return solved.mT.reshape(*y.shape[1:], self.geometry.in_channels, *self.geometry.input_size)

    def _require_nonsingular(self) -> None:
        if self.is_singular:
            raise LinAlgError(
                f"DissectionFactor: R has rank {self.rank_estimate} of "
                f"{self._diagonal.numel() - self.n_untouched}; factor with damping > 0"
            )

    def _sweep(self, vectors: int) -> Sweep:
        """That of the many solves of an iteration is kept, so a factor serves one thread at a time."""
        if vectors != 1:
            return Sweep(self._elimination.levels, self._fronts, vectors)
        return self._narrow

    @cached_property
    def _narrow(self) -> Sweep:
        return Sweep(self._elimination.levels, self._fronts, 1)

    @cached_property
    def _diagonal(self) -> Tensor:
        """``|diag R|`` of every unknown, pinned ones included."""
        return torch.cat(
            [
                front.diagonal.unsqueeze(1).expand(m, sides, e).flatten()
                for front, (m, e, _, sides) in zip(self._fronts, self._elimination.shapes, strict=True)
            ]
        )

    @cached_property
    def largest(self) -> float:
        """Largest ``|diag R|``."""
        return float(self._diagonal.max())

    @cached_property
    def smallest(self) -> float:
        """Smallest ``|diag R|``."""
        return float(self._diagonal.min())

    @property
    def condition_estimate(self) -> float:
        """``largest / smallest``, a lower bound of the condition number."""
        return self.largest / self.smallest if self.smallest else math.inf

    @property
    def _tolerance(self) -> float:
        return torch.finfo(self._diagonal.dtype).eps * self.largest

    @cached_property
    def is_singular(self) -> bool:
        """Whether R is singular to working precision, so that solves refuse."""
        return not (math.isfinite(self.largest) and self.smallest > self._tolerance)

    @cached_property
    def rank_estimate(self) -> int:
        """Diagonal entries of R above working precision, less the untouched unknowns; damping counts as rank.

        The order of elimination follows the picture, not the pivots, so this is an estimate: trust "full" and
        "deficient", not the count.
        """
        return int((self._diagonal > self._tolerance).sum()) - self.n_untouched

    @property
    def memory_bytes(self) -> int:
        """Bytes of what solves use, as many as R has."""
        return sum(front.matrix.numel() * front.matrix.element_size() for front in self._fronts)

    @staticmethod
    def estimate(geometry: ConvGeometry, *, row_weights: bool = False) -> tuple[int, int]:
        """Bytes of a float64 factor and flops of the factorisation, from the geometry alone.

        Parameters
        ----------
        geometry : ConvGeometry
            The convolution.
        row_weights : bool, optional
            Whether rows have weights, so that no two fronts share a factor.

        Returns
        -------
        tuple of int
            Bytes and flops.
        """
        channels, filters = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
        left: dict[FrontKind, int] = {}
        n_bytes = flops = 0
        for kind in dissect(geometry):
            e, b = kind.n_eliminated * channels, kind.n_boundary * channels
            rows = max(e, kind.n_own * filters + sum(left[child] for _, child in kind.children))
            left[kind] = min(rows - e, b)
            n = geometry.groups * (kind.n_fronts if row_weights else 1)
            n_bytes += 8 * n * e * (e + b)
            if rows >= e + b:  # 2 n^2 (m - n/3)
                flops += n * 2 * (e + b) ** 2 * (3 * rows - e - b) // 3
            else:  # the same with n = e, and 4 e b (m - e/2) for the rest
                flops += n * (2 * e * e * (3 * rows - e) // 3 + 2 * e * b * (2 * rows - e))
        return n_bytes, flops


def _untouched(geometry: ConvGeometry, weight: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unknowns no row of nonzero weight meets, (groups, n_input, C / groups), and the largest column norm."""
    g = geometry
    rows = weight.new_ones(g.out_channels, *g.out_size) if row_weights is None else row_weights.square()
    # sum of squares of each column
    squares = apply_weight_adjoint(g, rows.unsqueeze(0), weight.square())
    return (squares == 0).reshape(g.groups, -1, g.n_input).mT, squares.max().sqrt()


def _factor_all(geometry: ConvGeometry, fronts: Fronts, matrices: list[Tensor]) -> list[FrontSolve]:
    """Factor from the leaves to the root; what a front leaves is freed once its last parent took it."""
    kinds = dissect(geometry)
    last_use = {child: kind for kind in kinds for _, child in kind.children}
    left: dict[FrontKind, Tensor] = {}
    factored = []
    for kind, matrix in zip(kinds, matrices, strict=True):
        inherited = [
            left[child] if fronts.row_weights is None else left[child][:, first : first + kind.n_fronts]
            for (_, child), first in zip(kind.children, kind.child_offsets, strict=True)
        ]
        r_ee, r_eb, left[kind] = fronts.factor(kind, inherited)
        for child in {child for _, child in kind.children if last_use[child] is kind}:
            del left[child]
        factored.append(FrontSolve.create(r_ee.flatten(0, 1), r_eb.flatten(0, 1), matrix))
    return factored

"""One layer's input under noise: weighted least squares with the noise of both kinds of rows, and its error bars.

    ``N x = B^T W dW + A^T V z``,   ``N = B^T W B + A^T V A + prior``

``B^T W B`` is block diagonal over the channels of x, so N is inverted whole where it is small, else by Woodbury over
the outputs of known value, else by conjugate gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.constraints.sparse import csr_array
from rconv_fast.errors import LinAlgError
from rconv_fast.estimate.fisher import dense_rows, input_normals, sparse_rows
from rconv_fast.estimate.gram import own_product
from rconv_fast.geometry import ConvGeometry, Phase
from rconv_fast.layers.conv import ConvRule
from rconv_fast.solve.conjugate import conjugate_gradients
from rconv_fast.solve.phases.gram import group_filters, phase_places, phase_rows, tap_windows

Apply = Callable[[Tensor], Tensor]

# Systems up to this size are solved directly, with their exact error bars.
DIRECT_UP_TO = 3072
# Outputs of known value, and entries of their rows (512 MiB), up to which Woodbury's formula is used.
WOODBURY_UP_TO, ROWS_UP_TO = 4096, 2**26
# Share of the mean diagonal of ``B^T W B`` that keeps its blocks invertible; conjugate gradients take it off again.
# That much, and ten times more up to the mean diagonal itself, until they are.
SHIFT, SHIFTS = 1e-11, 12
ITERATIONS, TOLERANCE = 1000, 1e-8
# Errors drawn for the error bars where the system is not solved directly, each found to that accuracy.
DRAWS, ROUGH = 4, 1e-2
# A filter whose rows miss by this many times their variance has something wrong in its output gradient. Rounds of
# weighing anew, at most, and the change of that misfit's logarithm at which they end.
OUTLIER, REWEIGHTED, SETTLED = 4.0, 8, 0.3
# Weight rows may outweigh gradient rows by this much where nothing better than the diagonal preconditions them.
MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class WeightedRows:
    r"""All rows of one layer with their weights, for a layer's input of shape (B, C, \*in).

    Attributes
    ----------
    rule : ConvRule
        The layer.
    g : Tensor
        dL/do (B, F, \*out).
    w, seen : Tensor
        Weights ``1 / variance`` of the gradient rows and the gradient dW, (F, C/groups, \*K).
    v, z : Tensor
        Weights and values of the outputs, without bias, (B, F, \*out).
    prior : float
        ``1 / variance`` of the input's values before anything is seen.
    """

    rule: ConvRule
    g: Tensor
    w: Tensor
    seen: Tensor
    v: Tensor
    z: Tensor
    prior: float

    @property
    def geometry(self) -> ConvGeometry:
        """Of the layer."""
        return self.rule.geometry

    @property
    def shape(self) -> torch.Size:
        """Of the layer's input."""
        return torch.Size((len(self.g), self.geometry.in_channels, *self.geometry.input_size))

    def adjoint(self, r: Tensor, q: Tensor) -> Tensor:
        """``B^T r + A^T q``."""
        geometry = self.geometry
        return apply_weight_adjoint(geometry, self.g, r) + apply_weight_adjoint(geometry, q, self.rule.weight)

    def normal(self, x: Tensor) -> Tensor:
        """``N x``."""
        gradient, value = apply_gradient(self.geometry, x, self.g), apply_weight(self.geometry, x, self.rule.weight)
        return self.adjoint(self.w * gradient, self.v * value) + self.prior * x

    @property
    def right(self) -> Tensor:
        """``B^T W dW + A^T V z``."""
        return self.adjoint(self.w * self.seen, self.v * self.z)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A right-hand side that noise alone makes: its covariance is N."""
        noise = self.adjoint(self.w.sqrt() * _normal(self.w, generator), self.v.sqrt() * _normal(self.v, generator))
        return noise + math.sqrt(self.prior) * _normal(noise, generator)

    def blocks(self) -> Tensor:
        """``B^T W B`` channel by channel, (C, B P, B P)."""
        return torch.stack([block for _, block in input_normals(self.geometry, self.g, self.w.sqrt())])


def solve_rows(rows: WeightedRows) -> tuple[Tensor, Tensor]:
    """The least squares solution and the standard deviation of each value, of the input's shape."""
    solver = _Solver.create(rows)
    return solver.solution(), solver.deviation()


def solve_robustly(rows: WeightedRows) -> tuple[Tensor, Tensor]:
    """The same where the gradient rows of some filters are far noisier than was thought.

    A filter with a wrong bit in its output gradient misses by far, the others do not. Iteratively reweighted least
    squares: the variance of a filter's rows is what was thought, times their mean chi^2 where that is more than 1.
    """
    solver = _Solver.create(rows)
    x, last = solver.solution(), torch.ones(())
    for _ in range(REWEIGHTED):
        misfit = _misfit(rows, x)
        misfit = (misfit / misfit.median().clamp_min(1.0)).clamp_min(1.0)
        if float(misfit.max()) < OUTLIER or float((misfit / last).log().abs().max()) < SETTLED:
            break
        last = misfit
        solver = _Solver.create(replace(rows, w=rows.w / misfit))
        x = solver.solution()
    return x, solver.deviation()


def _misfit(rows: WeightedRows, x: Tensor) -> Tensor:
    """Mean of what each filter's gradient rows miss in units of their noise, squared, (F, 1, ...)."""
    r = rows.seen - apply_gradient(rows.geometry, x, rows.g)
    return (rows.w * r.square()).mean(tuple(range(1, r.ndim)), keepdim=True)


@dataclass(frozen=True)
class _Solver:
    """The inverse of N where it is small, else about that inverse for conjugate gradients on rows that they bear."""

    rows: WeightedRows
    inverse: Tensor | None
    precondition: Apply

    @classmethod
    def create(cls, rows: WeightedRows) -> _Solver:
        """Factor what is to be factored."""
        if rows.shape.numel() <= DIRECT_UP_TO:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(_matrix(rows, rows.blocks())))
            return cls(rows, inverse, lambda v: (inverse @ v.flatten()).reshape(v.shape))
        live = (rows.v > 0).flatten(1)
        known = int(live.sum())
        if known <= WOODBURY_UP_TO and known * rows.shape.numel() <= ROWS_UP_TO:
            return cls(rows, None, _woodbury(rows, rows.blocks(), live))
        rows, precondition = _by_diagonal(rows)
        return cls(rows, None, precondition)

    def solution(self) -> Tensor:
        """Of least squares."""
        return self._solve(self.rows.right, TOLERANCE)

    def deviation(self) -> Tensor:
        """Standard deviation of each value, exact or from a few errors drawn."""
        if self.inverse is not None:
            return self.inverse.diagonal().clamp_min(0).sqrt().reshape(self.rows.shape)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.stack([self._solve(self.rows.draw(generator), ROUGH) for _ in range(DRAWS)]).square().mean(0)
        # The draws are few: a variance is at least half the median of its channel, which a value that nothing fixes
        # leaves as it is.
        typical = drawn.flatten(2).median(2).values.reshape(*drawn.shape[:2], *(1,) * self.rows.geometry.ndim)
        return torch.maximum(drawn, typical / 2).sqrt()

    def _solve(self, right: Tensor, tolerance: float) -> Tensor:
        if self.inverse is not None:
            return self.precondition(right)
        normal = self.rows.normal
        return conjugate_gradients(normal, right, self.precondition, tolerance=tolerance, iterations=ITERATIONS)[0]


def _matrix(rows: WeightedRows, blocks: Tensor) -> Tensor:
    """``N`` (n, n)."""
    geometry, batch = rows.geometry, len(rows.g)
    size, width = geometry.n_input, geometry.in_channels * geometry.n_input
    matrix = rows.v.new_zeros(batch * width, batch * width)
    for channel, block in enumerate(blocks):
        start = torch.arange(batch, device=block.device)[:, None] * width + channel * size
        places = (start + torch.arange(size, device=block.device)).flatten()
        matrix[places[:, None], places] += block
    for b in range(batch):
        if bool((rows.v[b] > 0).any()):
            mine = slice(b * width, (b + 1) * width)
            matrix[mine, mine] += _output_normal(rows.rule, rows.v[b])
    matrix.diagonal().add_(rows.prior)
    return matrix


def _output_normal(rule: ConvRule, v: Tensor) -> Tensor:
    r"""``A^T V A`` of one sample, v (F, \*out): rows of A have few entries where the kernel is small."""
    live = v > 0
    if v.device.type != "cpu" or 2 * rule.geometry.n_taps > rule.geometry.n_input:
        a = dense_rows(rule, live.flatten()) * v[live].sqrt()[:, None]
        return own_product(a)
    matrix = csr_array(sparse_rows(rule, live), rule.geometry.in_channels * rule.geometry.n_input)
    weighted = matrix.multiply(v[live].numpy()[:, None]).tocsr()
    return torch.from_numpy((matrix.T @ weighted).toarray()).to(v)


def _woodbury(rows: WeightedRows, blocks: Tensor, live: Tensor) -> Apply:
    """``N^-1 = D^-1 - D^-1 A^T (V^-1 + A D^-1 A^T)^-1 A D^-1``, ``D = B^T W B + prior + shift = L L^T``."""
    geometry, (channels, size) = rows.geometry, blocks.shape[:2]
    batch = len(rows.g)
    factor = _shifted_cholesky(blocks, rows.prior)
    count = [int(n) for n in live.sum(1)]
    a = rows.v.new_zeros(batch, channels, geometry.n_input, sum(count))
    for b, (mine, place) in enumerate(zip(live, torch.arange(sum(count)).split(count), strict=True)):
        if len(place):
            a[b, :, :, place] = dense_rows(rows.rule, mine).mT.reshape(channels, geometry.n_input, -1)
    a = a.transpose(0, 1).reshape(channels, size, -1)  # (C, B P, outputs)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    inner = own_product(half.reshape(channels * size, -1))
    inner.diagonal().add_(1 / rows.v.flatten(1)[live])
    small = torch.linalg.cholesky(inner)

    def apply(x: Tensor) -> Tensor:
        by_channel = x.reshape(batch, channels, -1).transpose(0, 1).reshape(channels, size, 1)
        first = torch.linalg.solve_triangular(factor, by_channel, upper=False)
        pulled = half.reshape(channels * size, -1).mT @ first.reshape(-1, 1)
        pushed = half @ torch.cholesky_solve(pulled, small)
        solved = torch.linalg.solve_triangular(factor.mT, first - pushed, upper=True)
        back: Tensor = solved.reshape(channels, batch, -1).transpose(0, 1).reshape(x.shape)
        return back

    return apply


def _by_diagonal(rows: WeightedRows) -> tuple[WeightedRows, Apply]:
    """The rows with no weight beyond what conjugate gradients bear, and the inverse of ``B^T W B + diag(A^T V A)``.

    A row of B touches one channel and one stride phase, so that these decouple.
    """
    geometry, squares = rows.geometry, rows.rule.weight.square()
    curvature = apply_weight_adjoint(geometry, rows.g.square(), rows.w)
    if bool((rows.v > 0).any()):
        unit = float(apply_weight_adjoint(geometry, (rows.v > 0).to(rows.v), squares).mean())
        rows = replace(rows, v=rows.v.clamp_max(MOST_WEIGHT * float(curvature.mean()) / max(unit, 1e-300)))
    diagonal = apply_weight_adjoint(geometry, rows.v, squares) + rows.prior
    diagonal = diagonal.clamp_min(SHIFT * float(curvature.mean())).transpose(0, 1).flatten(2)
    parts = [(place, _phase_inverse(rows, phase, diagonal[..., place])) for phase, place in _phases(geometry, rows.g)]

    def apply(x: Tensor) -> Tensor:
        by_channel = x.transpose(0, 1).flatten(2)
        solved = torch.empty_like(by_channel)
        for place, inverse in parts:
            solved[..., place] = inverse(by_channel[..., place])
        return solved.transpose(0, 1).reshape(x.shape)

    return rows, apply


def _phases(geometry: ConvGeometry, like: Tensor) -> list[tuple[Phase, Tensor]]:
    """Each stride phase and its flat input positions."""
    return [(phase, phase_places(geometry, (phase,), like.device)[0]) for phase in geometry.phases]


def _phase_inverse(rows: WeightedRows, phase: Phase, diagonal: Tensor) -> Apply:
    """``v -> (R^T R + D)^-1 v`` channel by channel for one stride phase, D and v (C, B, positions).

    With fewer rows than values by ``D^-1 - Q^T Q``, ``Q = L^-1 R D^-1``, ``1 + R D^-1 R^T = L L^T`` (Woodbury).
    """
    geometry, taps = rows.geometry, [window.tap for window in tap_windows(rows.geometry, phase)]
    d = diagonal.flatten(1)
    if not taps:
        return lambda v: v / diagonal
    filters = geometry.out_channels // geometry.groups
    by_group = [phase_rows(geometry, phase, group_filters(geometry, rows.g, group)) for group in range(geometry.groups)]
    weight = rows.w.sqrt().flatten(2)[..., taps].unflatten(0, (geometry.groups, filters))  # (groups, F/g, C/g, taps)
    weight = weight.transpose(1, 2).reshape(geometry.in_channels, -1, 1)
    shared = torch.stack(by_group).repeat_interleave(geometry.in_channels // geometry.groups, 0)
    r = shared * weight  # (C, rows, values)
    if r.shape[1] < r.shape[2]:
        inner = (r / d[:, None]) @ r.mT
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        q = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), r / d[:, None], upper=False)
        return lambda v: v / diagonal - (q.mT @ (q @ v.flatten(1)[:, :, None])).reshape(v.shape)
    normal = r.mT @ r
    normal.diagonal(dim1=1, dim2=2).add_(d)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
    return lambda v: (inverse @ v.flatten(1)[:, :, None]).reshape(v.shape)


def _shifted_cholesky(blocks: Tensor, prior: float) -> Tensor:
    """Of blocks that may be singular."""
    shift = prior + SHIFT * float(blocks.diagonal(dim1=1, dim2=2).mean())
    for power in range(SHIFTS):
        shifted = blocks + 10**power * shift * torch.eye(blocks.shape[-1]).to(blocks)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed.any()):
            root: Tensor = factor
            return root
    raise LinAlgError("blocks that are not positive semi-definite")  # or not finite


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

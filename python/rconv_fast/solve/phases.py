"""Direct solution of the gradient constraints by stride phases, all channels as right-hand sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.geometry import Phase
from rconv_fast.solve.dense import solve_rank_revealing
from rconv_fast.solve.gram import (
    GramFactor,
    PhaseFactor,
    gather_phase,
    gram_condition,
    group_filters,
    output_gram,
    phase_gram,
    phase_index,
    phase_rows,
    scatter_phase,
    tap_windows,
)
from rconv_fast.solve.krylov import refine
from rconv_fast.solve.rows import GradientRows, System
from rconv_fast.solve.solution import Solution

# The Cholesky factor of the Gram matrix is exact enough to precondition while condition^2 * eps is small; the
# recomputed residuals then bring full accuracy. Above this the phase goes to the rank-revealing SVD.
MAX_CHOLESKY_CONDITION = 1e6


@dataclass(frozen=True)
class PhaseCount:
    """Rows and unknowns of one channel in one stride phase: the papers' count, where it really applies."""

    phase: Phase
    rows: int
    unknowns: int


def count_phases(rows: GradientRows) -> list[PhaseCount]:
    """Count rows (live filters times offsets) and unknowns of every phase of every group."""
    geometry, batch = rows.geometry, len(rows.grad_output)
    live = rows.live_filters.reshape(geometry.groups, -1).sum(dim=1).tolist()
    return [
        PhaseCount(phase, filters * len(tap_windows(geometry, phase)), batch * phase.n_positions)
        for filters in live
        for phase in geometry.phases
    ]


def direct_bytes(rows: GradientRows) -> int:
    """Memory that `solve_by_phases` will take: H, one Gram matrix and its copy, the factors of all phases."""
    geometry, batch = rows.geometry, len(rows.grad_output)
    output_gram_size = (batch * geometry.n_output) ** 2
    phase_sizes = [(batch * phase.n_positions) ** 2 for phase in geometry.phases]
    values = output_gram_size + 2 * max(phase_sizes) + geometry.groups * sum(phase_sizes)
    return rows.rhs.element_size() * values


def solve_by_phases(rows: GradientRows, shape: torch.Size, rtol: float) -> Solution:
    """Solve ``B x = dW``: Cholesky of each phase's Gram matrix with refinement, the SVD where not safe."""
    geometry, per_group = rows.geometry, rows.geometry.in_channels // rows.geometry.groups
    x = rows.rhs.new_zeros(shape)
    determined = torch.ones(shape, dtype=torch.bool, device=x.device)
    factors: list[PhaseFactor] = []
    rank, condition = 0, 1.0
    counts = iter(count_phases(rows))
    for group in range(geometry.groups):
        channels = slice(group * per_group, (group + 1) * per_group)
        grad_output = group_filters(geometry, rows.grad_output, group)
        h = output_gram(grad_output)
        for phase in geometry.phases:
            count = next(counts)
            if count.rows >= count.unknowns:
                factor, kappa = _safe_factor(phase_gram(geometry, phase, h), phase, channels)
                if factor is not None:
                    factors.append(factor)
                    rank, condition = rank + count.unknowns * per_group, max(condition, kappa)
                    continue
            matrix = phase_rows(geometry, phase, grad_output)
            dense = solve_rank_revealing(matrix, _phase_rhs(rows, phase, group), rtol)
            scatter_phase(x[:, channels], phase, dense.x)
            fixed = determined[:, channels][phase_index(phase)]
            fixed &= dense.determined.reshape(shape[0], 1, *(len(p) for p in phase.positions))
            rank, condition = rank + dense.rank * per_group, max(condition, dense.condition)
    system = System(shape, (rows,))
    iterations = 0
    if factors:
        inverse = GramFactor(tuple(factors), ())
        rhs = [rows.rhs - rows.apply(x)]
        result = refine(system, inverse.solve, rhs=rhs, inner_rtol=1e-12, rtol=rtol, max_iterations=30)
        for part in factors:  # the SVD's phases keep their minimum-norm values
            scatter_phase(x[:, part.channels], part.phase, gather_phase(result.x[:, part.channels], part.phase))
        iterations = result.iterations
    return Solution(
        x=x,
        rank=rank,
        unknowns=system.unknowns,
        rows=rows.count,
        determined=determined,
        residual=system.residual(x),
        condition=condition,
        solver="phase-cholesky" if len(factors) == geometry.groups * len(geometry.phases) else "phase-svd",
        converged=True,
        iterations=iterations,
    )


def _safe_factor(gram: Tensor, phase: Phase, channels: slice) -> tuple[PhaseFactor | None, float]:
    """The factor of a phase's Gram matrix and the condition of its rows; None where it would be too inexact."""
    cholesky, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:  # synchronize!
        return None, math.inf
    factor = PhaseFactor.create(phase, channels, cholesky)
    condition = gram_condition(gram, factor.solve)
    return factor if condition < MAX_CHOLESKY_CONDITION else None, condition


def _phase_rhs(rows: GradientRows, phase: Phase, group: int) -> Tensor:
    """Right-hand sides of the rows of `phase_rows`, one column a channel of the group."""
    n = rows.geometry.out_channels // rows.geometry.groups
    rhs = rows.rhs[group * n : (group + 1) * n].flatten(2)
    taps = [window.tap for window in tap_windows(rows.geometry, phase)]
    return rhs[:, :, taps].transpose(1, 2).reshape(n * len(taps), rhs.shape[1])

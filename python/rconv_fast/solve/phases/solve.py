"""Direct solution of the gradient constraints by stride phases, all channels as right-hand sides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry, Phase
from rconv_fast.solve.dense import solve_rank_revealing
from rconv_fast.solve.krylov import refine
from rconv_fast.solve.phases.factors import STACK_BYTES, GramFactor, PhaseFactor, PhaseStack, phase_stacks
from rconv_fast.solve.phases.gram import gram_condition, group_filters, output_gram, phase_gram, phase_rows, tap_windows
from rconv_fast.solve.rows import GradientRows, System, norm
from rconv_fast.solve.solution import Evidence, Solution

# The Cholesky factor of the Gram matrix is exact enough to precondition while condition^2 * eps is small; the
# recomputed residuals then bring full accuracy. Above this the phase goes to the rank-revealing SVD.
MAX_CHOLESKY_CONDITION = 1e6
# Entries of the right-hand sides that are solved for at once: those of more channels would leave the cache.
TOGETHER = 1 << 21


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
    """Memory that `solve_by_phases` will take: H, a stack of Gram matrices and its copy, the factors of all phases."""
    geometry, batch, element = rows.geometry, len(rows.grad_output), rows.rhs.element_size()
    output_gram_bytes = element * (batch * geometry.n_output) ** 2
    phase_bytes = [element * (batch * phase.n_positions) ** 2 for phase in geometry.phases]
    stack_bytes = max(*phase_bytes, min(sum(phase_bytes), STACK_BYTES))
    return output_gram_bytes + 2 * stack_bytes + geometry.groups * sum(phase_bytes)


def solve_by_phases(rows: GradientRows, shape: torch.Size, rtol: float) -> Solution:
    """Solve ``B x = dW``: Cholesky of each phase's Gram matrix with refinement, the SVD where not safe."""
    geometry, per_group = rows.geometry, rows.geometry.in_channels // rows.geometry.groups
    x = rows.rhs.new_zeros(shape)
    determined = torch.ones(shape, dtype=torch.bool, device=x.device)
    factors: list[PhaseFactor] = []
    rank, condition = 0, 1.0
    counts, n_phases = count_phases(rows), len(geometry.phases)
    for group in range(geometry.groups):
        of_group = counts[group * n_phases : (group + 1) * n_phases]
        grad_output = group_filters(geometry, rows.grad_output, group)
        found = _factor_group(geometry, grad_output, group, [c.phase for c in of_group if c.rows >= c.unknowns])
        factors += [factor for factor, _ in found]
        rank += sum(factor.matrix.shape[:2].numel() for factor, _ in found) * per_group
        condition = max([condition, *(kappa for _, kappa in found)])
        done = {phase for factor, _ in found for phase in factor.stack.phases}
        for phase in (c.phase for c in of_group if c.phase not in done):
            stack = PhaseStack.create(geometry, [phase], group, x.device)
            matrix = phase_rows(geometry, phase, grad_output)
            dense = solve_rank_revealing(matrix, _phase_rhs(rows, phase, group), rtol)
            stack.scatter(x, dense.x[None])
            stack.scatter(determined, dense.determined[None, :, None].expand(-1, -1, per_group))
            rank, condition = rank + dense.rank * per_group, max(condition, dense.condition)
    inverse = GramFactor(tuple(factors))
    iterations, missed, seen = 0, 0.0, 0.0
    for channels, part in _channel_parts(rows):
        some = x[:, channels]
        if factors:
            system, rhs = System(some.shape, (part,)), [part.rhs - part.apply(some)]
            result = refine(system, inverse.solve, rhs=rhs, inner_rtol=1e-12, rtol=rtol, max_iterations=30)
            for factor in factors:  # the SVD's phases keep their minimum-norm values
                factor.stack.scatter(some, factor.stack.gather(result.x))
            iterations = max(iterations, result.iterations)
        missed = math.hypot(missed, norm([part.rhs - part.apply(some)]))
        seen = math.hypot(seen, norm([part.rhs]))
    direct = sum(len(factor.stack.phases) for factor in factors) == len(counts)
    evidence = Evidence(
        rank=rank,
        unknowns=math.prod(shape),
        rows=rows.count,
        residual=missed / seen if seen > 0 else 0.0,
        condition=condition,
        solver="phase-cholesky" if direct else "phase-svd",
        proof="cholesky" if direct else "eigenvalues",
        iterations=iterations,
    )
    return Solution(x, determined, evidence)


def _channel_parts(rows: GradientRows) -> Iterator[tuple[slice, GradientRows]]:
    """The rows of some channels at a time: one matrix serves all of them, so that none waits for another."""
    geometry = rows.geometry
    together = max(1, TOGETHER // (geometry.out_channels * geometry.n_taps))
    if geometry.groups > 1 or together >= geometry.in_channels:
        yield slice(None), rows
        return
    for first in range(0, geometry.in_channels, together):
        channels = slice(first, min(first + together, geometry.in_channels))
        part = replace(geometry, in_channels=channels.stop - first)
        yield channels, replace(rows, geometry=part, rhs=rows.rhs[:, channels])


def _factor_group(
    geometry: ConvGeometry, grad_output: Tensor, group: int, phases: list[Phase]
) -> list[tuple[PhaseFactor, float]]:
    """The factors of those phases of one group whose rows are well conditioned, and their largest condition.

    In float64, as they decide the rank.
    """
    h = output_gram(grad_output.double())
    found = []
    for stack in phase_stacks(geometry, phases, group, grad_output):
        gram = torch.stack([phase_gram(geometry, phase, h) for phase in stack.phases])
        cholesky, info = torch.linalg.cholesky_ex(gram)
        definite = info == 0
        one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = PhaseFactor.create(stack, torch.where(definite[:, None, None], cholesky, one))
        conditions = torch.where(definite, gram_condition(gram, factor.solve), math.inf).tolist()  # synchronize!
        kept = [kappa < MAX_CHOLESKY_CONDITION for kappa in conditions]
        if any(kept):
            found.append((factor.only(kept), max(itertools.compress(conditions, kept))))
    return found


def _phase_rhs(rows: GradientRows, phase: Phase, group: int) -> Tensor:
    """Right-hand sides of the rows of `phase_rows`, one column a channel of the group."""
    n = rows.geometry.out_channels // rows.geometry.groups
    rhs = rows.rhs[group * n : (group + 1) * n].flatten(2)
    taps = [window.tap for window in tap_windows(rows.geometry, phase)]
    return rhs[:, :, taps].transpose(1, 2).reshape(n * len(taps), rhs.shape[1])

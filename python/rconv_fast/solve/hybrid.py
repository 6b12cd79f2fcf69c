"""Gradient and weight constraints together: balanced, preconditioned, matrix-free (method, section 4).

The cost model. One product with M costs the convolutions' flops and is the unit; what decides is the number
of iterations, and that the preconditioner:

* ``phase-cholesky`` when the gradient rows cover most unknowns: a factor of n^3/3 flops for each stride phase
  of n unknowns, shared by all channels, leaves few iterations for the weight rows;
* ``dissection`` when the weight rows are nearly square, hence ill-conditioned, and their factor is cheap: with a sketch
  of the gradient rows it inverts the system up to rounding, and a few iterations suffice;
* ``inverse`` on a GPU, for systems so small that inverting ``M^T M`` takes less than a few iterations' launches;
* ``jacobi`` otherwise, in float32 for large systems; where it has not converged when it has cost as much as a
  dissection would, the dissection takes over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.solve.dense import PseudoInverse
from rconv_fast.solve.dissection.factor import DissectionFactor
from rconv_fast.solve.dissection.sketch import sketch_size
from rconv_fast.solve.krylov import KrylovResult, Preconditioner, Progress, refine
from rconv_fast.solve.phases.solve import count_phases
from rconv_fast.solve.preconditioners import SketchedDissection, gradient_blocks, jacobi, normal_inverse, phase_cholesky
from rconv_fast.solve.rank import MAX_FACTORED_UNKNOWNS, Accept, Recover, factored_condition, probe, touched
from rconv_fast.solve.rows import GradientRows, MapRows, System, WeightRows
from rconv_fast.solve.solution import Evidence, Solution

# Share of a channel's unknowns that the gradient rows must cover for factoring them to pay.
GRADIENT_COVERAGE = 0.6
# Largest phase (unknowns of one channel, all samples) whose Gram matrix is factored as a preconditioner.
MAX_FACTORED_PHASE = 8192
# Systems with fewer equations an unknown than this are ill-conditioned enough for a dissection to pay, if its
# flops are below the limit (a few seconds) and its memory below the other.
NEARLY_SQUARE = 1.6
MAX_DISSECTION_FLOPS, MAX_DISSECTION_BYTES = 1e12, 3e9
# Dissections this small are tried first; larger ones after the Jacobi iteration has had its chance.
CHEAP_DISSECTION_FLOPS = 5e9
# Largest system whose normal matrix is inverted; on a CPU the other ways are faster from a few hundred values on.
MAX_INVERTED_UNKNOWNS = {"cpu": 0, "cuda": 4096}
# Largest system that is decided by eigenvalues when the iterations leave its rank open: a few seconds on two cores.
MAX_DENSE_UNKNOWNS = 3072
# Above this many unknowns the inner iterations run in float32 (four times faster convolutions on a CPU).
MIXED_PRECISION_UNKNOWNS = 20_000
MAX_ITERATIONS, MAX_MIXED_ITERATIONS = 2000, 5000
# With fewer equations than unknowns the answer is a choice anyway.
MAX_OPEN_ITERATIONS = 1000
# Data asked to be solved less precisely than this are noisy.
NOISY = 1e-12
# The residual is recomputed each time it has fallen this much; float32 products drift sooner.
REPLACEMENT, MIXED_REPLACEMENT = 1e-9, 0.02
# Up to this residual, what float32 products leave is not worth iterations in float64, three times as long each.
MIXED_ENOUGH = 1e-12
# Systems with more unknowns than this are solved to this residual: the last digits would cost a tenth of the time.
LARGE_UNKNOWNS, LARGE_RTOL = 100_000, 1e-13


@dataclass(frozen=True)
class Plan:
    """What the cost model chose: preconditioner, precision, weight of the gradient rows, iterations."""

    preconditioner: str
    gradient_weight: float
    mixed: bool = False
    max_iterations: int = MAX_ITERATIONS

    @property
    def name(self) -> str:
        """As the report quotes it."""
        return f"cgls+{self.preconditioner}" + ("+float32" if self.mixed else "")


def plans(system: System, rtol: float, max_iterations: int | None = None) -> Iterator[Plan]:
    """The plans for a system, cheapest first; each next one is for when the last did not converge."""
    mixed = system.unknowns >= MIXED_PRECISION_UNKNOWNS
    budget = MAX_MIXED_ITERATIONS if mixed else MAX_ITERATIONS
    if system.count < system.unknowns:
        budget = MAX_OPEN_ITERATIONS
    budget = budget if max_iterations is None else min(budget, max_iterations)
    if _worth_inverting(system):
        yield Plan("inverse", 1.0, False, budget)
    if system.support is None and coverage(system) >= GRADIENT_COVERAGE:
        # A large weight of the gradient rows costs no iterations: the preconditioner inverts them exactly.
        yield Plan("phase-cholesky", 1e3, mixed, budget)
        return
    flops = _dissection_flops(system)
    # The dissection takes a sketch of the gradient rows; rounded gradients are better served by all of them.
    by_dissection = Plan("dissection", 1.0)
    exact = rtol < NOISY
    if exact and flops <= CHEAP_DISSECTION_FLOPS:
        yield by_dissection
    yield Plan("jacobi", _equal_rows(system), mixed, budget if flops > MAX_DISSECTION_FLOPS else budget // 2)
    if (not exact or flops > CHEAP_DISSECTION_FLOPS) and flops <= MAX_DISSECTION_FLOPS:
        yield by_dissection


def _worth_inverting(system: System) -> bool:
    """Whether the inverse of the normal matrix may exist, takes little time and keeps some digits."""
    like = system.rhs[0]
    if system.support is not None or like.dtype != torch.float64:
        return False
    if any(isinstance(block, MapRows) for block in system.blocks):  # known by products only, one for each column
        return False
    return system.unknowns <= MAX_INVERTED_UNKNOWNS.get(like.device.type, 0) and system.count >= system.unknowns


def coverage(system: System) -> float:
    """Share of one channel's unknowns that the gradient rows could fix, phase by phase; 0 where too large."""
    gradient = gradient_blocks(system)
    if not gradient:
        return 0.0
    phases = zip(*(count_phases(block) for block in gradient), strict=True)
    counts: list[tuple[int, int]] = [(sum(c.rows for c in phase), phase[0].unknowns) for phase in phases]
    if max(unknowns for _, unknowns in counts) > MAX_FACTORED_PHASE:
        return 0.0
    return sum(min(rows, unknowns) for rows, unknowns in counts) / sum(unknowns for _, unknowns in counts)


def _equal_rows(system: System) -> float:
    """The weight that gives gradient rows the size of the other rows.

    A few gradient rows that weigh as much as all others together are as many large singular values, each of which
    costs the iteration a step.
    """
    gradient = sum(block.count for block in system.blocks if isinstance(block, GradientRows))
    others = sum(block.count for block in system.blocks) - gradient
    return min(1.0, gradient / others) if others else 1.0


def _dissection_flops(system: System) -> float:
    """Cost of dissecting the weight rows; infinite where that cannot or need not be done."""
    blocks = [block for block in system.blocks if isinstance(block, WeightRows)]
    if system.support is not None or len(blocks) != 1 or system.count > NEARLY_SQUARE * system.unknowns:
        return math.inf
    (block,) = blocks
    if block.count < 0.9 * system.unknowns:
        return math.inf
    memory, flops = DissectionFactor.estimate(block.geometry, row_weights=not block.uniform)
    samples = 1 if block.uniform else system.shape[0]
    total = memory * samples + 2 * 8 * sketch_size(system.shape) * system.unknowns
    return float(flops) * samples if total <= MAX_DISSECTION_BYTES else math.inf


def solve_hybrid(
    system: System, *, rtol: float, max_iterations: int | None = None, progress: Progress | None = None
) -> Solution:
    """Solve all blocks together; the rank is computed where it is in doubt and can be.

    Nothing is said to be determined where the iterations did not suffice.
    """
    open_anyway = system.count < system.unknowns
    exact = math.prod(system.shape) <= MAX_DENSE_UNKNOWNS
    if exact and open_anyway:
        return _solve_dense(balance(system, 1.0), rtol)
    best: tuple[KrylovResult, float, Built, System] | None = None
    for plan in plans(system, rtol, max_iterations):
        balanced = balance(system, plan.gradient_weight)
        built = _build(balanced, plan)
        if built is None:
            continue
        result = _iterate(built, rtol, progress)
        residual = balanced.residual(result.x)
        if best is None or residual < best[1]:
            best = result, residual, built, balanced
        if result.converged:
            break
    assert best is not None
    result, residual, built, balanced = best
    enough = not open_anyway and bool(touched(balanced).all())
    if exact and not (enough and result.converged):
        return _solve_dense(balance(system, 1.0), rtol)
    condition = math.nan
    if not result.converged:
        determined, proof = torch.zeros(balanced.shape, dtype=torch.bool, device=result.x.device), "none"
    elif built.proven:
        determined, proof = touched(balanced), "cholesky"
    elif exact and balanced.unknowns <= MAX_FACTORED_UNKNOWNS:
        condition = factored_condition(balanced)
        determined, proof = touched(balanced) & math.isfinite(condition), "cholesky"
    else:
        determined, proof = probe(built.system, _recover(built, result.iterations)), "probe"
    full = bool(determined.all())
    if exact and not full:  # for the rank itself, and the minimum norm
        return _solve_dense(balance(system, 1.0), rtol)
    evidence = Evidence(
        rank=balanced.unknowns if full else min(balanced.count, balanced.unknowns - 1),
        unknowns=balanced.unknowns,
        rows=balanced.count,
        residual=residual,
        condition=condition,
        solver=built.plan.name,
        proof=proof if bool(determined.any()) else "none",
        converged=result.converged,
        iterations=result.iterations,
    )
    return Solution(result.x, determined, evidence)


def balance(system: System, gradient_weight: float) -> System:
    """Scale every block to mean column norm 1 (gradient rows to the root of `gradient_weight`)."""
    blocks = []
    for block in system.blocks:
        mean = float(block.diagonal().mean())
        weight = gradient_weight if isinstance(block, GradientRows) else 1.0
        blocks.append(block.scaled(math.sqrt(weight / mean)) if mean > 0 else block)
    return System(system.shape, tuple(blocks), system.support)


@dataclass(frozen=True)
class Built:
    """A plan carried out: equations, their preconditioner, and whether building it proved that they have full rank."""

    plan: Plan
    system: System
    preconditioner: Preconditioner
    proven: bool = False


def _build(system: System, plan: Plan) -> Built | None:
    """The planned preconditioner, or Jacobi where its factorisation fails; None for a failed inverse."""
    dtype = torch.float32 if plan.mixed else system.rhs[0].dtype
    if plan.preconditioner == "inverse":
        inverse = normal_inverse(system)
        return None if inverse is None else Built(plan, system, inverse, proven=True)
    if plan.preconditioner == "phase-cholesky":
        by_phase = phase_cholesky(system, dtype)
        if by_phase is not None:
            return Built(plan, system, by_phase)
    elif plan.preconditioner == "dissection":
        dissection = SketchedDissection.create(system)
        if dissection is not None:
            return Built(plan, dissection.system, dissection, dissection.proven)
    return Built(replace(plan, preconditioner="jacobi"), system, jacobi(system, dtype))


def _iterate(built: Built, rtol: float, progress: Progress | None) -> KrylovResult:
    """Float32 products first where the plan says so; what they leave is finished in float64."""
    system, budget = built.system, built.plan.max_iterations
    if not built.plan.mixed:
        return refine(
            system,
            built.preconditioner,
            inner_rtol=REPLACEMENT,
            rtol=rtol,
            max_iterations=budget,
            progress=progress,
        )
    coarse = refine(
        system,
        built.preconditioner,
        inner_dtype=torch.float32,
        inner_rtol=MIXED_REPLACEMENT,
        rtol=max(rtol, LARGE_RTOL) if system.unknowns > LARGE_UNKNOWNS else rtol,
        max_iterations=budget,
        progress=progress,
    )
    settled = coarse.converged and rtol > NOISY  # float32 products are finer than the noise
    if settled or coarse.residual <= max(rtol, MIXED_ENOUGH) or coarse.iterations >= budget:
        return coarse
    rhs = [b - q for b, q in zip(system.rhs, system.apply(coarse.x), strict=True)]
    fine = refine(
        system,
        built.preconditioner,
        rhs=rhs,
        inner_rtol=REPLACEMENT,
        rtol=rtol / coarse.residual,
        max_iterations=budget - coarse.iterations,
        progress=progress,
    )
    return KrylovResult(
        coarse.x + fine.x, coarse.iterations + fine.iterations, coarse.residual * fine.residual, fine.converged
    )


# A probe knows its answer, looks at it every so many iterations, and may take this much longer than the solve.
PROBE_EVERY, PROBE_PATIENCE = 10, 1.5


def _recover(built: Built, iterations: int) -> Recover:
    """The built solver for other right-hand sides, as a probe wants it, after a solve that took `iterations`."""

    def recover(rhs: list[Tensor], accept: Accept) -> Tensor:
        return refine(
            built.system,
            built.preconditioner,
            rhs=rhs,
            inner_dtype=torch.float32 if built.plan.mixed else None,
            inner_rtol=MIXED_REPLACEMENT if built.plan.mixed else REPLACEMENT,
            rtol=0.0,
            max_iterations=max(PROBE_EVERY, int(PROBE_PATIENCE * iterations)),
            accept=accept,
            accept_every=PROBE_EVERY,
        ).x

    return recover


def _solve_dense(system: System, rtol: float) -> Solution:
    """Decide the rank by eigenvalues of the normal matrix, in float64, then refine with its pseudo-inverse."""
    dtype, system = system.rhs[0].dtype, system.to(torch.float64)
    inverse = PseudoInverse.create(system)
    result = refine(system, inverse.solve, inner_rtol=1e-12, rtol=rtol, max_iterations=50)
    evidence = Evidence(
        rank=inverse.rank,
        unknowns=system.unknowns,
        rows=system.count,
        residual=system.residual(result.x),
        condition=inverse.condition,
        solver="normal-eigh",
        proof="eigenvalues",
        iterations=result.iterations,
    )
    return Solution(result.x.to(dtype), inverse.determined.reshape(system.shape), evidence, inverse)

"""Gradient and weight constraints together: balanced, preconditioned, matrix-free (method, section 4).

What the plan (`rconv_fast.solve.plan`) proposes is carried out until one way converges; the rank is then proven.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.active import solve_with_zeros
from rconv_fast.solve.deflated import DeflatedInverse
from rconv_fast.solve.dense import PseudoInverse, eigen_seconds
from rconv_fast.solve.krylov import NO_LIMIT, KrylovResult, Progress, refine
from rconv_fast.solve.map_rows import ThroughRows
from rconv_fast.solve.plan import JACOBI, NOISY, OUTPUTS, Built, Plan, plans
from rconv_fast.solve.preconditioners import inverse_diagonal
from rconv_fast.solve.rank import MAX_FACTORED_UNKNOWNS, Accept, Recover, contracts, factored_condition, probe, touched
from rconv_fast.solve.rows import System, balance
from rconv_fast.solve.signs import fixed_by_signs
from rconv_fast.solve.solution import Evidence, Solution

# Largest system that is decided by eigenvalues when the iterations leave its rank open: half a minute on two cores
# for one that may yet have full rank, three seconds for one that cannot.
MAX_DENSE_UNKNOWNS, MAX_DENSE_OPEN_UNKNOWNS = 6144, 3072
# The residual is recomputed each time it has fallen this much; float32 products drift sooner.
REPLACEMENT, MIXED_REPLACEMENT = 1e-9, 0.02
# Up to this residual, what float32 products leave is not worth iterations in float64, three times as long each.
MIXED_ENOUGH = 1e-12
# Systems with more unknowns than this are solved to this residual: the last digits would cost a tenth of the time.
LARGE_UNKNOWNS, LARGE_RTOL = 100_000, 1e-13
# Rows that were left out of the iteration, or only sketched, hold up to this many times the residual of the others,
# whose rounding the iteration has made as small as can be.
LEFT_OUT = 1e3
# Holding zeros leads to the answer within so many iterations, or not at all.
MAX_ITERATIONS_WITH_ZEROS = 400


@dataclass(frozen=True)
class Attempt:
    """A plan carried out."""

    plan: Plan
    built: Built
    result: KrylovResult
    residual: float
    zeros_held: bool = False

    def fits(self, rtol: float) -> bool:
        """Whether rows that were left out, or only sketched, hold as well as the others."""
        return self.residual <= LEFT_OUT * max(self.result.residual, rtol)


def solve_hybrid(
    system: System,
    *,
    rtol: float,
    max_iterations: int | None = None,
    nonnegative: bool = False,
    budget: Budget = NO_LIMIT,
    progress: Progress | None = None,
) -> Solution:
    """Solve all blocks together; the rank is computed where it is in doubt and can be.

    Nothing is said to be determined where the iterations did not suffice. That unknowns are `nonnegative` helps to find
    the answer, and to prove it the only one of that kind.
    """
    n = math.prod(system.shape)
    open_anyway = system.count < system.unknowns
    largest = MAX_DENSE_OPEN_UNKNOWNS if open_anyway else MAX_DENSE_UNKNOWNS
    by_products = any(isinstance(block, ThroughRows) for block in system.blocks)  # a product for each column
    exact = n <= largest and eigen_seconds(n) <= budget.left and not by_products
    if exact and open_anyway:
        return _solve_dense(balance(system, 1.0), rtol)
    for proposed in (plans(system, rtol, max_iterations), plans(system, rtol, max_iterations, all_rows=True)):
        best = _best_attempt(system, proposed, rtol, nonnegative, budget, progress)
        determined, proof, condition = _what_is_fixed(system, best, exact, budget)
        full = bool(determined.all())
        if full or best.plan.way is not OUTPUTS:  # else the rows that were left out may fix the rest
            break
    if exact and not full:  # for the rank itself, and the minimum norm
        return _solve_dense(balance(system, 1.0), rtol)
    evidence = Evidence(
        rank=system.unknowns if full and proof != "nonnegative" else min(system.count, system.unknowns - 1),
        unknowns=system.unknowns,
        rows=system.count,
        residual=best.residual,
        condition=condition,
        solver=best.plan.name,
        proof=proof if bool(determined.any()) else "none",
        converged=best.result.converged,
        iterations=best.result.iterations,
    )
    return Solution(best.result.x, determined, evidence)


def _best_attempt(
    system: System,
    proposed: Iterator[Plan],
    rtol: float,
    nonnegative: bool,
    budget: Budget,
    progress: Progress | None,
) -> Attempt:
    """The first way that converges, or else the one with the smallest residual."""
    zeros = nonnegative and rtol < NOISY and system.count >= system.unknowns
    attempts: list[Attempt] = []
    for plan in proposed:
        if attempts and budget.spent:
            break
        balanced = balance(system, plan.way.gradient_weight(system))
        built = plan.way.build(balanced, torch.float32 if plan.mixed else system.rhs[0].dtype)
        if built is None:
            continue
        result = None
        if zeros and plan.way in (JACOBI, OUTPUTS) and plan.mixed:
            result = _iterate_with_zeros(plan, built, rtol, budget, progress)
        held = result is not None
        result = result or _iterate(plan, built, rtol, budget, progress)
        attempts.append(Attempt(plan, built, result, balanced.residual(result.x), held))
        if result.converged and attempts[-1].fits(rtol):
            return attempts[-1]
    return min(attempts, key=lambda attempt: attempt.residual)


def _what_is_fixed(system: System, best: Attempt, exact: bool, budget: Budget) -> tuple[Tensor, str, float]:
    """The values that the equations fix, the proof of it, and the condition number where it was estimated."""
    held = touched(system)
    nothing = torch.zeros_like(held)
    if not best.result.converged or (exact and not bool(held.all())):
        return nothing, "none", math.nan
    if best.built.proven:
        return held, "cholesky", math.nan
    if exact and system.unknowns <= MAX_FACTORED_UNKNOWNS:
        condition = factored_condition(best.built.system)
        return (held if math.isfinite(condition) else nothing), "cholesky", condition
    quick = best.result.iterations <= MAX_QUICK_ITERATIONS
    if quick and contracts(best.built.system, best.built.preconditioner):
        return held, "cholesky", math.nan
    if best.zeros_held and bool(held.all()) and _follows_from_signs(best, budget):
        return held, "nonnegative", math.nan
    return probe(best.built.system, _recover(best, budget)), "probe", math.nan


def _follows_from_signs(best: Attempt, budget: Budget) -> bool:
    """Whether an answer with zeros is the only one without negative values."""
    return fixed_by_signs(
        best.built.system,
        best.result.x == 0,
        inverse_diagonal(best.built.system, torch.float32),
        inner_dtype=torch.bfloat16,
        max_iterations=best.result.iterations,
        budget=budget,
    )


def _iterate_with_zeros(
    plan: Plan, built: Built, rtol: float, budget: Budget, progress: Progress | None
) -> KrylovResult | None:
    """The zeros of a ReLU held during the iteration; None where that does not lead to an answer of all equations."""
    return solve_with_zeros(
        built.system,
        inverse_diagonal(built.system, torch.float32),
        inner_dtype=torch.bfloat16,
        rtol=max(rtol, LARGE_RTOL),
        max_iterations=min(plan.max_iterations, MAX_ITERATIONS_WITH_ZEROS),
        budget=budget,
        progress=progress,
    )


def _iterate(plan: Plan, built: Built, rtol: float, budget: Budget, progress: Progress | None) -> KrylovResult:
    """Float32 products first where the plan says so; what they leave is finished in float64."""
    system, most = built.system, plan.max_iterations
    if not plan.mixed:
        return refine(
            system,
            built.preconditioner,
            inner_rtol=REPLACEMENT,
            rtol=rtol,
            max_iterations=most,
            budget=budget,
            progress=progress,
            scarce=plan.scarce,
        )
    coarse = refine(
        system,
        built.preconditioner,
        inner_dtype=torch.float32,
        inner_rtol=MIXED_REPLACEMENT,
        rtol=max(rtol, LARGE_RTOL) if system.unknowns > LARGE_UNKNOWNS else rtol,
        max_iterations=most,
        budget=budget,
        progress=progress,
        scarce=plan.scarce,
    )
    settled = coarse.given_up or (coarse.converged and rtol > NOISY)  # float32 products are finer than the noise
    if settled or coarse.residual <= max(rtol, MIXED_ENOUGH) or coarse.iterations >= most or budget.spent:
        return coarse
    rhs = [b - q for b, q in zip(system.rhs, system.apply(coarse.x), strict=True)]
    fine = refine(
        system,
        built.preconditioner,
        rhs=rhs,
        inner_rtol=REPLACEMENT,
        rtol=rtol / coarse.residual,
        max_iterations=most - coarse.iterations,
        budget=budget,
        progress=progress,
    )
    return KrylovResult(
        coarse.x + fine.x, coarse.iterations + fine.iterations, coarse.residual * fine.residual, fine.converged
    )


# A preconditioner that leads to the answer within so many iterations may be near enough to the inverse to prove that
# there is one.
MAX_QUICK_ITERATIONS = 12
# A probe knows its answer, looks at it forty times or more, and may take this much longer than the solve: one that held
# zeros took fewer iterations than a probe, which knows none, needs.
PROBE_EVERY, PROBE_LOOKS, PROBE_PATIENCE, PATIENCE_AFTER_ZEROS = 10, 40, 1.5, 4.0


def _recover(attempt: Attempt, budget: Budget) -> Recover:
    """The same solver for other right-hand sides, as a probe wants it."""
    mixed = attempt.plan.mixed
    patience = PATIENCE_AFTER_ZEROS if attempt.zeros_held else PROBE_PATIENCE

    def recover(rhs: list[Tensor], accept: Accept) -> Tensor:
        return refine(
            attempt.built.system,
            attempt.built.preconditioner,
            rhs=rhs,
            inner_dtype=torch.float32 if mixed else None,
            inner_rtol=MIXED_REPLACEMENT if mixed else REPLACEMENT,
            rtol=0.0,
            max_iterations=max(PROBE_EVERY, int(patience * attempt.result.iterations)),
            accept=accept,
            accept_every=min(PROBE_EVERY, max(1, attempt.result.iterations // PROBE_LOOKS)),
            budget=budget,
        ).x

    return recover


def _solve_dense(system: System, rtol: float) -> Solution:
    """Decide the rank by the normal matrix, in float64, then refine with its pseudo-inverse.

    By Cholesky factors where they suffice and save time, else by eigenvalues.
    """
    dtype, system = system.rhs[0].dtype, system.to(torch.float64)
    inverse: PseudoInverse | DeflatedInverse | None = None
    if system.unknowns > MAX_FACTORED_UNKNOWNS:
        inverse = DeflatedInverse.create(system)
    solver = "normal-eigh" if inverse is None else "normal-cholesky"
    inverse = inverse or PseudoInverse.create(system)
    result = refine(system, inverse.solve, inner_rtol=1e-12, rtol=rtol, max_iterations=50)
    evidence = Evidence(
        rank=inverse.rank,
        unknowns=system.unknowns,
        rows=system.count,
        residual=system.residual(result.x),
        condition=inverse.condition,
        solver=solver,
        proof="cholesky" if solver == "normal-cholesky" and inverse.rank == system.unknowns else "eigenvalues",
        iterations=result.iterations,
    )
    return Solution(result.x.to(dtype), inverse.determined.reshape(system.shape), evidence, inverse)

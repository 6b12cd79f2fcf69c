"""Systems some of whose equations are linear only around an estimate: Gauss-Newton rounds, then one solve that proves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from rconv_fast.solve.hybrid import GRADIENT_COVERAGE, balance, coverage
from rconv_fast.solve.krylov import Preconditioner, refine
from rconv_fast.solve.normalised import TangentRows
from rconv_fast.solve.preconditioners import jacobi, phase_cholesky
from rconv_fast.solve.rows import System
from rconv_fast.solve.solution import Solution

# A round squares the error of the last, down to what its own solve leaves: from this residual on one more is exact.
SMALL = 1e-8
MAX_ROUNDS = 15
# Relative to the residual that a round starts with.
ROUND_RTOL, ROUND_ITERATIONS = 1e-5, 2000


def solve_curved(around: Callable[[Tensor | None], System], solve: Callable[[System], Solution]) -> Solution:
    """Solve ``around(x) = the equations around x`` for the x that satisfies those around itself.

    Parameters
    ----------
    around : callable
        ``around(None)`` are linear equations that hold roughly, ``around(x)`` those that the exact answer satisfies up
        to the square of its distance from x.
    solve : callable
        Solves one linear system and says what it determines.
    """
    system = balance(around(None), 1.0)
    x = refine(
        system, _preconditioner(system), inner_rtol=1e-9, rtol=ROUND_RTOL, max_iterations=ROUND_ITERATIONS
    ).x
    best = float("inf")
    for _ in range(MAX_ROUNDS):
        system = balance(around(x), 1.0)
        residual = system.residual(x)
        if residual <= SMALL or not residual < best / 2:
            break
        best = residual
        miss = [b - q for b, q in zip(system.rhs, system.apply(x), strict=True)]
        step = refine(
            system,
            _preconditioner(system),
            rhs=miss,
            inner_rtol=1e-9,
            rtol=ROUND_RTOL,
            max_iterations=ROUND_ITERATIONS,
        )
        x = x + step.x
    return solve(around(x))


def _preconditioner(system: System) -> Preconditioner:
    """Of the system with g taken as it is at the point."""
    fixed = replace(system, blocks=tuple(b.main if isinstance(b, TangentRows) else b for b in system.blocks))
    by_phase = None
    if system.support is None and coverage(fixed) >= GRADIENT_COVERAGE:
        by_phase = phase_cholesky(fixed, system.rhs[0].dtype)
    return jacobi(fixed, system.rhs[0].dtype) if by_phase is None else by_phase

"""Gauss-Newton on all gradients at once: each step by conjugate gradients, preconditioned by an inverse information."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.estimate.gradient_map import GradientMap, Linearisation, dot
from rconv_fast.solve.conjugate import conjugate_gradients

Apply = Callable[[Tensor], Tensor]

# Fractions of a step tried until the mismatch falls.
DAMPING = (1.0, 0.5, 0.2, 0.05)
# Inner iterations a step, and the fall of the residual at which they end.
ITERATIONS, TOLERANCE = 60, 1e-3
# A step changes the scale by a factor of e at most: its logarithm is a linear unknown only near where it stands, and
# where the noise hides the scale the linear step has no bound at all.
LARGEST_LOG_SCALE = 1.0
# A step that would lower chi^2 by this share of the unknowns moves the answer by far less than its error bars, which
# are as many times larger as the misfit is while bits are wrong.
CONVERGED = 1e-3


@dataclass(frozen=True)
class Fit:
    """Where Gauss-Newton ended: x, log of the scale, chi^2, the decrement of the last step, steps, inner iterations."""

    x: Tensor
    scale: float
    chi2: float
    decrement: float
    steps: int
    iterations: int


def solve_normal(
    at: Linearisation, rhs: Tensor, precondition: Apply, tolerance: float = TOLERANCE, most: int = ITERATIONS
) -> tuple[Tensor, int]:
    """``J^T J d = rhs``; the answer and the iterations."""
    return conjugate_gradients(at.normal, rhs, precondition, tolerance=tolerance, iterations=most)


def gauss_newton(
    problem: GradientMap,
    x: Tensor,
    precondition: Apply,
    *,
    budget: Budget,
    most: int = 8,
    free_scale: bool = False,
) -> Fit:
    """``min_x ||r(x)||^2`` from a start near the answer.

    With the scale free its logarithm is one more unknown, eliminated: with ``b = J^T t``, ``t = dr/dlog c``,
    ``dlog c = -(t - J F^-1 b) . r / ((t - J F^-1 b) . t)``, between -1 and 1.

    Parameters
    ----------
    problem : GradientMap
        Smooth near x: pieces held.
    x : Tensor
        Start.
    precondition : callable
        About ``F^-1 v``.
    budget : Budget
        Ends the steps.
    most : int
        Steps.
    free_scale : bool
        Estimate the common factor too.
    """
    n, iterations, steps, decrement = x.numel(), 0, 0, float("inf")
    at = problem.at(x)
    chi2, entries = dot(at.residual, at.residual), sum(part.numel() for part in at.residual)
    while steps < most and not budget.spent:
        gradient = -at.adjoint(at.residual)
        d, count = solve_normal(at, gradient, precondition)
        log_scale = 0.0
        if free_scale:
            b, further = solve_normal(at, at.adjoint(at.scaled), precondition)
            count += further
            clear = [t - part for t, part in zip(at.scaled, at.forward(b), strict=True)]
            log_scale = _log_scale(-dot(clear, at.residual), dot(clear, at.scaled))
            d = d - log_scale * b
        iterations += count
        decrement = float((gradient * d).sum())
        if free_scale:
            decrement -= log_scale * dot(at.scaled, at.residual)
        for share in DAMPING:
            moved = problem.with_scale(problem.scale * math.exp(share * log_scale))
            new = moved.at(x + share * d)
            size = dot(new.residual, new.residual)
            if size < chi2:
                break
        else:
            break
        steps += 1
        x, at, problem, chi2 = x + share * d, new, moved, size
        if decrement < CONVERGED * n * max(1.0, chi2 / entries):
            break
    return Fit(x, problem.scale, chi2, decrement, steps, iterations)


def _log_scale(slope: float, curvature: float) -> float:
    """``slope / curvature`` within its bounds; zero where the data do not say what the scale is."""
    if not curvature > 0:
        return 0.0
    return min(max(slope / curvature, -LARGEST_LOG_SCALE), LARGEST_LOG_SCALE)

"""The certificate of a pattern: the solve under it leaves no residual, and run forward gives the pattern back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.patterns.problem import Problem
from rconv_fast.solve import Evidence, Solution, System, solve
from rconv_fast.solve.dense import PseudoInverse

# A wrong pattern is certified with at most this chance.
CHANCE = 1e-8


@dataclass(frozen=True)
class Fit:
    """An input, its pattern, by how much it misses what was seen, the evidence, and which values it fixes."""

    x: Tensor
    pattern: Tensor
    misfit: float
    evidence: Evidence
    determined: Tensor

    @property
    def certified(self) -> bool:
        """Whether the pattern is right."""
        return self.evidence.proof == "pattern"


def certify(problem: Problem, pattern: Tensor, x: Tensor) -> Fit | None:
    """Solve all equations under a pattern found at x, every one counting the same; None where something contradicts it.

    No more equations than unknowns would leave nothing to contradict; a wrong pattern meets m more to a relative
    eps with a chance of about eps^m. Where they leave values open under the right pattern, the nearest input to x that
    meets them must give the pattern back.
    """
    system = problem.system(problem.hidden.tight(pattern), x)
    if not _telling(system.count - system.unknowns, problem):
        return None
    solution = solve(system)
    open_ends = not bool(solution.determined.all())
    found = _nearest(system, solution, x) if open_ends else solution.x
    misfit = misfit_of(problem, found)
    of_another = open_ends and not torch.equal(problem.hidden.choose(problem.front.output(found)), pattern)
    if misfit > problem.tolerance or of_another:
        return None
    return Fit(found, pattern, misfit, replace(solution.evidence, proof="pattern"), solution.determined)


def _nearest(system: System, solution: Solution, x: Tensor) -> Tensor:
    """Of all solutions the one nearest to x."""
    null = (solution.inverse or PseudoInverse.create(system)).null
    return solution.x + (null @ (null.mT @ (x - solution.x).reshape(-1, 1))).reshape(x.shape)


def _telling(spare: int, problem: Problem) -> bool:
    """Whether a wrong pattern would be noticed."""
    return spare > 0 and spare * math.log(problem.tolerance) <= math.log(CHANCE)


def unproven(problem: Problem, x: Tensor) -> Fit:
    """An input that a search ended at."""
    pattern = problem.hidden.choose(problem.front.output(x))
    system, misfit = problem.system(problem.hidden.tight(pattern), x), misfit_of(problem, x)
    evidence = Evidence(0, system.unknowns, system.count, misfit, math.nan, "", "none", converged=False)
    return Fit(x, pattern, misfit, evidence, torch.zeros_like(x, dtype=torch.bool))


def misfit_of(problem: Problem, x: Tensor) -> float:
    """The larger of the relative mismatches of values and gradients, by a forward run of x."""
    o = problem.front.output(x)
    seen_again = problem.hidden.tight(problem.hidden.choose(o))
    return max(problem.hidden.misfit(o), problem.gradient_misfit(x, seen_again))

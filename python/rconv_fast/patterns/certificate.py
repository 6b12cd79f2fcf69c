"""The certificate of a pattern: the solve under it leaves no residual, and run forward gives the pattern back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rconv_fast.patterns.problem import Problem
from rconv_fast.solve import Solution, solve


@dataclass(frozen=True)
class Certified:
    """A pattern that is right, the input that proves it, its solve, and by how much it misses what was seen."""

    x: Tensor
    pattern: Tensor
    solution: Solution
    misfit: float


def certify(problem: Problem, pattern: Tensor) -> Certified | None:
    """Solve all equations under a pattern, every one counting the same; None where something contradicts it.

    No more equations than unknowns would leave nothing to contradict.
    """
    system = problem.system(problem.hidden.tight(pattern))
    if system.count <= system.unknowns:
        return None
    solution = solve(system)
    if not bool(solution.determined.all()):
        return None
    misfit = misfit_of(problem, solution.x)
    return Certified(solution.x, pattern, solution, misfit) if misfit <= problem.tolerance else None


def misfit_of(problem: Problem, x: Tensor) -> float:
    """The larger of the relative mismatches of values and gradients, by a forward run of x."""
    o = problem.convolution.output(x)
    seen_again = problem.hidden.tight(problem.hidden.choose(o))
    return max(problem.hidden.misfit(o), problem.gradient_misfit(x, seen_again))

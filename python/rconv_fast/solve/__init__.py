"""One layer's system: blocks of rows, scaling, direct and Krylov solution."""

from __future__ import annotations

from rconv_fast.solve.hybrid import solve_hybrid
from rconv_fast.solve.krylov import Progress
from rconv_fast.solve.phases import count_phases, solve_by_phases
from rconv_fast.solve.prior import PRIORS, apply_prior
from rconv_fast.solve.rows import GradientRows, MapRows, PointRows, Rows, System, WeightRows
from rconv_fast.solve.solution import Solution

__all__ = [
    "PRIORS",
    "SOLVERS",
    "GradientRows",
    "MapRows",
    "PointRows",
    "Rows",
    "Solution",
    "System",
    "WeightRows",
    "apply_prior",
    "solve",
]


SOLVERS = ("auto", "direct", "hybrid")
# Gradient rows worse conditioned than this amplify rounding; weight rows then take part where there are any.
MAX_DIRECT_CONDITION = 3e4


def solve(
    system: System, *, solver: str = "auto", rtol: float = 1e-14, progress: Progress | None = None
) -> Solution:
    """Solve all rows of one layer input.

    ``solver="direct"`` uses the gradient rows alone, phase by phase; ``"hybrid"`` all rows; ``"auto"`` is
    direct where the gradient rows alone can have full rank in every phase (or where nothing else is known),
    else hybrid.
    """
    gradient = [block for block in system.blocks if isinstance(block, GradientRows)]
    others = [block for block in system.blocks if not isinstance(block, GradientRows) and block.count]
    alone = len(gradient) == 1 and system.support is None
    if solver == "auto" and alone:
        enough = all(count.rows >= count.unknowns for count in count_phases(gradient[0]))
        if enough or not others:
            solution = solve_by_phases(gradient[0], system.shape, rtol)
            good = bool(solution.determined.all()) and solution.condition < MAX_DIRECT_CONDITION
            if good or not others:
                return solution
    if solver == "direct" and alone:
        return solve_by_phases(gradient[0], system.shape, rtol)
    return solve_hybrid(system, rtol=rtol, progress=progress)

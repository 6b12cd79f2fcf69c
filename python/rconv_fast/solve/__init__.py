"""One layer's system: blocks of rows, scaling, direct and Krylov solution."""

from __future__ import annotations

import math

from rconv_fast.budget import Budget
from rconv_fast.memory import available_bytes, require_memory
from rconv_fast.solve.curved import ZERO, CurvedSystem, place_by_zeros, solve_curved
from rconv_fast.solve.hybrid import solve_hybrid
from rconv_fast.solve.krylov import NO_LIMIT, Progress
from rconv_fast.solve.map_rows import MapRows, ThroughRows
from rconv_fast.solve.nonnegative import solve_nonnegative
from rconv_fast.solve.norm_conv import NormalisedConv
from rconv_fast.solve.normalised import NormSets
from rconv_fast.solve.phases.solve import count_phases, direct_bytes, solve_by_phases
from rconv_fast.solve.precision import in_exact_products
from rconv_fast.solve.prior import PRIORS, apply_prior
from rconv_fast.solve.rows import GradientRows, PointRows, Rows, System, WeightRows, norm
from rconv_fast.solve.solution import Evidence, HasEvidence, Solution
from rconv_fast.solve.windows import widened, with_zeros_behind, within_windows

__all__ = [
    "PRIORS",
    "SOLVERS",
    "ZERO",
    "CurvedSystem",
    "Evidence",
    "GradientRows",
    "HasEvidence",
    "MapRows",
    "NormSets",
    "NormalisedConv",
    "PointRows",
    "Rows",
    "Solution",
    "System",
    "ThroughRows",
    "WeightRows",
    "apply_prior",
    "norm",
    "place_by_zeros",
    "solve",
    "solve_curved",
    "solve_nonnegative",
    "widened",
    "with_zeros_behind",
    "within_windows",
]


SOLVERS = ("auto", "direct", "hybrid")
# Gradient rows worse conditioned than this amplify rounding; weight rows then take part where there are any.
MAX_DIRECT_CONDITION = 3e4


@in_exact_products
def solve(
    system: System,
    *,
    solver: str = "auto",
    rtol: float = 1e-14,
    max_iterations: int | None = None,
    nonnegative: bool = False,
    budget: Budget = NO_LIMIT,
    progress: Progress | None = None,
) -> Solution:
    """Solve all rows of one layer input.

    ``solver="direct"`` uses the gradient rows alone, phase by phase; ``"hybrid"`` all rows; ``"auto"`` is
    direct where the gradient rows alone can have full rank in every phase (or where nothing else is known),
    else hybrid. `max_iterations` bounds the hybrid's, for a caller who knows what else to try; unknowns that are
    known to be `nonnegative` are found sooner; when `budget` is spent the solution is what there is by then, not
    converged and of unknown rank.
    """
    gradient = [block for block in system.blocks if isinstance(block, GradientRows)]
    others = [block for block in system.blocks if not isinstance(block, GradientRows) and block.count]
    alone = len(gradient) == 1 and system.support is None
    fits = alone and direct_bytes(gradient[0]) <= available_bytes(system.rhs[0].device)
    if solver == "auto" and fits:
        enough = all(count.rows >= count.unknowns for count in count_phases(gradient[0]))
        if enough or not others:
            solution = solve_by_phases(gradient[0], system.shape, rtol)
            good = bool(solution.determined.all()) and solution.condition < MAX_DIRECT_CONDITION
            if good or not others:
                return solution
    if solver == "direct" and alone:
        device = system.rhs[0].device
        require_memory("recover_conv_input", "the direct solver", direct_bytes(gradient[0]), device)
        return solve_by_phases(gradient[0], system.shape, rtol)
    _require_vectors(system)
    return solve_hybrid(
        system, rtol=rtol, max_iterations=max_iterations, nonnegative=nonnegative, budget=budget, progress=progress
    )


# The iteration keeps this many copies of the unknown and of the rows, float32 shadows and products included.
UNKNOWN_COPIES, ROW_COPIES = 12, 8


def _require_vectors(system: System) -> None:
    """Refuse a system whose vectors alone do not fit; its matrix is never built."""
    size = system.rhs[0].element_size()
    values = UNKNOWN_COPIES * math.prod(system.shape) + ROW_COPIES * sum(b.numel() for b in system.rhs)
    require_memory("invert", "a matrix-free solve", size * values, system.rhs[0].device)

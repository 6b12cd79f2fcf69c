"""One layer's system behind norms that take their statistics from the batch: Gauss-Newton, then a proven solve.

The equations of `rconv_fast.solve.norm_conv` are linear only around an estimate, and norms hide constants: those are
pinned for the solve, called open, and placed by the exact zeros that a ReLU leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.krylov import NO_LIMIT, refine
from rconv_fast.solve.norm_conv import NormalisedConv, hidden_classes
from rconv_fast.solve.normalised import OffsetRows
from rconv_fast.solve.plan import JACOBI, PHASE_CHOLESKY, Built, covered
from rconv_fast.solve.rows import Rows, System, balance
from rconv_fast.solve.solution import Solution

# A round squares the error of the last, down to what its own solve leaves: below this residual one more is exact.
SMALL = 1e-8
MAX_ROUNDS = 20
# Rounds in a row that may fail to halve the residual: far from the answer they do.
PATIENCE = 3
# A round is solved to the residual it starts with, relative to it and within these bounds.
LOOSEST, TIGHTEST, ROUND_ITERATIONS = 1e-2, 1e-5, 2000


@dataclass(frozen=True)
class CurvedSystem:
    r"""All equations of one unknown, those behind norms among them.

    Attributes
    ----------
    shape : torch.Size
        Of the unknown (B, C, \*in).
    fixed : tuple of Rows
        The blocks that are linear.
    normalised : tuple of NormalisedConv
        The convolutions behind which norms are.
    support : Tensor or None
        As `System` has it.
    """

    shape: torch.Size
    fixed: tuple[Rows, ...]
    normalised: tuple[NormalisedConv, ...]
    support: Tensor | None = None

    @cached_property
    def offsets(self) -> OffsetRows | None:
        """The constants that no equation sees: one a channel and stride class that no offset leads into padding."""
        if any(block.count for block in self.fixed) or any(conv.mean is not None for conv in self.normalised):
            return None
        if not all(conv.sets.by_channel(conv.geometry.out_channels) for conv in self.normalised):
            return None
        classes = [hidden_classes(conv.geometry) for conv in self.normalised]
        shared = [mask for mask in classes[0] if all(bool((mask == o).flatten(1).all(1).any()) for o in classes[1:])]
        if not shared:
            return None
        like = self.normalised[0].weight
        whole_batch = any(conv.sets.groups is None for conv in self.normalised)
        return OffsetRows.create(torch.stack(shared).to(like.device), self.shape, whole_batch, like)

    def around(self, x: Tensor | None) -> System:
        """The linear equations that the exact answer satisfies up to the square of its distance from x."""
        blocks = [*self.fixed, *(rows for conv in self.normalised for rows in conv.rows(x))]
        if self.offsets is not None:
            blocks.append(self.offsets)
        return System(self.shape, tuple(blocks), self.support)

    @property
    def is_linear(self) -> bool:
        """Whether the equations are the same around every point."""
        return all(conv.is_linear for conv in self.normalised)


def solve_curved(system: CurvedSystem, solve: Callable[[System], Solution], budget: Budget = NO_LIMIT) -> Solution:
    """The x that satisfies the equations around itself; what norms hide of it is called open.

    Parameters
    ----------
    system : CurvedSystem
        The equations.
    solve : callable
        Solves one linear system and says what it determines.
    """
    x = None if system.is_linear else _gauss_newton(system, budget)
    found = solve(system.around(x))
    if system.offsets is None:
        return found
    pins = system.offsets.count
    evidence = replace(found.evidence, rank=max(found.rank - pins, 0), rows=found.rows - pins, hidden=pins)
    return replace(found, determined=found.determined & ~system.offsets.members, evidence=evidence, inverse=None)


def _gauss_newton(system: CurvedSystem, budget: Budget) -> Tensor:
    """Solve, put the equations around the answer, solve for what they miss; until they miss little."""
    x = best = _solve_roughly(_prepared(system.around(None)), None, LOOSEST, budget)
    least, slow = float("inf"), 0
    for _ in range(MAX_ROUNDS):
        built = _prepared(system.around(x))
        residual = built.system.residual(x)
        slow = 0 if residual < least / 2 else slow + 1
        if residual < least:
            least, best = residual, x
        if residual <= SMALL or slow > PATIENCE or budget.spent:
            break
        x = x + _solve_roughly(built, x, min(LOOSEST, max(TIGHTEST, residual)), budget)
    return best


def _prepared(system: System) -> Built:
    """The system balanced, with a preconditioner that takes each g as it is at the point."""
    dtype = system.rhs[0].dtype
    way = PHASE_CHOLESKY if covered(system) else JACOBI
    balanced = balance(system, way.gradient_weight(system))
    built = way.build(balanced, dtype) or JACOBI.build(balanced, dtype)
    assert built is not None
    return built


def _solve_roughly(built: Built, x: Tensor | None, rtol: float, budget: Budget) -> Tensor:
    """What solves the equations from x (or 0) on."""
    system = built.system
    rhs = system.rhs
    if x is not None:
        rhs = [b - q for b, q in zip(rhs, system.apply(x), strict=True)]
    found = refine(
        system,
        built.preconditioner,
        rhs=rhs,
        inner_rtol=1e-9,
        rtol=rtol,
        max_iterations=ROUND_ITERATIONS,
        budget=budget,
    )
    return found.x


# Values this near to the lowest of their class, relative to the largest, are zeros like it; or this many residuals.
ZERO, ZERO_RESIDUALS = 1e-6, 10.0


def place_by_zeros(system: CurvedSystem, found: Solution) -> Solution:
    """Fix the constants that norms hide where x is never negative and exactly 0 at places, as behind a ReLU.

    The lowest values of a class are its zeros; two or more of one value prove it, as no two others are equal. A single
    lowest value is most likely a zero: it is made 0, and the class stays open.
    """
    if system.offsets is None:
        return found
    x, determined, hidden = found.x.clone(), found.determined.clone(), found.hidden
    tolerance = max(ZERO, ZERO_RESIDUALS * found.residual) * float(x.abs().max())
    dims = (0, 2) if system.offsets.shared else (2,)
    for mask in system.offsets.masks:
        values = x[:, :, mask]
        zeros = values <= values.amin(dims, keepdim=True) + tolerance
        count = zeros.sum(dims, keepdim=True)
        x[:, :, mask] = values - (values * zeros).sum(dims, keepdim=True) / count
        determined[:, :, mask] |= count >= 2
        hidden -= int((count >= 2).sum())
    evidence = replace(found.evidence, rank=found.rank + found.hidden - hidden, hidden=hidden)
    return replace(found, x=x, determined=determined, evidence=evidence)

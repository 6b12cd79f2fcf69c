"""Behind a ReLU no value is negative, and about half are exactly 0: that fixes what too few equations leave open.

``{x : M x = b, x >= 0}`` is a single point as soon as the zeros outnumber the open directions about twice (Wendel
1962: n random half-spaces in k dimensions share a direction with the probability that n - 1 coins show fewer
than k heads). The point is found by exchange (block principal pivoting, Kim and
Park 2011): solve on the free values, fix those that come out negative, free those whose multiplier

    ``g = M^T (M x - b)``

is negative. Should that wander, a projected Newton method takes over (Bertsekas 1982): it goes towards the solve on
the free values, clipped at 0, only as far as the misfit falls.

That it is the only one is proven, not assumed. With S the zeros and P the rest, it is when ``M_P`` has
full column rank and there is a y with

    ``M_P^T y = 0,  M_S^T y > 0``:

for every other solution ``x + d`` has ``d_S >= 0`` and ``0 = y^T M d = (M_S^T y)^T d_S``, so ``d_S = 0``, and then
``M_P d_P = 0`` leaves only ``d_P = 0``.
Such a y is the residual of a second problem of the same kind (Farkas): the direction d that comes closest to
``M d = 0``, ``d_S >= 0``, ``sum d_S = sqrt(|S|)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.krylov import NO_LIMIT, Progress, refine
from rconv_fast.solve.plan import MIXED_PRECISION_UNKNOWNS
from rconv_fast.solve.precision import in_exact_products
from rconv_fast.solve.preconditioners import jacobi
from rconv_fast.solve.rank import Accept, probe
from rconv_fast.solve.rows import System, balance
from rconv_fast.solve.solution import Solution

# Sweeps of the pivoting, each a Krylov solve of so many iterations.
MAX_SWEEPS, SWEEP_ITERATIONS = 80, 300
# Sweeps of plain exchange, fast but not sure to end; then every sweep must lower the misfit.
EXCHANGES = 20
# A step towards the solve is halved until the clipped misfit falls, at most to this.
MIN_STEP = 1e-3
# Sweeps that may pass without halving the residual once the equations hold; at the second number all is rounding.
PATIENCE, ROUNDING = 3, 1e-14
# The same where the equations do not hold yet.
PATIENCE_BEFORE = 25
# Iterations of a solve that is to be exact.
EXACT_ITERATIONS = 4000
# Values below this multiple of the most negative one (or of the rounding) are zeros.
ZERO_FACTOR, ZERO_FLOOR = 10.0, 1e-12
# A certificate's multipliers, of mean 1 on the zeros, are at least this there, and at most this elsewhere.
POSITIVE, NEARLY_ZERO = 0.01, 1e-7


@dataclass(frozen=True)
class Pivoted:
    """A solve on the free values: they, ``M x - b``, its relative norm, iterations so far."""

    x: Tensor
    misfit: list[Tensor]
    residual: float
    iterations: int


@in_exact_products
def solve_nonnegative(
    system: System,
    solution: Solution,
    *,
    tolerance: float,
    budget: Budget = NO_LIMIT,
    progress: Progress | None = None,
) -> Solution:
    """Find the non-negative solution, and whether it is the only one.

    Parameters
    ----------
    system : System
        Equations whose unknowns are known to be non-negative.
    solution : Solution
        What the equations alone gave; the starting point.
    tolerance : float
        Relative residual up to which an answer satisfies the equations.
    budget : Budget
        When it is spent, what is proven by then is returned.
    progress : callable, optional
        Called with the iteration and the relative residual.

    Returns
    -------
    Solution
        The non-negative solution, all values determined if it is proven to be the only one; `solution` as it was
        where no non-negative solution was found or its zeros cannot be told from small values.

    References
    ----------
    Kim and Park, "Fast nonnegative matrix factorization: an active-set-like method and comparisons", SIAM J. Sci.
    Comput. 33, 2011; Bertsekas, "Projected Newton methods for optimization problems with simple constraints", SIAM J.
    Control Optim. 20, 1982; Wendel, "A problem in geometric probability", Math. Scand. 11, 1962.
    """
    if not any(bool(part.any()) for part in system.rhs):
        return solution
    balanced = balance(system, 1.0)
    found = pivot(balanced, _support(system), solution.x, _stalling(tolerance), budget, progress)
    if found.residual > tolerance:
        return solution
    positive = found.x > _threshold(found.x)
    x, spent = _solve_on(balanced, positive, found.x * positive, budget)
    residual = balanced.residual(x)
    if residual > tolerance or float(x.min()) < -_threshold(found.x):
        return solution
    unique = has_full_rank(balanced, positive, budget) and certificate(balanced, positive, budget) is not None
    evidence = replace(
        solution.evidence,
        residual=residual,
        solver=f"{solution.solver}+nonnegative",
        proof="nonnegative" if unique else solution.proof,
        converged=True,
        iterations=solution.iterations + found.iterations + spent,
    )
    determined = torch.ones_like(solution.determined) if unique else solution.determined
    return replace(solution, x=x, determined=determined, evidence=evidence)


def _threshold(x: Tensor) -> float:
    """Values below this are zeros: no true value is negative, so the negative ones show the noise."""
    return ZERO_FACTOR * max(-float(x.min()), ZERO_FLOOR * float(x.abs().max()))


def _stalling(tolerance: float) -> Callable[[Pivoted], bool]:
    """Stop when the residual is rounding or has not halved for some sweeps."""
    best, since = math.inf, 0

    def done(state: Pivoted) -> bool:
        nonlocal best, since
        best, since = (state.residual, 0) if state.residual < best / 2 else (best, since + 1)
        return state.residual <= ROUNDING or since >= (PATIENCE if best <= tolerance else PATIENCE_BEFORE)

    return done


def pivot(
    system: System,
    bounded: Tensor,
    x: Tensor,
    done: Callable[[Pivoted], bool],
    budget: Budget = NO_LIMIT,
    progress: Progress | None = None,
) -> Pivoted:
    """``min ||M x - b||`` with ``x >= 0`` where `bounded`, from `x`, until `done` with an unclipped solve."""
    support = _support(system)
    scale = _norm(system.rhs)

    def clipped(v: Tensor) -> Tensor:
        return torch.where(support, torch.where(bounded, v.clamp_min(0.0), v), 0.0)

    x, iterations = clipped(x), 0
    misfit = _misfit(system, x)
    free = support & (~bounded | (x > 0) | (system.adjoint(misfit) < 0))
    for sweep in range(MAX_SWEEPS):
        target, spent = _solve_on(system, free, x, budget, SWEEP_ITERATIONS, mixed=True)
        iterations += spent
        missed = _misfit(system, target)
        state = Pivoted(target, missed, _norm(missed) / scale, iterations)
        if progress is not None:
            progress(iterations, state.residual)
        if done(state) or budget.spent:
            break
        if sweep < EXCHANGES:
            x = clipped(target)
            free = support & (~bounded | (x > 0) | (~free & (system.adjoint(missed) < 0)))
            continue
        x, misfit = _descend(system, clipped, x, target)
        free = support & (~bounded | (x > 0) | (system.adjoint(misfit) < 0))
    return state


def _descend(
    system: System, clipped: Callable[[Tensor], Tensor], x: Tensor, target: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The clipped point on the way from `x` to `target` that lowers the misfit; also its misfit."""
    before, step = _norm(_misfit(system, x)), 1.0
    while True:
        trial = clipped(x + step * (target - x))
        misfit = _misfit(system, trial)
        step /= 2
        if _norm(misfit) < before or step < MIN_STEP:
            return trial, misfit


def _misfit(system: System, x: Tensor) -> list[Tensor]:
    """``M x - b``."""
    return [q - b for q, b in zip(system.apply(x), system.rhs, strict=True)]


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _solve_on(
    system: System,
    support: Tensor,
    start: Tensor,
    budget: Budget,
    iterations: int = EXACT_ITERATIONS,
    *,
    mixed: bool = False,
) -> tuple[Tensor, int]:
    """Least squares on the values of `support`, the others 0, by correcting `start`; also the iterations."""
    restricted = replace(system, support=support)
    coarse = mixed and system.unknowns >= MIXED_PRECISION_UNKNOWNS
    dtype = torch.float32 if coarse else start.dtype
    result = refine(
        restricted,
        jacobi(restricted, dtype),
        rhs=[-part for part in _misfit(system, start)],
        inner_dtype=dtype,
        inner_rtol=1e-4 if coarse else 1e-8,
        rtol=1e-15,
        max_iterations=iterations,
        budget=budget,
    )
    return start + result.x, result.iterations


def _support(system: System) -> Tensor:
    if system.support is not None:
        return system.support
    return torch.ones(system.shape, dtype=torch.bool, device=system.rhs[0].device)


def has_full_rank(system: System, support: Tensor, budget: Budget = NO_LIMIT) -> bool:
    """Whether ``M_P`` has full column rank: ``M_P x = M_P z`` gives random z back."""
    restricted = replace(system, support=support)

    def recover(rhs: list[Tensor], accept: Accept) -> Tensor:
        return refine(
            restricted,
            jacobi(restricted, rhs[0].dtype),
            rhs=rhs,
            inner_rtol=1e-8,
            rtol=1e-15,
            max_iterations=EXACT_ITERATIONS,
            accept=accept,
            budget=budget,
        ).x

    return bool(probe(restricted, recover).all())


@dataclass(frozen=True)
class SumRow:
    """One equation: the mean-scaled sum of the masked values, ``sum_S x / sqrt(|S|) = rhs``."""

    mask: Tensor
    rhs: Tensor

    @property
    def count(self) -> int:
        """One equation."""
        return 1

    @property
    def _row(self) -> Tensor:
        return self.mask / self.mask.sum().sqrt()

    def apply(self, x: Tensor) -> Tensor:
        """The sum."""
        return (self._row * x).sum().reshape(1)

    def adjoint(self, y: Tensor) -> Tensor:
        """The row times y."""
        return self._row * y

    def diagonal(self) -> Tensor:
        """Squares of the row."""
        return self._row.square()

    def normal(self) -> Tensor:
        """The row's product with itself."""
        return torch.outer(self._row.flatten(), self._row.flatten())

    def scaled(self, factor: float) -> SumRow:
        """Not needed: the row joins a balanced system."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> SumRow:
        """The row in another dtype."""
        return SumRow(self.mask.to(dtype), self.rhs.to(dtype))


def certificate(system: System, positive: Tensor, budget: Budget = NO_LIMIT) -> Tensor | None:
    """A combination of the equations that proves ``{M x = b, x >= 0}`` to be one point, or None.

    Parameters
    ----------
    system : System
        The equations; their right-hand sides play no part.
    positive : Tensor
        Bool, which values are positive (P); all others on the support are 0 (S).

    Returns
    -------
    Tensor or None
        ``M^T y``, of mean 1 on S, positive there and 0 on P.
    """
    support = _support(system)
    zero = support & ~positive
    start = torch.zeros(system.shape, dtype=system.rhs[0].dtype, device=zero.device)
    if not bool(zero.any()):
        return start
    blocks = [replace(block, rhs=torch.zeros_like(block.rhs)) for block in system.blocks]  # type: ignore[type-var]
    total = SumRow(zero.to(system.rhs[0]), system.rhs[0].new_ones(1))
    farkas = System(system.shape, (*blocks, total), system.support)

    def multipliers(misfit: list[Tensor]) -> Tensor:
        w = system.adjoint(misfit[:-1])
        return w / w[zero].mean()

    def signed(state: Pivoted) -> bool:
        w = multipliers(state.misfit)
        return float(w[zero].min()) > POSITIVE and float((w * positive).abs().max()) < POSITIVE

    state = pivot(farkas, zero, start, signed, budget)
    # The same to rounding: on the values left free M^T (M d - b) is then 0, and the others have room.
    d, _ = _solve_on(farkas, positive | (state.x != 0), state.x, budget)
    w = multipliers(_misfit(farkas, d))
    proven = float(w[zero].min()) > POSITIVE and float((w * positive).abs().max()) < NEARLY_ZERO
    return w if proven else None


__all__ = ["certificate", "has_full_rank", "pivot", "solve_nonnegative"]

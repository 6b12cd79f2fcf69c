"""Preconditioned conjugate gradients for least squares, with reliable updates: the rules by which they stop.

Each time the residual has fallen by a set factor it is computed anew from x, while the search direction is kept:
products may then be done in float32 and the answer is still exact to float64 (residual replacement, Sleijpen and van
der Vorst 1996; van der Vorst and Ye 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.conjugate import LeastSquares, Preconditioner
from rconv_fast.solve.rows import System, norm
from rconv_fast.solve.tiles import products

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class KrylovResult:
    """Solution, iterations, relative residual, whether the normal equations are solved, or are given up."""

    x: Tensor
    iterations: int
    residual: float
    converged: bool
    given_up: bool = False


class InterruptedSolve(KeyboardInterrupt):
    """Ctrl-C during an iteration; `x` is the iterate."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


# On a GPU the stopping test waits for the device. It is made at every iteration first, later after so many more that
# they are at most this share of those done and at most this many.
CHECK_SHARE, MAX_UNCHECKED = 1 / 16, {"cpu": 1, "cuda": 8}


# Most iterations (beside half of those done) without halving the residual after which the iteration is taken to have
# reached its rounding, and how many times what a halving took before.
PATIENCE, LONG_PLATEAU = 400, 20
# A residual that has fallen this far and then stops falling has reached its rounding.
DEEP, PATIENCE_AT_ROUNDING = 1e-13, 20
# ``P^-1/2 M^T r`` of a unit r below this many roundings is 0: what is left of r lies outside the range of M.
ROUNDING_UNITS = 16
# When the recomputed ``M^T r`` has gained less than this, only the rounding of the recomputation is left.
STALL = 0.5
# Where each iteration gains this factor, the correction that is left after a small one is smaller still.
FAST = 0.1
# Without one, loops go on.
NO_LIMIT = Budget()


def refine(
    system: System,
    preconditioner: Preconditioner,
    *,
    rhs: list[Tensor] | None = None,
    inner_dtype: torch.dtype | None = None,
    inner_rtol: float,
    rtol: float,
    max_iterations: int,
    progress: Progress | None = None,
    accept: Callable[[Tensor], bool] | None = None,
    accept_every: int = 10,
    budget: Budget = NO_LIMIT,
    scarce: bool = False,
) -> KrylovResult:
    """Solve ``min ||rhs - M x||`` from 0.

    Parameters
    ----------
    system : System
        M, balanced: columns of norm about 1.
    preconditioner : callable
        ``P^-1 v``, P an approximation of ``M^T M``.
    rhs : list of Tensor, optional
        The system's own right-hand side if left out.
    inner_dtype : torch.dtype, optional
        Precision of the products inside; the residual is recomputed in the system's own.
    inner_rtol : float
        Fall of ``||P^-1/2 M^T r||`` after which the residual is recomputed.
    rtol : float
        Stop at ``||r|| <= rtol ||rhs||``.
    max_iterations : int
        Stop after as many products with M.
    progress : callable, optional
        Called with the iteration and an estimate of ``||r|| / ||rhs||``.
    accept : callable, optional
        Looks at x every `accept_every` iterations and may end the iteration.
    budget : Budget
        Stop when it is spent.
    scarce : bool
        Whether there are so few rows that the iteration may slow down for good: stop as soon as its pace says that it
        will not end in `max_iterations`.
    """
    rhs = system.rhs if rhs is None else rhs
    scale = norm(rhs)
    x = torch.zeros(system.shape, dtype=rhs[0].dtype, device=rhs[0].device)
    if scale == 0.0:
        return KrylovResult(x, 0, 0.0, True)
    dtype = rhs[0].dtype if inner_dtype is None else inner_dtype
    inner = products(system, dtype)
    floor, rounding = (ROUNDING_UNITS * torch.finfo(d).eps for d in (dtype, x.dtype))
    check, unchecked = 1, MAX_UNCHECKED.get(x.device.type, 1)
    size = scale  # the inner iteration works in units of the last recomputed residual
    inside = LeastSquares(inner.apply, inner.adjoint, inner.rows([part / size for part in rhs]), preconditioner)
    reference = start = _root(float(inside.gamma))
    if start <= floor:
        return KrylovResult(x, 0, 1.0, True)
    pace = Pace(rtol, max_iterations) if scarce else None
    plateau, iteration, renewed_once, converged, given_up = Plateau(), 0, False, False, False
    try:
        while iteration < max_iterations:
            iteration += 1
            inside.step()
            if accept is not None and iteration % accept_every == 0 and accept(x + inside.x.to(x.dtype) * size):
                converged = True
                break
            if iteration in (check, max_iterations):
                check += min(unchecked, 1 + int(CHECK_SHARE * iteration))
                squared, before = torch.stack([inside.gamma, inside.before]).tolist()  # synchronize!
                now = _root(squared)
                relative = now / start * size / scale
                if progress is not None:
                    progress(iteration, relative)
                if not math.isfinite(relative) or budget.spent:
                    break
                given_up = pace is not None and pace.hopeless(iteration, relative)
                if given_up:
                    break
                plateau.look(iteration, relative)
                if renewed_once and squared < FAST**2 * before and relative < rounding:
                    converged = True
                    break
                if now <= max(inner_rtol * reference, floor):
                    renewed_once = True
                    x = x + inside.x.to(x.dtype) * size
                    residual = [bi - qi for bi, qi in zip(rhs, system.apply(x), strict=True)]
                    renewed, last = norm(residual), reference * size
                    factor, size = size / renewed if renewed > 0 else 0.0, renewed
                    inside.x.zero_()
                    if size <= rtol * scale:
                        return KrylovResult(x, iteration, size / scale, True)
                    inside.renew(inner.rows([part / size for part in residual]), factor)
                    reference = _root(float(inside.gamma))
                    if reference <= floor or reference * size > STALL * last:
                        return KrylovResult(x, iteration, size / scale, True)
                elif plateau.over(iteration):
                    converged = plateau.deep
                    break
            inside.turn()
    except KeyboardInterrupt:
        raise InterruptedSolve(x + inside.x.to(x.dtype) * size) from None
    x = x + inside.x.to(x.dtype) * size
    final = norm([bi - qi for bi, qi in zip(rhs, system.apply(x), strict=True)]) / scale
    return KrylovResult(x, iteration, final, converged, given_up)


def _root(gamma: float) -> float:
    """``||P^-1/2 M^T r||`` from its square, which rounding may make negative."""
    return math.sqrt(max(gamma, 0.0))


@dataclass
class Plateau:
    """How long a residual has not halved, and how long is normal for one that has gone like this."""

    best: float = 1.0
    since: int = 0

    def look(self, iteration: int, relative: float) -> None:
        """Take note of the residual after an iteration."""
        if relative < self.best / 2:
            self.best, self.since = relative, iteration

    @property
    def deep(self) -> bool:
        """Whether it has fallen so far that what does not fall any more is rounding."""
        return self.best < DEEP

    def over(self, iteration: int) -> bool:
        """Whether waiting longer is of no use."""
        most = PATIENCE + iteration // 2
        patience: float = most
        if self.deep:
            patience = PATIENCE_AT_ROUNDING
        elif self.best < 1.0:
            usual = self.since / math.log2(1 / self.best)
            patience = min(most, max(PATIENCE_AT_ROUNDING, LONG_PLATEAU * usual))
        return iteration - self.since > patience


# The pace of the second half of at least so many iterations counts; it may still grow by this factor.
PACED_FROM, SPEEDING = 800, 1.5


@dataclass
class Pace:
    """How a residual fell, and how many iterations it takes at that pace.

    Where equations suffice it falls by the same factor in each hundred iterations; where they hardly do, ever slower.
    """

    rtol: float
    most: int
    seen: list[tuple[int, float]] = field(default_factory=list)

    def hopeless(self, iteration: int, relative: float) -> bool:
        """Take note of the residual after an iteration; whether it will not get to `rtol` in `most`."""
        self.seen.append((iteration, math.log(max(relative, self.rtol))))
        if iteration < PACED_FROM:
            return False
        middle, before = self.seen[len(self.seen) // 2]
        now = self.seen[-1][1]
        gained, left = before - now, now - math.log(self.rtol)
        return left * (iteration - middle) > gained * (SPEEDING * self.most - iteration)

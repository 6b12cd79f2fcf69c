"""Behind a ReLU about half of the values are exactly 0: held at 0 while the iteration goes on, they need no iterations.

Conjugate gradients on the values that are free. A free value below a few times the negative ones, which show how far
the iterate still is from the answer, is put to 0 and held; one that is held and whose gradient wants it positive, more
than the noise of the others, is let go again. The direction is kept, with the factor of Polak and Ribiere between 0 and
that of Fletcher and Reeves, for the sets change (Nocedal and Wright 2006, section 5.2).

The answer satisfies *all* equations or it is none: a value held wrongly leaves a residual. That it is the only answer
is for others to prove, on all values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.conjugate import LeastSquares, dot
from rconv_fast.solve.krylov import KrylovResult, Plateau, Progress
from rconv_fast.solve.rounded import RoundedSystem
from rconv_fast.solve.rows import System, norm
from rconv_fast.solve.tiles import Products, products

# The sets change first after so many iterations, then after so many more until the residual is down to COARSE; from
# there each time it has fallen by FALL, and above CLEAN values are only held.
FIRST, EVERY, COARSE, FALL, CLEAN = 12, 5, 1e-4, 0.1, 1e-7
# Held below so many root mean squares of the negative free values; released above so many of the negative gradients of
# the held ones, first and later.
HOLD, RELEASE, RELEASE_LATE = 1.5, 2.5, 8.0


class PinnedLeastSquares(LeastSquares):
    """``min ||r - M x||`` for x that is 0 where not `free`; diagonal: the inverse of that of ``M^T M``."""

    def __init__(self, system: Products, r: list[Tensor], diagonal: Tensor) -> None:
        self.free = torch.ones_like(diagonal)
        self.last = torch.zeros_like(diagonal)
        super().__init__(system.apply, system.adjoint, r, lambda s: s * diagonal * self.free)

    def step(self) -> None:
        """Remember the last preconditioned residual, go to the minimum along p."""
        self.last = self.z
        super().step()

    def _slope(self) -> Tensor:
        return dot(self.s, self.p)

    def _beta(self) -> Tensor:
        ratio = (self.gamma - dot(self.s, self.last)) / self.before
        return torch.minimum(ratio.clamp_min(0.0), self.gamma / self.before)

    def hold(self, free: Tensor) -> None:
        """Let exactly these values go free."""
        self.free = free.to(self.free)
        self.p = self.p * self.free

    def renew(self, r: list[Tensor], factor: float) -> None:
        """As in the base, with the last preconditioned residual in the same units."""
        self.last = self.last * self.free * factor
        super().renew(r, factor)


def solve_with_zeros(
    system: System,
    diagonal: Tensor,
    *,
    inner_dtype: torch.dtype,
    rtol: float,
    max_iterations: int,
    budget: Budget,
    progress: Progress | None = None,
) -> KrylovResult | None:
    """The non-negative x that satisfies all equations to `rtol`, or None if this way does not lead there.

    Parameters
    ----------
    system : System
        Balanced; its unknowns are known not to be negative.
    diagonal : Tensor
        Inverse diagonal of ``M^T M``, in float32.
    inner_dtype, rtol, max_iterations, budget, progress
        As in `rconv_fast.solve.krylov.refine`.
    """
    scale = norm(system.rhs)
    if scale == 0.0:
        return None
    x, size = torch.zeros(system.shape, dtype=system.rhs[0].dtype, device=diagonal.device), scale
    inner = products(system, inner_dtype)
    nearly = inner.exact if isinstance(inner, RoundedSystem) else inner
    inside = PinnedLeastSquares(inner, [b / size for b in inner.rhs], diagonal)
    reference = start = float(inside.gamma.clamp_min(0.0).sqrt())
    if start == 0.0:
        return None
    coarse, last, plateau = True, 0, Plateau()
    for iteration in range(1, max_iterations + 1):
        inside.step()
        now = math.sqrt(max(float(inside.gamma), 0.0))  # synchronize!
        relative = now / start * size / scale
        if progress is not None:
            progress(iteration, relative)
        plateau.look(iteration, relative)
        if not math.isfinite(relative) or budget.spent or plateau.over(iteration):
            return None
        due = iteration >= FIRST and iteration - last >= EVERY if coarse else now <= FALL * reference
        if due:
            last = iteration
            x = x + inside.x.to(x.dtype) * size
            free = inside.free > 0
            if coarse or size / scale > CLEAN:
                free = _sets(x, free, inside.s * diagonal * size, coarse=coarse)
                inside.hold(free)
                x = x * free
            at = nearly if coarse else system  # far from the answer its rounding does not matter
            residual = [b - q for b, q in zip(at.rhs, at.apply(x.to(at.rhs[0].dtype)), strict=True)]
            before, size = size, norm(residual)
            if size <= rtol * scale:
                return KrylovResult(x, iteration, size / scale, True)
            rows = [part / size for part in residual]
            inside.renew(rows if coarse else inner.rows(rows), before / size)
            reference = float(inside.gamma.clamp_min(0.0).sqrt())
            coarse = coarse and size > COARSE * scale
        inside.turn()
    return None


def _sets(x: Tensor, free: Tensor, gradient: Tensor, *, coarse: bool) -> Tensor:
    """Which values are free from now on; `gradient` is the preconditioned one, also of those that are held."""
    hold = free & (x < HOLD * _negative_size(x[free]))
    factor = RELEASE if coarse else RELEASE_LATE
    held = ~free
    release = held & (gradient > factor * _negative_size(gradient[held]))
    return (free & ~hold) | release


def _negative_size(values: Tensor) -> float:
    """Root mean square of the negative ones."""
    negative = values[values < 0]
    return float(negative.square().mean().sqrt()) if len(negative) else 0.0

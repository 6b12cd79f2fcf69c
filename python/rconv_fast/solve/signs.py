"""Behind a ReLU: an answer with zeros is the only one without negative values, proven on the values that are not 0.

Let P be those and S the zeros of an answer x >= 0, N = M^T M with the diagonal D, and y any vector with ``u = M^T y``.
For another answer x + d >= 0, ``M d = 0`` and ``d_S >= 0``, so ``u_S^T d_S = -u_P^T d_P``. If

    N_P >= D_P / a    and    min (u_S / D_S^(1/2)) > a^(1/2) ||D_P^(-1/2) u_P||

then d = 0: of ``M_P d_P = -M_S d_S`` the right side is at most ``sum D_S^(1/2) d_S`` long, hence ``D_P^(1/2) d_P`` at
most a^(1/2) times that, and the equation above leaves only ``d_S = 0``. The system on P has about twice the equations
for each unknown and takes a third of the iterations; such a y is ``M N^-1 D^(1/2) 1_S``, less what of it reaches P, and
needs few digits, for the inequality is checked in full precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.conjugate import LeastSquares, Symmetric
from rconv_fast.solve.rank import PROBE_TOLERANCE, PROBES
from rconv_fast.solve.rows import System, norm
from rconv_fast.solve.tiles import Products, products

# Share of the values that are zeros from which this is quicker than a proof of full rank.
MIN_ZEROS = 0.25
# Of ``D^(-1/2) u_S``, 1 where y is exact, when y is exact enough; and how much of what may reach P does.
POSITIVE, SPARE = 0.5, 0.5
# Looks at the iterates, and the fall of the residual after which it is computed anew.
LOOK_EVERY, FALL = 4, 0.02


class _OnPart(LeastSquares):
    """``min ||r - M x||`` for x that is 0 off a part of the values; how its polynomial goes from 0.

    The iterates of conjugate gradients leave ``p(D^-1 N) e`` of an error e, with ``p(0) = 1``; `slope` is ``-p'(0)``.
    """

    def __init__(self, inner: Products, part: Tensor, diagonal: Tensor, r: list[Tensor]) -> None:
        self.slope, self._own = 0.0, 1.0
        super().__init__(lambda v: inner.apply(v * part), lambda y: inner.adjoint(y) * part, r, lambda s: s * diagonal)

    def step(self) -> None:
        """Go to the minimum along p."""
        super().step()
        self.slope += float(self.alpha) * self._own  # synchronize!

    def turn(self) -> None:
        """The next direction, and the value at 0 of its polynomial."""
        self._own = 1.0 + float(self._beta()) * self._own  # synchronize!
        super().turn()


def fixed_by_signs(
    system: System, zeros: Tensor, diagonal: Tensor, *, inner_dtype: torch.dtype, max_iterations: int, budget: Budget
) -> bool:
    """Whether no other non-negative x satisfies the equations that one with these zeros does.

    Parameters
    ----------
    system : System
        Balanced, without a support.
    zeros : Tensor
        Bool, of x's shape.
    diagonal : Tensor
        Inverse diagonal of ``M^T M``, in the precision of vectors.
    inner_dtype : torch.dtype
        Precision of the products in the iterations that need few digits; that of the others is the diagonal's.
    max_iterations, budget
        Of each of the three iterations; False when they are used up.
    """
    if system.support is not None or not bool((diagonal > 0).all()) or float(zeros.double().mean()) < MIN_ZEROS:
        return False
    rough, part = products(system, inner_dtype), (~zeros).to(diagonal)
    bound = _inverse_bound(system, rough, part, diagonal, max_iterations, budget)
    if bound is None:
        return False
    v = _positive(rough, part, diagonal, max_iterations, budget)
    if v is None:
        return False
    inner = products(system, diagonal.dtype)
    v = v - _reaching(inner, part, diagonal, v, bound, max_iterations, budget)
    u = system.adjoint(system.apply(v.to(system.rhs[0].dtype))) * diagonal.sqrt()
    return float(u[zeros].min()) > math.sqrt(bound) * norm([u[~zeros]])


def _inverse_bound(
    system: System, inner: Products, part: Tensor, diagonal: Tensor, max_iterations: int, budget: Budget
) -> float | None:
    """The a of ``N_P >= D_P / a``, wrong once in a million times; None where the iterations do not show one.

    Each of two independent vectors shows one that is wrong once in a thousand times; the larger holds if either does.
    """
    generator, shown = torch.Generator().manual_seed(3), []
    for _ in range(PROBES):
        z = torch.randn(system.shape, generator=generator, dtype=torch.float64).to(diagonal.device)
        bound = _bound_shown_by(z, system, inner, part, diagonal, max_iterations, budget)
        if bound is None:
            return None
        shown.append(bound)
    return max(shown)


def _bound_shown_by(
    z: Tensor,
    system: System,
    inner: Products,
    part: Tensor,
    diagonal: Tensor,
    max_iterations: int,
    budget: Budget,
) -> float | None:
    """The a that one Gaussian vector shows.

    z, white where D is 1, is found from ``M_P z`` up to ``p(D^-1 N) z``. Along the smallest eigenvalue l that is
    ``p(l)`` times a Gaussian number, so ``p(l) < 1/2`` if it is as small as that number hardly ever is, and for an l
    below all roots of p, ``p(l) >= 1 - l slope``. What is known of that number comes from residuals in the system's
    precision; products that are off by E take ``l^(1/2) (l^(1/2) + e) slope`` of it, ``e = |E D^-1/2|``, so that

        ``l^(1/2) >= ((e^2 + 2 / slope)^(1/2) - e) / 2``

    E rounds one direction like another: e is what it does to z, doubled.
    """
    least = 0.5 * PROBE_TOLERANCE
    weight = diagonal.double().sqrt()
    left, dtype = (z * weight * part).to(system.rhs[0].dtype), diagonal.dtype
    residual = system.apply(left)
    size = norm(residual)
    off = norm([r - q for r, q in zip(residual, inner.apply(left.to(dtype)), strict=True)])
    e = 2 * off / norm([z * part])
    state = _OnPart(inner, part, diagonal, inner.rows([r / size for r in residual]))
    reference = float(state.gamma)
    for iteration in range(1, max_iterations + 1):
        state.step()
        if iteration % LOOK_EVERY == 0:
            if norm([(left - state.x * size) / weight]) < least:
                return (state.slope * (math.sqrt(e**2 + 2 / state.slope) + e)) ** 2
            if not math.isfinite(state.slope) or budget.spent:
                return None
        if float(state.gamma) < FALL**2 * reference:
            left = left - state.x.to(left.dtype) * size
            residual = system.apply(left)
            before, size = size, norm(residual)
            state.renew(inner.rows([(r / size).to(dtype) for r in residual]), before / size)
            reference = float(state.gamma)
        state.turn()
    return None


def _positive(inner: Products, part: Tensor, diagonal: Tensor, max_iterations: int, budget: Budget) -> Tensor | None:
    """The v whose ``u = N v`` is near ``D^(1/2)`` on the zeros and near 0 elsewhere."""
    wanted, zeros, scale = (1 - part) / diagonal.sqrt(), part == 0, diagonal.sqrt()
    state = Symmetric(lambda v: inner.adjoint(inner.apply(v)), wanted.clone(), lambda s: s * diagonal)
    for iteration in range(1, max_iterations + 1):
        state.step()
        if iteration % LOOK_EVERY == 0:
            if float(((wanted - state.s) * scale)[zeros].min()) > POSITIVE:
                return state.x
            if budget.spent:
                return None
        state.turn()
    return None


def _reaching(
    inner: Products, part: Tensor, diagonal: Tensor, v: Tensor, bound: float, max_iterations: int, budget: Budget
) -> Tensor:
    """The w on P with which ``N (v - w)`` is next to nothing on P."""
    enough = (SPARE * POSITIVE) ** 2 / bound
    state = _OnPart(inner, part, diagonal, inner.apply(v))
    for _ in range(max_iterations):
        if float(state.gamma) < enough or budget.spent:  # synchronize!
            break
        state.step()
        state.turn()
    return state.x

"""Among all solutions of too few equations, the one nearest to a prior: a box, non-negativity, least total variation.

All solutions are ``x = x_0 + Z t``, Z an orthonormal basis of the null space. Over t,

    minimise  sum_i  f_i(K_i x),

by the alternating direction method of multipliers (Boyd et al. 2011, section 5.3) with ``z_i = K_i x``:

    t   = argmin sum_i ||K_i (x_0 + Z t) - z_i + u_i||^2
    v_i = r K_i x + (1 - r) z_i + u_i,    z_i = prox_{f_i / rho}(v_i),    u_i = v_i - z_i.

Every iterate satisfies the equations to rounding; the terms f_i are met in the limit. Where the null space is too
large to compute, the equations are terms like the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.solve.conjugate import conjugate_gradients
from rconv_fast.solve.dense import PseudoInverse, eigen_seconds
from rconv_fast.solve.krylov import NO_LIMIT, refine
from rconv_fast.solve.precision import in_exact_products
from rconv_fast.solve.preconditioners import jacobi
from rconv_fast.solve.rows import System, WeightRows, balance
from rconv_fast.solve.solution import Solution

PRIORS = (None, "box", "nonnegative", "tv")
# Largest system whose null space is computed (by eigenvalues of its normal matrix).
MAX_DENSE_UNKNOWNS = 6144
# The splitting stops when no entry of its two residuals is larger than this (of pixels with a range of 1).
TOLERANCE = 1e-4
MAX_ITERATIONS = 1500
# Without a null space, every step is solved for to this accuracy, in at most so many products.
STEP_TOLERANCE, STEP_ITERATIONS = 0.05, 20
# Inequalities are tightened by this much, so that the splitting's error leaves dead units dead.
MARGIN = 2 * TOLERANCE
# Penalty at the start, as an inverse step: differences of neighbouring pixels are about 1/20 of the range.
PENALTY = 20.0
# Over-relaxation; 1.5 to 1.8 is usual (Boyd et al., section 3.4.3).
RELAXATION = 1.7
# Every so many iterations the penalty moves by this factor towards equal primal and dual residuals.
BALANCE_EVERY, BALANCE_FACTOR, BALANCE_RATIO = 20, 1.5, 5.0


@dataclass(frozen=True)
class Term:
    """One term ``f(K x)``: K, its adjoint, and ``prox(v, rho) = argmin_z f(z) + rho/2 ||z - v||^2``."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, float], Tensor]


# ``(sum_i K_i^T K_i)^-1`` on the directions left open.
Step = Callable[[Tensor], Tensor]


@in_exact_products
def apply_prior(
    system: System,
    solution: Solution,
    prior: str,
    inequalities: Sequence[WeightRows] = (),
    *,
    budget: Budget = NO_LIMIT,
) -> Solution:
    """Replace the minimum-norm choice of what `system` leaves open by the choice of a prior.

    Parameters
    ----------
    system : System
        The equations.
    solution : Solution
        Their minimum-norm solution.
    prior : {"box", "nonnegative", "tv"}
        ``"box"``: the solution with values in [0, 1] that is nearest to 1/2; ``"nonnegative"``: the
        non-negative solution of least norm; ``"tv"``: least total variation, values in [0, 1].
    inequalities : sequence of WeightRows
        ``w A x <= rhs``, w of any sign: what flat pieces of an activation say.
    budget : Budget
        When it is spent, the choice is what has been reached.

    Returns
    -------
    Solution
        The same equations, rank and determined values; the rest is the prior's.

    Notes
    -----
    Total variation is isotropic over axes and channels: ``sum_i sqrt(sum_{c,a} (x[c,i+e_a] - x[c,i])^2)``.
    The null space comes from an eigendecomposition, O(n^3). Above `MAX_DENSE_UNKNOWNS` unknowns the equations
    join the splitting as terms ``M x = b`` and a last projection meets them to rounding.
    """
    terms = [*_prior_terms(prior), *(_inequality(rows) for rows in inequalities)]
    if system.unknowns <= MAX_DENSE_UNKNOWNS and eigen_seconds(system.unknowns) <= budget.left:
        null = (solution.inverse or PseudoInverse.create(system)).null
        if null.shape[1] == 0:
            return solution
        x, iterations = minimise(terms, solution.x, _null_step(terms, null, system.shape), budget)
    else:
        x, iterations = _minimise_matrix_free(terms, system, solution.x, budget)
    evidence = replace(
        solution.evidence,
        residual=system.residual(x),
        solver=f"{solution.solver}+{prior}",
        iterations=solution.iterations + iterations,
    )
    return replace(solution, x=x, evidence=evidence)


def _null_step(terms: Sequence[Term], null: Tensor, shape: torch.Size) -> Step:
    """``Z (Z^T H Z)^-1 Z^T v``, ``H = sum_i K_i^T K_i``: the step stays in the null space."""
    normal = torch.empty_like(null)
    for j in range(null.shape[1]):
        normal[:, j] = _normal(terms, null[:, j].reshape(shape)).reshape(-1)
    factor = torch.linalg.cholesky(null.mT @ normal)

    def step(v: Tensor) -> Tensor:
        return (null @ torch.cholesky_solve(null.mT @ v.reshape(-1, 1), factor)).reshape(v.shape)

    return step


def _normal(terms: Sequence[Term], x: Tensor) -> Tensor:
    """``sum_i K_i^T K_i x``."""
    total = torch.zeros_like(x)
    for term in terms:
        total += term.adjoint(term.apply(x))
    return total


def minimise(terms: Sequence[Term], x: Tensor, step: Step, budget: Budget = NO_LIMIT) -> tuple[Tensor, int]:
    """``min sum_i f_i(K_i x)`` over the points that `step` reaches from `x`; also the iterations it took."""
    rho = PENALTY
    kx = [term.apply(x) for term in terms]
    z = [term.prox(v, rho) for term, v in zip(terms, kx, strict=True)]
    u = [torch.zeros_like(v) for v in kx]
    for iteration in range(1, MAX_ITERATIONS + 1):
        pull = torch.zeros_like(x)
        for i, term in enumerate(terms):
            pull += term.adjoint(z[i] - u[i] - kx[i])
        x = x + step(pull)
        primal = dual = 0.0
        for i, term in enumerate(terms):
            kx[i] = term.apply(x)
            v = RELAXATION * kx[i] + (1 - RELAXATION) * z[i] + u[i]
            z_new = term.prox(v, rho)
            primal = max(primal, float((kx[i] - z_new).abs().max()))
            dual = max(dual, float((z_new - z[i]).abs().max()))
            z[i], u[i] = z_new, v - z_new
        if max(primal, dual) < TOLERANCE or budget.spent:
            break
        if iteration % BALANCE_EVERY == 0:
            change = _balance(primal, dual)
            rho, u = rho * change, [ui / change for ui in u]
    return x, iteration


def _minimise_matrix_free(terms: Sequence[Term], system: System, x: Tensor, budget: Budget) -> tuple[Tensor, int]:
    """The equations as terms of their own, met to rounding by a last projection."""
    balanced = balance(system, 1.0)
    support = system.support
    equations = [Term(block.apply, block.adjoint, _constant(block.rhs)) for block in balanced.blocks]
    terms = [*terms, *equations]

    def step(v: Tensor) -> Tensor:
        return _step_solve(lambda d: _normal(terms, d), v if support is None else v * support)

    x, iterations = minimise(terms, x, step, budget)
    missing = [b - q for b, q in zip(balanced.rhs, balanced.apply(x), strict=True)]
    last = refine(
        balanced,
        jacobi(balanced, x.dtype),
        rhs=missing,
        inner_rtol=1e-8,
        rtol=1e-14,
        max_iterations=MAX_ITERATIONS,
        budget=budget,
    )
    return x + last.x, iterations + last.iterations


def _constant(value: Tensor) -> Callable[[Tensor, float], Tensor]:
    return lambda _, __: value


def _step_solve(apply: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
    """``apply^-1 rhs`` for a symmetric positive operator, to the accuracy that a step of the splitting needs."""
    return conjugate_gradients(apply, rhs, tolerance=STEP_TOLERANCE, iterations=STEP_ITERATIONS)[0]


def _balance(primal: float, dual: float) -> float:
    """How to change the penalty so that both residuals fall together."""
    if primal > BALANCE_RATIO * dual:
        return BALANCE_FACTOR
    return 1 / BALANCE_FACTOR if dual > BALANCE_RATIO * primal else 1.0


def _prior_terms(prior: str) -> list[Term]:
    if prior == "tv":
        return [Term(differences, differences_adjoint, _shrink), _nearest(None, 0.0, 1.0)]
    if prior == "box":
        return [_nearest(0.5, 0.0, 1.0)]
    return [_nearest(0.0, 0.0, math.inf)]


def _nearest(centre: float | None, low: float, high: float) -> Term:
    """``f(x) = ||x - centre||^2 / 2`` (0 without a centre) for x in [low, high]."""

    def prox(v: Tensor, rho: float) -> Tensor:
        return (v if centre is None else (centre + rho * v) / (1 + rho)).clamp(low, high)

    return Term(lambda x: x, lambda z: z, prox)


def _inequality(rows: WeightRows) -> Term:
    """``w A x <= rhs``, each row scaled to norm 1."""
    size = rows.weight.flatten(1).norm(dim=1).reshape(1, -1, *(1,) * rows.geometry.ndim) * rows.row_weight.abs()
    scale = torch.where(size > 0, 1 / size, 0.0).nan_to_num(0.0, 0.0, 0.0)
    bound = torch.where(size > 0, rows.rhs * scale - MARGIN, 0.0)
    unit = replace(rows, row_weight=rows.row_weight * scale, rhs=bound)
    return Term(unit.apply, unit.adjoint, lambda v, _: torch.minimum(v, bound))


def differences(x: Tensor) -> Tensor:
    """Forward differences along every spatial axis, 0 at the far border: (axes, B, C, ``*in``)."""
    parts = []
    for axis in range(2, x.ndim):
        d = torch.zeros_like(x)
        d.narrow(axis, 0, x.shape[axis] - 1).copy_(x.diff(dim=axis))
        parts.append(d)
    return torch.stack(parts)


def differences_adjoint(d: Tensor) -> Tensor:
    """Adjoint of `differences`: minus the divergence."""
    x = torch.zeros_like(d[0])
    for axis, part in enumerate(d, start=2):
        n = x.shape[axis] - 1
        inner = part.narrow(axis, 0, n)
        x.narrow(axis, 0, n).sub_(inner)
        x.narrow(axis, 1, n).add_(inner)
    return x


def _shrink(d: Tensor, rho: float) -> Tensor:
    """Proximal map of the total variation: shorten every pixel's vector of differences by ``1 / rho``."""
    length = d.square().sum(dim=(0, 2), keepdim=True).sqrt()
    return d * (1 - 1 / (rho * length.clamp_min(1e-300))).clamp_min(0.0)

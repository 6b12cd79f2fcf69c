"""Preconditioned conjugate gradients for least squares, in two precisions.

``min ||b - M x||`` by CGLS (Hestenes and Stiefel 1952; Bjorck 1996, section 7.4) with a preconditioner P of the
normal matrix ``M^T M``. It runs in float64, or in float32 with float64 residuals between (iterative refinement):
each pass solves for the correction ``M d = b - M x`` and the recomputed residual decides whether to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.solve.rows import System

Preconditioner = Callable[[Tensor], Tensor]
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class KrylovResult:
    """Solution, iterations, relative residual, and whether the normal equations are solved."""

    x: Tensor
    iterations: int
    residual: float
    converged: bool


# On a GPU the stopping test reads a number back; every few iterations is often enough.
CHECK_EVERY = {"cpu": 1, "cuda": 8}


def cgls(
    system: System,
    rhs: list[Tensor],
    preconditioner: Preconditioner,
    *,
    rtol: float,
    max_iterations: int,
    progress: Progress | None = None,
    accept: Callable[[Tensor], bool] | None = None,
    accept_every: int = 1,
) -> KrylovResult:
    """Solve ``min ||rhs - M x||`` from 0 until ``||P^-1/2 M^T r||`` has fallen by `rtol`, or is only rounding.

    Expects ``||rhs||`` and the columns of ``M P^-1/2`` to be about 1. `accept` looks at x every `accept_every`
    iterations and may end the iteration early.
    """
    r = list(rhs)
    s = system.adjoint(r)
    z = preconditioner(s)
    p = z
    x = torch.zeros_like(s)
    gamma = torch.sum(s * z)
    start = math.sqrt(max(float(gamma), 0.0))
    floor = ROUNDING_UNITS * torch.finfo(x.dtype).eps
    if start <= floor:
        return KrylovResult(x, 0, 0.0, True)
    target = max(rtol, floor / start)
    every = CHECK_EVERY.get(x.device.type, 1)
    relative, best, best_iteration = 1.0, 1.0, 0
    for iteration in range(1, max_iterations + 1):
        q = system.apply(p)
        alpha = gamma / sum(torch.sum(qi * qi) for qi in q)
        x.addcmul_(p, alpha)
        r = [ri.addcmul(qi, alpha, value=-1) for ri, qi in zip(r, q, strict=True)]
        s = system.adjoint(r)
        z = preconditioner(s)
        gamma, previous = torch.sum(s * z), gamma
        p = torch.addcmul(z, p, gamma / previous)
        if accept is not None and iteration % accept_every == 0 and accept(x):
            return KrylovResult(x, iteration, relative, True)
        if iteration % every == 0 or iteration == max_iterations:
            relative = math.sqrt(max(float(gamma), 0.0)) / start  # synchronize!
            if progress is not None:
                progress(iteration, relative)
            if relative < best / 2:
                best, best_iteration = relative, iteration
            if not relative > target or iteration - best_iteration > PATIENCE:  # also stops on NaN
                break
    return KrylovResult(x, iteration, relative, relative <= target)


# Iterations without halving the residual after which an iteration is taken to have reached its rounding.
PATIENCE = 400
# ``P^-1/2 M^T r`` of a unit r below this many roundings is 0: what is left of r lies outside the range of M.
ROUNDING_UNITS = 16
# A pass that gains less than this is the last one.
STALL = 0.25


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
) -> KrylovResult:
    """Passes of `cgls` on the recomputed residual until it is at `rtol` of the right-hand side or stops falling."""
    rhs = system.rhs if rhs is None else rhs
    dtype = rhs[0].dtype
    inner = system if inner_dtype in (None, dtype) else system.to(inner_dtype)
    scale = _norm(rhs)
    x = rhs[0].new_zeros(system.shape)
    r, iterations, relative, converged = rhs, 0, 1.0, scale == 0.0
    while not converged and iterations < max_iterations:
        size = _norm(r)
        step = cgls(
            inner,
            [(ri / size).to(inner.rhs[0].dtype) for ri in r],
            preconditioner,
            rtol=inner_rtol,
            max_iterations=max_iterations - iterations,
            progress=_shifted(progress, iterations, relative),
        )
        iterations += step.iterations
        candidate = x + step.x.to(dtype) * size
        r_new = [bi - qi for bi, qi in zip(rhs, system.apply(candidate), strict=True)]
        relative_new = _norm(r_new) / scale
        stalled = not relative_new < STALL * relative
        if relative_new < relative:
            x, r, relative = candidate, r_new, relative_new
        if (
            relative <= rtol or stalled
        ):  # nothing left to gain: rounding, or equations that contradict each other
            converged = step.converged
            break
    return KrylovResult(x, iterations, relative, converged)


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _shifted(progress: Progress | None, iterations: int, relative: float) -> Progress | None:
    """Report iterations and residual of the whole refinement, not of one pass."""
    if progress is None:
        return None
    return lambda i, value: progress(iterations + i, relative * value)

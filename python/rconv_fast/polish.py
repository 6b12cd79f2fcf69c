"""Gradient matching from the analytic answer: a few Gauss-Newton steps on all gradients at once.

The recursion uses each equation once, layer by layer, so rounding in the last layers is carried to the first.
The full least-squares problem ``min_x sum_p ||dL/dp(x) - g_p||^2 / ||g_p||^2`` has the same solution and
averages the rounding over all equations (COPA's successor polishes a layer-wise answer the same way, arXiv
2210.13231).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

# Conjugate-gradient iterations a Gauss-Newton step; each costs about four forward passes.
INNER_ITERATIONS = 150
MAX_STEPS = 4


def polish(
    model: nn.Module, gradients: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, loss: Loss, goal: float
) -> Tensor:
    """Lower the gradient mismatch from `inputs` until it is at `goal` or no step lowers it.

    Parameters
    ----------
    model : nn.Module
        The working copy of the model.
    gradients : mapping
        The shared gradients, by parameter name.
    inputs, labels : Tensor
        The analytic answer.
    loss : callable
        ``loss(outputs, labels)``.
    goal : float
        Relative mismatch at which to stop.

    Returns
    -------
    Tensor
        `inputs`, or a better answer.
    """
    names = [name for name, g in gradients.items() if bool(g.any())]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    scales = [1 / float(gradients[name].norm()) for name in names]

    def residual(x: Tensor) -> tuple[Tensor, ...]:
        def value(chosen: dict[str, Tensor]) -> Tensor:
            return loss(torch.func.functional_call(model, {**parameters, **chosen}, (x,)), labels)

        found = torch.func.grad(value)({name: parameters[name] for name in names})
        return tuple((found[name] - gradients[name]) * s for name, s in zip(names, scales, strict=True))

    size = _norm(residual(inputs))
    for _ in range(MAX_STEPS):
        if size <= goal or not math.isfinite(size):
            break
        candidate = inputs + _gauss_newton_step(residual, inputs)
        size_new = _norm(residual(candidate))
        if not size_new < size:
            break
        stalled = size_new > 0.5 * size
        inputs, size = candidate, size_new
        if stalled:
            break
    return inputs


def _gauss_newton_step(residual: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Tensor:
    """``min_d ||J d + r||`` by CGLS, J the residual's Jacobian (products by forward and reverse mode)."""
    r0, transpose = torch.func.vjp(residual, x)[:2]
    r = [-part for part in r0]
    step = torch.zeros_like(x)
    (s,) = transpose(tuple(r))
    p, gamma = s, float(s.square().sum())
    start = gamma
    for _ in range(INNER_ITERATIONS):
        q = torch.func.jvp(residual, (x,), (p,))[1]
        curvature = sum(float(part.square().sum()) for part in q)
        if not curvature > 0:
            break
        alpha = gamma / curvature
        step = step + alpha * p
        r = [ri - alpha * qi for ri, qi in zip(r, q, strict=True)]
        (s,) = transpose(tuple(r))
        gamma, previous = float(s.square().sum()), gamma
        p = s + gamma / previous * p
        if not gamma > 1e-24 * start:
            break
    return step


def _norm(parts: tuple[Tensor, ...]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))

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

from rconv_fast.solve.conjugate import LeastSquares

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
        `inputs`, or a better answer. A model that cannot be differentiated three times is left as it is.
    """
    names = [name for name, g in gradients.items() if bool(g.any())]
    parameters = [p for name, p in model.named_parameters() if name in names]
    targets = [gradients[name] for name, _ in model.named_parameters() if name in names]
    scales = [1 / float(target.norm()) for target in targets]

    def residual(x: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss(model(x), labels), parameters, create_graph=x.requires_grad)
        return [(g - target) * s for g, target, s in zip(found, targets, scales, strict=True)]

    size = _norm(residual(inputs))
    for _ in range(MAX_STEPS):
        if size <= goal or not math.isfinite(size):
            break
        try:
            candidate = inputs + _gauss_newton_step(residual, inputs)
        except RuntimeError:  # a layer of the user's own that cannot be differentiated three times
            break
        size_new = _norm(residual(candidate))
        if not size_new < size:
            break
        stalled = size_new > 0.5 * size
        inputs, size = candidate, size_new
        if stalled:
            break
    return inputs


def _gauss_newton_step(residual: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    """``min_d ||J d + r||`` by CGLS, J the residual's Jacobian."""
    at = x.detach().requires_grad_()
    r0 = residual(at)
    # J^T u is linear in u, so differentiating it once more gives J: reverse mode twice, which every layer knows
    # that can be trained; not every one knows forward mode.
    u = [torch.zeros_like(part, requires_grad=True) for part in r0]
    (transposed,) = torch.autograd.grad(r0, at, u, create_graph=True)

    def transpose(y: list[Tensor]) -> Tensor:
        return torch.autograd.grad(r0, at, y, retain_graph=True)[0]

    def forward(d: Tensor) -> list[Tensor]:
        parts = torch.autograd.grad(transposed, u, d, retain_graph=True, materialize_grads=True)
        return [part.detach() for part in parts]

    r = [-part.detach() for part in r0]
    state = LeastSquares(forward, transpose, r)
    goal = 1e-24 * float(state.gamma)
    for _ in range(INNER_ITERATIONS):
        if not float(state.gamma) > goal:
            break
        state.step()
        state.turn()
    return state.x


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))

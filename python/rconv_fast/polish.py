"""Gradient matching from the analytic answer: a few Gauss-Newton steps on all that was seen at once.

The recursion uses each equation once, layer by layer, so rounding in the last layers is carried to the first.
The full least-squares problem ``min_x sum_p ||(dL/dp(x) - g_p) / sigma_p||^2`` has the same solution and
averages the rounding over all equations (COPA's successor polishes a layer-wise answer the same way, arXiv
2210.13231). Where an activation's input is so near to its kink that the answer may lie on the wrong side, the gradients
jump, which no derivative shows: the sides of those nearest are unknowns beside x. Where the information matrix fits,
they are settled one after the other by it, and all others held; else they are rounded when they are solved for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.estimate import bits as bit
from rconv_fast.estimate.bounds import DENSE_UP_TO
from rconv_fast.estimate.fisher import dense_fisher
from rconv_fast.estimate.gauss_newton import gauss_newton
from rconv_fast.estimate.gradient_map import GradientMap, Linearisation, Parts
from rconv_fast.estimate.information import Information
from rconv_fast.estimate.pieces import Bits, kinked_steps
from rconv_fast.memory import is_out_of_memory
from rconv_fast.solve.conjugate import LeastSquares
from rconv_fast.solve.krylov import NO_LIMIT

# Conjugate-gradient iterations a Gauss-Newton step; each costs about four forward passes.
INNER_ITERATIONS = 600
MAX_STEPS = 4
# A step is solved until its gradient has fallen by this.
FALL = 1e-12
# A step that does not halve a mismatch of more than so many goals found no answer: with a side wrong the least mismatch
# may be anywhere.
NEAR = 10.0
# Shares of the activations, those nearest to their kink, whose sides are unknowns: the first that leads to the goal.
# As many as `bits.MOST` in all.
FREED = (0.0, 0.0005, 0.002, 0.01, 0.05)


def polish(problem: GradientMap, inputs: Tensor, goal: float, budget: Budget = NO_LIMIT) -> Tensor:
    """Lower the mismatch from `inputs` until it is at `goal` or no step lowers it.

    Parameters
    ----------
    problem : GradientMap
        What a candidate misses of the gradients, and of the statistics sent with them.
    inputs : Tensor
        The analytic answer.
    goal : float
        Root mean square of the mismatch, in units of the noise, at which to stop.
    budget : Budget
        When to stop.

    Returns
    -------
    Tensor
        `inputs`, or a better answer. A model that cannot be differentiated three times is left as it is.
    """
    best, size = inputs, size_of(problem.residual(inputs))
    information: Information | None = None
    for share in FREED if kinked_steps(problem.graph) else FREED[:1]:
        for _ in range(MAX_STEPS):
            if size <= goal or not math.isfinite(size) or budget.spent:
                return best
            try:
                if share > 0 and information is None and best.numel() <= DENSE_UP_TO:
                    information = _information(problem, best)
                candidate = _moved(problem, best, share, information, budget)
            except RuntimeError as error:  # a layer of the user's own that cannot be differentiated three times
                if is_out_of_memory(error):
                    raise
                return best
            size_new = size_of(problem.residual(candidate))
            halved = size_new < 0.5 * size
            if halved or size_new < min(size, NEAR * goal):
                best, size, information = candidate, size_new, None
            if not halved:
                break
    return best


def _moved(problem: GradientMap, x: Tensor, share: float, information: Information | None, budget: Budget) -> Tensor:
    """One step from x; with sides to free, a step with them free and one with them settled."""
    if share == 0:
        return x + gauss_newton_step(problem.at(x))
    inputs = problem.kink_inputs(x)
    bits, doubt = sides(inputs), nearest(inputs, share, bit.MOST)
    if information is not None:
        x, bits = bit.settle(problem.held(bits), x, bits, doubt, information)
        return gauss_newton(problem.held(bits), x, information.solve, budget=budget).x
    x, bits = freed_step(problem, x, bits, doubt)
    return x + gauss_newton_step(problem.held({name: sides_of(d) for name, d in bits.items()}).at(x))


def _information(problem: GradientMap, x: Tensor) -> Information:
    """About x, on its own sides."""
    return Information.create(dense_fisher(problem.held(sides(problem.kink_inputs(x))), x), x.shape)


def sides_of(d: Tensor) -> Tensor:
    """Relaxed bits, rounded."""
    return (d > 0.5).to(d)


def sides(inputs: Bits) -> dict[str, Tensor]:
    """The bits of a run: 1 where the input of a kinked activation is positive."""
    return {name: (z > 0).to(z) for name, z in inputs.items()}


def nearest(inputs: Bits, share: float, most: int | None = None) -> bit.Doubt:
    """The activations whose inputs are nearest to the kink, each beside the size of its layer's."""
    distance = torch.cat([(z.abs() / z.square().mean().sqrt()).flatten() for z in inputs.values()])
    places = torch.argsort(distance)[: math.ceil(share * len(distance))][:most]
    return bit.Doubt(places, torch.full_like(distance[places], 0.5))


def freed_step(
    problem: GradientMap,
    x: Tensor,
    bits: Bits,
    doubt: bit.Doubt,
    *,
    ridge: float = 0.0,
    fall: float = FALL,
    most: int = INNER_ITERATIONS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``min ||J_x d + J_t e + r||^2 + ridge (||d||^2 + ||e||^2)`` over x and the bits in doubt, which it relaxes.

    The ridge is relative to the curvature along the first direction.
    """
    free = {name: d.clone().requires_grad_() for name, d in bits.items()}
    at = Linearisation(problem.held(free), x, list(free.values()))
    zeros = {name: torch.zeros_like(d) for name, d in bits.items()}
    n = x.numel()

    def apply(v: Tensor) -> Parts:
        return [*at.push([v[:n].reshape(x.shape), *doubt.put(zeros, v[n:]).values()]), root * v]

    def adjoint(u: Parts) -> Tensor:
        by_x, *by_bits = at.adjoints(u[:-1])
        by_t = torch.cat([part.flatten() for part in by_bits])[doubt.places]
        return torch.cat([by_x.flatten(), by_t]) + root * u[-1]

    root = 0.0
    r = [*(-part for part in at.residual), x.new_zeros(n + len(doubt))]
    if ridge > 0:
        s = adjoint(r)
        root = math.sqrt(ridge * sum(float(q.square().sum()) for q in apply(s)) / float(s.square().sum()))
    moved = _solved(LeastSquares(apply, adjoint, r), fall, most)
    before = torch.cat([d.flatten() for d in bits.values()])[doubt.places]
    return x + moved[:n].reshape(x.shape), doubt.put(bits, before + moved[n:])


def gauss_newton_step(at: Linearisation, most: int = INNER_ITERATIONS) -> Tensor:
    """``min_d ||J d + r||``."""
    return _solved(LeastSquares(at.forward, at.adjoint, [-part for part in at.residual]), most=most)


def _solved(state: LeastSquares, fall: float = FALL, most: int = INNER_ITERATIONS) -> Tensor:
    """What conjugate gradients reach in their iterations."""
    goal = fall**2 * float(state.gamma)
    for _ in range(most):
        if not float(state.gamma) > goal:
            break
        state.step()
        state.turn()
    return state.x


def size_of(parts: Parts) -> float:
    """Root mean square of all entries."""
    return math.sqrt(sum(float(p.detach().square().sum()) for p in parts) / max(sum(p.numel() for p in parts), 1))

"""Bits in doubt solved for together with a large input, by products alone.

    ``min ||J_x d + J_t (t - t0) + r||^2 + sum (t - m)^2 / v``   over the change d of the input and the bits t

m and v come from the probability of each bit. The half of the bits nearest to 0 or 1 is fixed there and the others are
solved for again, until none is left: what `estimate.bits` does with the information matrix, which here is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.estimate.bits import LEAST_VARIANCE, NEAR, Doubt
from rconv_fast.estimate.gradient_map import GradientMap, Linearisation
from rconv_fast.estimate.pieces import Bits
from rconv_fast.estimate.sampled import DIAGONAL_DRAWS, LEAST, cleared, signs
from rconv_fast.solve.conjugate import conjugate_gradients

# Each solve ends where it has fallen by this, or after so many iterations.
TOLERANCE, ITERATIONS = 1e-3, 1000


class _Relaxed:
    """The normal equations of x and the bits in doubt, one after the other in one vector."""

    def __init__(self, problem: GradientMap, x: Tensor, bits: Bits, doubt: Doubt, free_scale: bool) -> None:
        start = torch.cat([d.flatten() for d in bits.values()])[doubt.places]
        free = {name: d.clone().requires_grad_() for name, d in doubt.put(bits, start).items()}
        self._at = Linearisation(problem.held(free), x, list(free.values()))
        self._zeros = {name: torch.zeros_like(d) for name, d in bits.items()}
        self._shape, self._n, self._doubt, self._free_scale = x.shape, x.numel(), doubt, free_scale
        p = doubt.probability.to(x)
        precision = 1 / (p * (1 - p)).clamp_min(LEAST_VARIANCE)
        self._precision = torch.cat([torch.zeros_like(x).flatten(), precision])
        prior = precision * (p / 2 + 0.25 - start)
        self.start = start
        residual = cleared(self._at, self._at.residual, free_scale)
        self.right = torch.cat([torch.zeros_like(x).flatten(), prior]) - self._adjoint(residual)
        self.diagonal = self._diagonal() + self._precision

    def product(self, y: Tensor) -> Tensor:
        """Of the normal matrix."""
        moved = self._at.push([y[: self._n].reshape(self._shape), *self._doubt.put(self._zeros, y[self._n :]).values()])
        return self._adjoint(cleared(self._at, moved, self._free_scale)) + self._precision * y

    def _adjoint(self, u: list[Tensor]) -> Tensor:
        by_x, *by_bits = self._at.adjoints(u)
        return torch.cat([by_x.flatten(), torch.cat([part.flatten() for part in by_bits])[self._doubt.places]])

    def _diagonal(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = (self._adjoint([signs(part, generator) for part in self._at.residual]) for _ in range(DIAGONAL_DRAWS))
        total: Tensor = torch.stack([s.square() for s in drawn]).mean(0)
        total[: self._n] += LEAST * total[: self._n].mean()
        return total


def settle(
    problem: GradientMap, x: Tensor, bits: Bits, doubt: Doubt, *, free_scale: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bits in doubt set to their most likely values, and x moved along."""
    system, n = _Relaxed(problem, x, bits, doubt, free_scale), x.numel()
    y, is_free = torch.zeros_like(system.right), torch.ones_like(system.start, dtype=torch.bool)
    while bool(is_free.any()):
        live = torch.cat([torch.ones(n, dtype=torch.bool, device=x.device), is_free]).to(x)
        right = (system.right - system.product(y)) * live

        def apply(v: Tensor, live: Tensor = live) -> Tensor:
            return system.product(v) * live

        step, _ = conjugate_gradients(
            apply, right, lambda v: v / system.diagonal, tolerance=TOLERANCE, iterations=ITERATIONS
        )
        y = y + step
        t = system.start + y[n:]
        distance = (t - (t > 0.5).to(t)).abs()
        chosen = is_free & (distance <= max(NEAR, float(distance[is_free].median())))
        y[n:] = torch.where(chosen, (t > 0.5).to(t) - system.start, y[n:])
        is_free = is_free & ~chosen
    return x + y[:n].reshape(x.shape), doubt.put(bits, system.start + y[n:])

"""The information about a large input by its products: solves by conjugate gradients, error bars from drawn errors.

    ``F v = J^T (J v)``,   ``u = F^-1 J^T e``,  e the noise,  has the covariance of the estimate's errors

F is never formed. Solves run in float32 with the diagonal of F as preconditioner, and what they leave is found in
float64 where it matters (iterative refinement). Drawn errors do not show an open direction, which conjugate gradients
leave alone: random vectors z do, which ``F^-1 F z`` then does not give back (`solve.rank`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rconv_fast.estimate.gradient_map import GradientMap, Linearisation, Parts, dot
from rconv_fast.solve.conjugate import Symmetric, conjugate_gradients
from rconv_fast.solve.rank import PROBE_TOLERANCE, PROBES

# Vectors from which the diagonal of F is estimated, and the least share of its mean that a value's may be.
DIAGONAL_DRAWS, LEAST = 16, 1e-3
# A solve in float32 ends where it has fallen by this, or after so many iterations.
ROUGH, ITERATIONS = 1e-2, 1000
# Refinements in which a random vector must come back.
REFINED = 8


@dataclass(frozen=True)
class SampledInformation:
    """F at one point, the common factor taken out where that is free.

    Attributes
    ----------
    fine, coarse : Linearisation
        In working precision and in float32.
    deviations : list of Tensor
        Of the noise of each entry of the residual: 1 where the weights are the noise's own.
    free_scale : bool
        Whether a common factor is unknown too.
    diagonal : Tensor
        About that of F, in float32.
    """

    fine: Linearisation
    coarse: Linearisation
    deviations: Parts
    free_scale: bool
    diagonal: Tensor

    @classmethod
    def create(
        cls, problem: GradientMap, rounded: GradientMap, x: Tensor, deviations: Parts, free_scale: bool
    ) -> SampledInformation:
        """At x, of a problem and the same in float32."""
        like = next(iter(rounded.seen.values()))
        coarse, generator = rounded.at(x.to(like)), torch.Generator().manual_seed(0)
        total = torch.zeros_like(x, dtype=like.dtype)
        for _ in range(DIAGONAL_DRAWS):
            total += coarse.adjoint([signs(part, generator) for part in coarse.residual]).square() / DIAGONAL_DRAWS
        return cls(problem.at(x), coarse, deviations, free_scale, total + LEAST * total.mean())

    def solve(self, v: Tensor) -> Tensor:
        """About ``F^-1 v``."""
        size = float(v.norm())
        if size == 0:
            return torch.zeros_like(v)
        found, _ = conjugate_gradients(
            lambda u: self._product(self.coarse, u),
            (v / size).to(self.diagonal),
            lambda u: u / self.diagonal,
            tolerance=ROUGH,
            iterations=ITERATIONS,
        )
        return found.to(v) * size

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, float]:
        """Errors of the estimate, (count, *shape); and the mean of what they explain of the noise, in squares."""
        errors, explained = [], 0.0
        for _ in range(count):
            noise = [signs(part, generator) * s for part, s in zip(self.fine.residual, self.deviations, strict=True)]
            right = self.fine.adjoint(cleared(self.fine, noise, self.free_scale))
            errors.append(self.solve(right))
            explained += float((right * errors[-1]).sum()) / count
        return torch.stack(errors), explained

    def open_values(self) -> Tensor:
        """Values that F may leave open, bool of the input's shape: all where a random vector does not come back."""
        generator = torch.Generator().manual_seed(1)
        x = torch.zeros_like(self.diagonal, dtype=self.fine.residual[0].dtype)
        for _ in range(PROBES):
            z = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            state = Symmetric(lambda u: self._product(self.fine, u), self._product(self.fine, z), self.solve)
            for _ in range(REFINED):
                state.step()
                if float((state.x - z).norm()) < PROBE_TOLERANCE:
                    break
                state.turn()
            else:
                return torch.ones_like(x, dtype=torch.bool)
        return torch.zeros_like(x, dtype=torch.bool)

    def _product(self, at: Linearisation, v: Tensor) -> Tensor:
        """``F v``."""
        return at.adjoint(cleared(at, at.forward(v), self.free_scale))


def rounded(problem: GradientMap, model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> GradientMap:
    """The same problem in another dtype, of a copy of its model in that dtype."""
    seen = {name: g.to(dtype) for name, g in problem.seen.items()}
    sigma = {name: s.to(dtype) for name, s in problem.sigma.items()}
    return GradientMap.read(model, problem.loss, problem.targets, seen, sigma, shape, problem.scale)


def cleared(at: Linearisation, parts: Parts, free_scale: bool) -> Parts:
    """What of these residuals no common factor explains."""
    if not free_scale:
        return parts
    share = dot(at.scaled, parts) * at.per_scale
    return [part - share * t for part, t in zip(parts, at.scaled, strict=True)]


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Plus and minus 1 at random."""
    return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)

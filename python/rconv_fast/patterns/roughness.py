"""What pictures have in common: neighbours are alike, in colour more than in brightness, but at edges.

With d the differences of neighbours, (C,) each, their mean over channels and what is left,

    ``q = (mean(d)^2 / GREY^2 + sum((d - mean(d))^2) / COLOUR^2) / C``,   ``-log p(x) = C sum_e q_e^(1/2)``:

a total variation that knows what colours are. As a Gaussian it is ``w q / 2`` with ``w = E[q]^(-1/2)`` of the last
estimate, error bars included: the tangent from above, renewed each round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rconv_fast.patterns.information import Prior

# Size of a difference in brightness, and of one in colour, at 32x32 pixels with values between 0 and 1.
GREY, COLOUR = 0.1, 0.05
# Least expected q: no two neighbours are taken to be more alike than a tenth of that.
LEAST = 1e-2


@dataclass(frozen=True)
class Roughness:
    r"""Of pictures of one shape, (B, C, \*in)."""

    shape: torch.Size

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The neighbours along every axis, by place in a plane."""
        places = torch.arange(self.shape[2:].numel()).view(self.shape[2:])
        axes = [(axis, n) for axis, n in enumerate(places.shape)]
        first = [places.narrow(axis, 0, n - 1).flatten() for axis, n in axes]
        second = [places.narrow(axis, 1, n - 1).flatten() for axis, n in axes]
        return torch.cat(first), torch.cat(second)

    @cached_property
    def colours(self) -> Tensor:
        """The quadratic form C q of one difference, (C, C)."""
        channels = self.shape[1]
        mean = torch.full((channels, channels), 1 / channels, dtype=torch.float64)
        return mean / channels / GREY**2 + (torch.eye(channels, dtype=torch.float64) - mean) / COLOUR**2

    def even(self) -> Tensor:
        """The weights of a picture of which nothing is known, (B, E)."""
        return torch.ones(self.shape[0], len(self.pairs[0]), dtype=torch.float64)

    def weights(self, x: Tensor, draws: Tensor) -> Tensor:
        r"""W (B, E), for a picture and draws (M, B, C, \*in) of its error."""
        square = self._rough(x[None])[0] + self._rough(draws).mean(0)
        return square.clamp_min(LEAST).rsqrt()

    def _rough(self, x: Tensor) -> Tensor:
        """Q (M, B, E)."""
        first, second = (place.to(x.device) for place in self.pairs)
        d = x.flatten(3)[..., first] - x.flatten(3)[..., second]
        return torch.einsum("mbce,cd,mbde->mbe", d, self.colours.to(d), d) / self.shape[1]

    def prior(self, w: Tensor) -> Prior:
        """``sum_e w_e C q_e``, to which one constant a plane is free."""
        n = self.shape[2:].numel()
        first, second = (place.to(w.device) for place in self.pairs)
        blocks = []
        for weight in w:
            plane = w.new_zeros(n, n)
            for i, j, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
                plane.index_put_((i, j), sign * weight, accumulate=True)
            blocks.append(torch.kron(self.colours.to(w), plane))
        return Prior(torch.block_diag(*blocks), self.shape.numel() - self.shape[:2].numel())

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
# Variance, in units of the mean, by which no combination of channels is alike in samples.
UNKNOWN = 1e-2


@dataclass(frozen=True)
class Roughness:
    r"""Of pictures or features of one shape.

    Attributes
    ----------
    shape : torch.Size
        (B, C, \*in).
    colours : Tensor, (C, C)
        The quadratic form C q of one difference.
    """

    shape: torch.Size
    colours: Tensor

    @classmethod
    def of_pictures(cls, shape: torch.Size) -> Roughness:
        """As above."""
        channels = shape[1]
        mean = torch.full((channels, channels), 1 / channels, dtype=torch.float64)
        grey, colour = mean / channels, torch.eye(channels, dtype=torch.float64) - mean
        return cls(shape, grey / GREY**2 + colour / COLOUR**2)

    @classmethod
    def of_features(cls, shape: torch.Size, samples: Tensor) -> Roughness:
        r"""As alike as the neighbours in samples (M, C, \*in) are, channels together."""
        axes = range(2, samples.ndim)
        d = torch.cat([samples.diff(dim=axis).transpose(0, 1).flatten(1) for axis in axes], dim=1)
        covariance = d @ d.mT / d.shape[1]
        covariance.diagonal().add_(UNKNOWN * covariance.diagonal().mean())
        return cls(shape, torch.linalg.inv(covariance).contiguous())

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The neighbours along every axis, by place in a plane."""
        places = torch.arange(self.shape[2:].numel()).view(self.shape[2:])
        axes = [(axis, n) for axis, n in enumerate(places.shape)]
        first = [places.narrow(axis, 0, n - 1).flatten() for axis, n in axes]
        second = [places.narrow(axis, 1, n - 1).flatten() for axis, n in axes]
        return torch.cat(first), torch.cat(second)

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


def random_pictures(shape: torch.Size, generator: torch.Generator) -> Tensor:
    r"""Pictures (M, C, \*in) whose neighbours are as alike as `Roughness.of_pictures` says, on a torus.

    Each frequency k has the variance ``1 / sum_a (2 - 2 cos k_a)`` of the differences' size.
    """
    size = shape[2:]
    stiffness = torch.zeros(size, dtype=torch.float64)
    for axis, n in enumerate(size):
        k = 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n
        stiffness += (2 - 2 * torch.cos(k)).view(-1, *(1,) * (len(size) - 1 - axis))
    stiffness.view(-1)[0] = torch.inf
    axes = tuple(range(2, len(shape)))
    grey, colour = (
        torch.randn(each, generator=generator, dtype=torch.float64) for each in ((shape[0], 1, *size), shape)
    )
    white = GREY * grey + COLOUR * (colour - colour.mean(1, keepdim=True))
    rough = torch.fft.ifftn(torch.fft.fftn(white, dim=axes) / stiffness.sqrt(), dim=axes).real
    level = torch.rand(shape[:1], generator=generator, dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1))
    pictures: Tensor = (rough + level).clamp(0, 1)
    return pictures

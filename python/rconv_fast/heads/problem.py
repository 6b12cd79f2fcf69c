"""A head whose samples are searched, and the samples found so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.roots import HeadFactors, RootSystem

# A residual is accepted up to this factor above what rounding explains, whose size is only estimated, and up to this
# many standard deviations of a noise that was stated.
SAFETY = 30.0
STATED_SAFETY = 5.0
# A sample is reported only if its expected relative error is below: 1e-8 with float64, 3e-4 with float32 gradients.
_ACCURACY_IN_ROUNDINGS = 4e7
_ACCURACY_LIMIT = 3e-4
# With noise of known size the error is reported, and this is where it leaves nothing of the sample.
_NOISY_ACCURACY_LIMIT = 0.3


@dataclass(frozen=True)
class HeadProblem:
    """A head whose samples are searched.

    Attributes
    ----------
    head : Head
        The layer.
    factors, system : HeadFactors, RootSystem
        The gradient's factors of the numerical rank, and one sample's equations in them.
    noise : float
        How much of the gradient's matrix is noise, in one direction.
    unit : float
        Factor of a sample of weight 1 in the gradient: the scale over the batch's total weight.
    unit_known : bool
        Whether that is given, or only the guess that nothing is repeated.
    guess : bool
        Whether a guess is worth trying: not where labels weigh differently or the scale is open.
    batch_size : int or None
        Number of samples, if given.
    labels : Tensor or None
        Their labels, if given.
    generator : torch.Generator
        Of the starting points.
    """

    head: Head
    factors: HeadFactors
    system: RootSystem
    noise: float
    unit: float
    unit_known: bool
    guess: bool
    batch_size: int | None
    labels: Tensor | None
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Seeded standard normal numbers, the same on every device."""
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.head.weight.device)

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (m, n) and weights in the gradient (m,) of samples with these labels."""
        target, v = self.head.loss.class_targets(labels, self.head.n_classes, torch.float64)
        return target, self.unit * v

    @property
    def rank(self) -> int:
        """Number of distinct samples."""
        return self.factors.rank

    @property
    def spare(self) -> int:
        """Equations that no unknown was needed for: ``r (n - 1)`` (and r with a bias) for the ``r^2`` of all p_b."""
        return self.rank * (self.head.n_classes - 1 - self.rank + self.head.has_bias)

    @property
    def safety(self) -> float:
        """How far above its expectation a residual may be."""
        return STATED_SAFETY if self.head.noisy else SAFETY

    @property
    def accuracy_limit(self) -> float:
        """Expected relative error up to which a sample is reported."""
        if self.head.noisy:
            return _NOISY_ACCURACY_LIMIT
        return min(_ACCURACY_LIMIT, _ACCURACY_IN_ROUNDINGS * self.head.rounding)


@dataclass
class Found:
    """Separated samples: extended features, deltas, labels, residuals, weights in the gradient, proofs."""

    x: Tensor  # [m, d or d + 1]
    delta: Tensor  # [m, n]
    labels: Tensor
    residuals: Tensor
    weights: Tensor
    alone: Tensor  # [m]: proven by its own equations; the others only by a whole batch that fits

    @classmethod
    def none(cls, factors: HeadFactors) -> Found:
        """No samples, in the shapes of `factors`."""
        x = factors.weight.new_zeros(0, factors.weight.shape[1])
        whole = torch.zeros(0, dtype=torch.int64, device=x.device)
        return cls(x, x.new_zeros(0, factors.n_classes), whole, x.new_zeros(0), x.new_zeros(0), whole.bool())

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def take(self, keep: Tensor) -> Found:
        """The samples where `keep` is set, or at these places."""
        return Found(*(value[keep] for value in vars(self).values()))

    def join(self, other: Found) -> Found:
        """These samples and `other`'s."""
        return Found(*(torch.cat([a, getattr(other, n)]) for n, a in vars(self).items()))

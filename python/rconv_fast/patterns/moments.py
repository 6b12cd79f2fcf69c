"""Gaussians seen through what is no equation: bounds, and values that may or may not be what they seem.

What a bound says of a value known as ``N(mean, deviation^2)`` is kept as the equation ``x = target`` with a variance
that gives the truncated Gaussian's mean and variance (expectation propagation, Minka 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Bounds farther away than this, in deviations, are taken to be here.
FARTHEST = 30.0
# What adds less than this part to the information is left out.
LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Site:
    """Equations ``x = target`` of values one by one, weights in units of an inverse variance (0: none)."""

    weight: Tensor
    target: Tensor

    @classmethod
    def zeros(cls, weight: Tensor) -> Site:
        """``x = 0``."""
        return cls(weight, torch.zeros_like(weight))

    def halfway(self, last: Site) -> Site:
        """The mean of both as information: steps of full size go to and fro."""
        weight = (self.weight + last.weight) / 2
        pull = (self.weight * self.target + last.weight * last.target) / 2
        return Site(weight, torch.where(weight > 0, pull / weight, 0.0))


@dataclass(frozen=True)
class Moments:
    """Mean and variance."""

    mean: Tensor
    variance: Tensor

    def below(self, limit: Tensor | float) -> Moments:
        """Of what is below a limit: ``m - s r``, ``s^2 (1 - a r - r^2)``; r = phi / Phi at ``a = (limit - m) / s``."""
        size = self.variance.sqrt()
        a = ((limit - self.mean) / size).clamp(-FARTHEST, FARTHEST)
        ratio = torch.exp(-a.square() / 2 - torch.special.log_ndtr(a)) / math.sqrt(2 * math.pi)
        return Moments(self.mean - size * ratio, self.variance * (1 - a * ratio - ratio.square()).clamp_min(1e-6))

    def above(self, limit: float) -> Moments:
        """Of what is above a limit."""
        mirrored = Moments(-self.mean, self.variance).below(-limit)
        return Moments(-mirrored.mean, mirrored.variance)

    def or_at(self, value: Tensor, p: Tensor) -> Moments:
        """Exactly `value` with probability p, else this."""
        variance = p * (1 - p) * (value - self.mean).square() + (1 - p) * self.variance
        return Moments(p * value + (1 - p) * self.mean, variance)

    def site(self, before: Moments, error: float = 0.0) -> Site:
        """The equation that makes this of `before`, itself off by `error`."""
        variance = self.variance + error**2
        weight = 1 / variance - 1 / before.variance
        tells = weight > LEAST_GAIN / before.variance
        weight = torch.where(tells, weight, 0.0)
        return Site(weight, torch.where(tells, (self.mean / variance - before.mean / before.variance) / weight, 0.0))

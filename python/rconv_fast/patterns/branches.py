"""Activations that fall, then rise: hidden is on which side of the valley each input lies.

Known are the outputs a. Negative ones have two inputs, R(a) on the right and L(a) on the left; an output that has
underflowed has none on the left, and no gradient there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rconv_fast.layers.valley import LEFT, RIGHT, Valley
from rconv_fast.patterns.problem import Convolution, Reading

if TYPE_CHECKING:
    from rconv_fast.patterns.robust import Schedule


@dataclass(frozen=True)
class Branches:
    """Outputs of a valley activation behind a convolution.

    Attributes
    ----------
    valley : Valley
        The activation.
    value, grad : Tensor, shape (B, F, U)
        Its outputs a and ``dL/da``.
    """

    valley: Valley
    value: Tensor
    grad: Tensor

    @cached_property
    def _sides(self) -> tuple[Reading, Reading]:
        """What either side says of every output; weights are ``f'^2``, for the error of o is that of a over f'."""
        sides = []
        for side in (RIGHT, LEFT):
            o = self.valley.inverse(self.value, torch.full_like(self.value, side).bool())
            slope = self.valley.slope(o)
            gone = self.valley.underflows(self.value) & (side == LEFT)
            weight = slope.square().clamp_max(1.0).masked_fill(gone, 0.0)
            sides.append(Reading((slope * self.grad).masked_fill(gone, 0.0), o, weight))
        return sides[RIGHT], sides[LEFT]

    def relaxed(self) -> Reading:
        """Everything on the right."""
        return self._sides[RIGHT]

    def choose(self, o: Tensor) -> Tensor:
        """The side whose input is nearer."""
        right, left = self._sides
        nearer = (o - left.target).abs() < (o - right.target).abs()
        gone = self.valley.underflows(self.value) & (o < self.valley.bottom)
        return torch.where(self.valley.has_sides(self.value) & (nearer | gone), LEFT, RIGHT)

    def tight(self, pattern: Tensor) -> Reading:
        """The inputs on the given sides."""
        right, left = self._sides
        on_left = pattern == LEFT
        return Reading(
            torch.where(on_left, left.g, right.g),
            torch.where(on_left, left.target, right.target),
            torch.where(on_left, left.weight, right.weight),
        )

    def residual(self, o: Tensor, pattern: Tensor) -> Tensor:
        """``o - o(a)`` where o(a) is known."""
        reading = self.tight(pattern)
        return (o - reading.target)[reading.weight > 0]

    def robust(self, o: Tensor, pattern: Tensor, sigma: float, schedule: Schedule) -> Reading:
        """Inputs count by how well they fit: ``f'^2 / (1 + (r / kappa s)^2)``."""
        reading = self.tight(pattern)
        fit = 1 / (1 + ((o - reading.target) / (schedule.trust * sigma)).square())
        return Reading(reading.g, reading.target, reading.weight * fit)

    def refined(self, convolution: Convolution, x: Tensor, pattern: Tensor, sigma: float) -> Tensor:
        """The same: there is nothing that gradients would choose better."""
        return pattern

    def pieces(self, o: Tensor, tie: float) -> Tensor:
        """Sides (B, F, U)."""
        return self.choose(o)

    def misfit(self, o: Tensor) -> float:
        """``mean |f(o) - a| / mean |a|``."""
        return float((self.valley.function(o) - self.value).abs().mean() / self.value.abs().mean())

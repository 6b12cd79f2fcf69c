"""Max pooling: hidden is at which position of its window each maximum was found.

Every position of a window is at most the window's maximum m; where windows overlap, at most the least of them,
``lim[u] = min_{v: u in v} m_v``. So a position can be the maximum of window v only if ``lim_u = m_v``, and every known
output has the value lim.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.layers.windows import Windows
from rconv_fast.patterns.descent import descend
from rconv_fast.patterns.problem import Convolution, Reading

if TYPE_CHECKING:
    from rconv_fast.patterns.robust import Schedule

# Values closer than this, relative to the largest, are equal: two windows that share their maximum.
EQUAL = 1e-10
# Belief in a value whose position is not where the forward run has its maximum.
DOUBTED = 0.05


@dataclass(frozen=True)
class Maxima:
    """The maxima of a convolution's outputs over windows.

    Attributes
    ----------
    windows : Windows
        The pooling layer's.
    value, grad : Tensor, shape (B, F, V)
        Each maximum m (before any activation) and ``dL/dm``, 0 where it is not known.
    known : Tensor, shape (B, F, V)
        Bool: maxima that are known (a ReLU passed them); of the others only an upper bound is.
    bound : Tensor, shape (B, F, V)
        What no output of the window exceeds: m where it is known.
    equal : float
        Values closer than this, relative to the largest, are taken as equal.
    """

    windows: Windows
    value: Tensor
    grad: Tensor
    known: Tensor
    bound: Tensor
    equal: float = EQUAL

    @classmethod
    def create(
        cls,
        windows: Windows,
        value: Tensor,
        grad: Tensor,
        known: Tensor,
        floor: float | Tensor = 0.0,
        equal: float = EQUAL,
    ) -> Maxima:
        """`floor` bounds the windows whose maximum is not known: 0 for a ReLU."""
        bound = torch.where(known, value, floor)
        zero = torch.zeros_like(value)
        return cls(windows, torch.where(known, value, zero), torch.where(known, grad, zero), known, bound, equal)

    @cached_property
    def limit(self) -> Tensor:
        """Upper bound of every output (B, F, U), inf where no window is."""
        return self.windows.smallest(self.bound[..., None].expand(*self.bound.shape, self.windows.index.shape[1]))

    @cached_property
    def target(self) -> Tensor:
        """The value of each output that is some window's maximum; 0 where no window is."""
        return torch.where(torch.isfinite(self.limit), self.limit, 0.0)

    @cached_property
    def candidates(self) -> Tensor:
        """Which positions can be their window's maximum, (B, F, V, Q)."""
        inside = self.windows.inside.expand(*self.value.shape, -1)
        if not self.windows.overlap:
            return inside
        close = self.equal * float(self.value.abs().max())
        limit = self.windows.gather(self.limit, math.inf)
        possible = inside & (limit >= self.bound[..., None] - close)
        shared = possible & (limit <= self.bound[..., None] + close) & self.known[..., None]
        count = self.windows.gather(self.windows.add(shared.to(self.value)), 0.0)
        likely = possible & (count >= self._equal_neighbours(close)[..., None])
        for candidates in (likely, possible):
            if bool(candidates.any(-1).all()):
                return candidates
        likely = torch.where(likely.any(-1, keepdim=True), likely, possible)
        return torch.where(likely.any(-1, keepdim=True), likely, inside)

    def _equal_neighbours(self, close: float) -> Tensor:
        """Windows beside each one (itself included) that have the same maximum: they share its position."""
        size = self.windows.out_size
        planes = self.value.unflatten(-1, size)
        padded = F.pad(planes, (1, 1) * len(size), value=math.inf)
        count = torch.zeros_like(planes)
        for shifts in itertools.product(range(3), repeat=len(size)):
            beside = [slice(shift, shift + n) for shift, n in zip(shifts, size, strict=True)]
            window = (slice(None), slice(None), *beside)
            count += ((padded[window] - planes).abs() <= close).to(count)
        return count.flatten(-len(size))

    def gradient(self, share: Tensor) -> Tensor:
        """``dL/do`` when each window's gradient is shared out as in (B, F, V, Q)."""
        return self.windows.add(self.grad[..., None] * share)

    def relaxed(self) -> Reading:
        """Every candidate alike: value and gradient are shared out evenly."""
        share = self.candidates.to(self.value) / self.candidates.sum(-1, keepdim=True).clamp_min(1)
        return Reading(self.gradient(share), self.target, self.windows.add(share * self.known[..., None]))

    def choose(self, o: Tensor) -> Tensor:
        """The entry of each window with the largest output among the candidates, (B, F, V)."""
        return self._outputs(o).argmax(-1)

    def _outputs(self, o: Tensor) -> Tensor:
        return self.windows.gather(o).masked_fill(~self.candidates, -math.inf)

    def one_hot(self, pattern: Tensor) -> Tensor:
        """(B, F, V) to (B, F, V, Q)."""
        return F.one_hot(pattern, self.windows.index.shape[1]).to(self.value)

    def tight(self, pattern: Tensor) -> Reading:
        """Chosen positions have the value of their maximum and its gradient."""
        chosen = self.one_hot(pattern)
        return Reading(self.gradient(chosen), self.target, self.windows.largest(chosen * self.known[..., None]))

    def residual(self, o: Tensor, pattern: Tensor) -> Tensor:
        """``o_q - m`` of the known maxima."""
        outputs = self.windows.gather(o).gather(-1, pattern[..., None])[..., 0]
        return (outputs - self.value)[self.known]

    def refined(self, convolution: Convolution, x: Tensor, pattern: Tensor, sigma: float) -> Tensor:
        """Positions by coordinate descent from those of the forward run."""
        return descend(convolution, self, x, pattern, sigma)

    def robust(self, o: Tensor, pattern: Tensor, sigma: float, schedule: Schedule) -> Reading:
        """Windows with a clear maximum that fits count; outputs above their limit are pulled down to it.

        ``w_v = (1 - exp(-(d / tau s)^2)) / (1 + (r / kappa s)^2)``, d the lead of the position over the best other one.
        """
        chosen = self.one_hot(pattern)
        outputs = self._outputs(o)
        best = outputs.gather(-1, pattern[..., None])[..., 0]
        second = outputs.masked_fill(chosen > 0, -math.inf).amax(-1)
        trust, clear = schedule.trust * sigma, schedule.clear * sigma
        weight = -torch.expm1(-((best - second) / clear).square()) / (1 + ((best - self.value) / trust).square())
        weight = torch.where(best >= outputs.amax(-1), weight, DOUBTED * weight)
        weight = torch.where(self.known, weight, 0.0)
        taken = self.windows.largest(chosen * self.known[..., None]) > 0
        excess = o - self.limit
        above = torch.where((excess > 0) & ~taken, 1 / (1 + (excess / trust).square()), 0.0)
        return Reading(self.gradient(chosen), self.target, self.windows.largest(chosen * weight[..., None]) + above)

    def pieces(self, o: Tensor, tie: float) -> Tensor:
        """Flat positions (B, F, V)."""
        return self.windows.first_largest(o, tie)

    def misfit(self, o: Tensor) -> float:
        """``mean |max o - m| / mean |m|``; windows that are only bounded miss by what they exceed it."""
        highest = self.windows.gather(o).amax(-1)
        miss = torch.where(self.known, (highest - self.value).abs(), (highest - self.bound).clamp_min(0))
        return float(miss.mean() / self.value.abs().mean())

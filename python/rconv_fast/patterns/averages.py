"""A ReLU in front of a global average: hidden is where each filter is active.

The gradient ``dL/da = delta_f / n`` is the same at every position, so the pattern is all that is unknown of g. The
packing finds which filters are active together; their patches overlap, which puts the positions in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.geometry import ConvGeometry
from rconv_fast.patterns.least_squares import meeting_places
from rconv_fast.patterns.packing import Array, find_columns, rank_of
from rconv_fast.patterns.problem import Convolution, Reading

if TYPE_CHECKING:
    from rconv_fast.patterns.robust import Schedule

# Counts this far from whole numbers are no counts.
WHOLE = 1e-3
NDArrayInt = NDArray[np.intp]


@dataclass(frozen=True)
class Averages:
    """Averages of rectified outputs over all positions.

    Attributes
    ----------
    value, grad : Tensor, shape (B, F)
        The averages and ``dL/d`` them.
    positions : int
        How many positions are averaged.
    """

    value: Tensor
    grad: Tensor
    positions: int

    def relaxed(self) -> Reading:
        """Every filter half active everywhere."""
        return self.tight(torch.full((*self.value.shape, self.positions), 0.5).to(self.value))

    def choose(self, o: Tensor) -> Tensor:
        """Where outputs are positive."""
        return o > 0

    def tight(self, pattern: Tensor) -> Reading:
        """``g = delta_f / n`` where the filter is active; no single output is known."""
        g = self.grad[..., None] / self.positions * pattern
        return Reading(g, torch.zeros_like(g), torch.zeros_like(g))

    def residual(self, o: Tensor, pattern: Tensor) -> Tensor:
        """By how much the averages are missed."""
        return (o * pattern).mean(-1) - self.value

    def robust(self, o: Tensor, pattern: Tensor, sigma: float, schedule: Schedule) -> Reading:
        """Averages leave nothing to doubt one by one."""
        return self.tight(pattern)

    def refined(self, convolution: Convolution, x: Tensor, pattern: Tensor, sigma: float) -> Tensor:
        """The same."""
        return pattern

    def pieces(self, o: Tensor, tie: float) -> Tensor:
        """The rectified outputs."""
        return o.clamp_min(0)

    def misfit(self, o: Tensor) -> float:
        """``mean |mean relu(o) - m| / mean |m|``."""
        return float((o.clamp_min(0).mean(-1) - self.value).abs().mean() / self.value.abs().mean())


def rank_of_products(convolution: Convolution, averages: Averages) -> int:
    """How many combinations of the patches the gradients are made of.

    Fewer than positions: the filters' activities there depend on each other, and what is added to the patches along
    that dependence, where they do not overlap, changes no gradient.
    """
    return rank_of(_products(convolution, averages).cpu().double().numpy())


def _products(convolution: Convolution, averages: Averages) -> Tensor:
    """``D_f = dW_f n / delta_f`` of the filters that have a gradient, (alive, C*K)."""
    delta = averages.grad[0]
    alive = delta != 0
    return convolution.grad_weight.flatten(1)[alive] / delta[alive, None] * averages.positions


def pack(convolution: Convolution, averages: Averages, grad_bias: Tensor, budget: Budget) -> tuple[Tensor | None, int]:
    """The pattern (1, F, U) by packing, or None; and the linear programs it took."""
    n, delta = averages.positions, averages.grad[0]
    alive = delta != 0
    counts = (grad_bias / delta * n)[alive]
    if float((counts - counts.round()).abs().max()) > WHOLE:
        return None, 0
    products = _products(convolution, averages)
    weight, bias = convolution.weight.flatten(1)[alive], convolution.bias[alive]
    d, sums, w, b = (t.cpu().double().numpy() for t in (products, counts.round(), weight, bias))
    columns, programs = find_columns(d, sums, w, b, n, budget)
    if columns is None:
        return None, programs
    patches = np.linalg.lstsq(columns, d, rcond=None)[0]
    order = arrange(convolution.geometry, patches)
    pattern = torch.zeros(1, len(delta), n, dtype=torch.bool, device=delta.device)
    pattern[0, alive] = torch.from_numpy(columns[:, order] > 0).to(delta.device)
    return pattern, programs


def arrange(geometry: ConvGeometry, patches: Array) -> NDArrayInt:
    """Which patch (n, C*K) stands at each output position: overlaps must agree, from every possible first one."""
    n, taps = len(patches), geometry.n_taps
    seen = patches.reshape(n, -1, taps)
    place = meeting_places(geometry, torch.device("cpu")).numpy()
    best, least = np.arange(n), np.inf
    for first in range(n):
        order, miss = _lay(place, seen, first, geometry.n_input, least)
        if miss < least:
            best, least = order, miss
    return best


def _lay(place: NDArrayInt, seen: Array, first: int, n_input: int, least: float) -> tuple[NDArrayInt, float]:
    """Lay the patches one after the other, each time the one that agrees best with what lies there already."""
    canvas = np.full((seen.shape[1], n_input + 1), np.nan)
    canvas[:, n_input] = 0.0
    left, total = set(range(len(seen))), 0.0
    order: list[int] = []
    for position in range(len(place)):
        there = canvas[:, place[position]]
        rest = np.array(sorted(left)) if order else np.array([first])
        misses = np.nansum((seen[rest] - there) ** 2, axis=(1, 2))
        chosen = int(rest[misses.argmin()])
        total += float(misses.min())
        order.append(chosen)
        left.discard(chosen)
        if total >= least:
            break
        canvas[:, place[position]] = np.where(place[position] < n_input, seen[chosen], 0.0)
    return np.array(order), total

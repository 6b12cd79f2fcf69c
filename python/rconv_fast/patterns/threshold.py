"""Which side of its kink is each recovered activation on? Found from the data, checked by the bias gradient.

A recovered ReLU output is never exactly 0, and one wrong decision ruins the next layer's equations. Two facts
decide. No true value lies below the flat piece, so the values that do *are* the noise, and the threshold is a
small multiple of the largest of them. And the gradient of the bias in front is known:

    ``db[f] = sum_{b,u} g[b,f,u]``,  ``g = A'(a) dL/da``,

so a filter with a wrong unit j misses its bias gradient by exactly ``dL/da_j`` times the jump of A'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation

# The noise of the negative values bounds that of the positive ones up to chance; a factor of three covers it. A solve
# that held zeros at 0 shows less noise than there is: other factors, where the equations contradict the first.
THRESHOLD_FACTOR = 3.0
OTHER_FACTORS = (1.0, 30.0, 0.1, 300.0)
# Units tried, alone and in pairs, to explain the bias gradient a filter misses: the closest to the threshold.
CANDIDATES = 48


@dataclass(frozen=True)
class Snapped:
    """Cleaned activations, the threshold (and in units of the noise), the largest mismatch of a bias gradient."""

    value: Tensor
    threshold: float
    factor: float
    mismatch: float | None
    toggled: int


def snap(
    activation: Activation,
    a: Tensor,
    grad: Tensor,
    grad_bias: Tensor | None,
    *,
    precision: float,
    factor: float = THRESHOLD_FACTOR,
    others: Sequence[float] = (),
) -> Snapped:
    """Put every value on its side of the kinks.

    Parameters
    ----------
    a, grad : Tensor
        Recovered activations (B, F, ...) and ``dL/da``.
    grad_bias : Tensor or None
        Known ``sum_{b,u} dL/do`` a channel, (F,).
    precision : float
        Relative rounding of the shared gradients (2^-52 for float64).
    factor : float
        Threshold in units of the noise.
    others : sequence of float
        Factors tried where that one contradicts bias gradients; the one that contradicts the fewest is taken.
    """
    scale = float(a.abs().max())
    noise = max(_excess(activation, a), 4 * precision * scale)
    value = _above(activation, a, factor * noise)
    if grad_bias is None or not activation.kinks:
        return Snapped(value, factor * noise, factor, None, 0)
    sums = _BiasSums(activation, grad, grad_bias, precision)
    missed = sums.missed(value)
    for other in others:
        if missed == 0:
            break
        trial = _above(activation, a, other * noise)
        if sums.missed(trial) < missed:
            factor, value, missed = other, trial, sums.missed(trial)
    value, mismatch, toggled = _match_bias(a, value, sums, factor * noise)
    return Snapped(value, factor * noise, factor, mismatch, toggled)


def _above(activation: Activation, a: Tensor, threshold: float) -> Tensor:
    """Values inside the activation's range, flat where they are within the threshold of a flat piece."""
    value = a.clamp(activation.low, activation.high)
    for flat in activation.flats:
        value = torch.where((a - flat).abs() <= threshold, flat, value)
    return value


@dataclass(frozen=True)
class _BiasSums:
    """What the bias gradients say of the sides: ``db[f] = sum_{b,u} A'(a) dL/da``."""

    activation: Activation
    grad: Tensor
    grad_bias: Tensor
    precision: float

    def terms(self, value: Tensor) -> Tensor:
        """``A'(a) dL/da`` by channel, (F, B*...)."""
        return _by_channel(self.grad * self.activation.derivative(value))

    def missing(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """What the sum of each filter's terms misses, (F,), and what it may miss by rounding."""
        size = terms.abs().sum(dim=1)
        tolerance = 64 * self.precision * (size + self.grad_bias.abs()) + 1e-12 * float(size.max())
        return self.grad_bias - terms.sum(dim=1), tolerance

    def missed(self, value: Tensor) -> int:
        """Filters whose bias gradient the values contradict."""
        missing, tolerance = self.missing(self.terms(value))
        return int(torch.count_nonzero(missing.abs() > tolerance))


def _excess(activation: Activation, a: Tensor) -> float:
    """How far values lie outside the activation's range: the noise, seen."""
    below = activation.low - float(a.min()) if activation.low > -float("inf") else 0.0
    above = float(a.max()) - activation.high if activation.high < float("inf") else 0.0
    return max(below, above, 0.0)


def _match_bias(a: Tensor, value: Tensor, sums: _BiasSums, threshold: float) -> tuple[Tensor, float, int]:
    """Toggle the few units that explain the bias gradients the thresholds leave unexplained.

    Returns the values, the largest relative mismatch that is left, and how many were toggled.
    """
    activation = sums.activation
    other = _other_side(activation, a, value, threshold)
    g = sums.terms(value)
    jump = sums.terms(other) - g
    missing, tolerance = sums.missing(g)
    distance = _by_channel(_distance(activation, a, threshold))
    flips = torch.zeros_like(g, dtype=torch.bool)
    for f in torch.nonzero(missing.abs() > tolerance).flatten().tolist():
        near = torch.argsort(distance[f])[:CANDIDATES]
        near = near[jump[f, near] != 0]
        units = _explain(jump[f, near], float(missing[f]), float(tolerance[f]))
        flips[f, near[units]] = True
        missing[f] -= float(jump[f, near[units]].sum())
    flips = flips.reshape(value.transpose(0, 1).shape).transpose(0, 1)
    mismatch = float((missing.abs() / (g.abs().sum(dim=1) + torch.finfo(a.dtype).tiny)).max())
    return torch.where(flips, other, value), mismatch, int(flips.sum())


def _by_channel(t: Tensor) -> Tensor:
    """(B, F, ...) to (F, B*...)."""
    return t.transpose(0, 1).flatten(1)


def _distance(activation: Activation, a: Tensor, threshold: float) -> Tensor:
    """Distance from the nearest decision boundary: the kink, or the threshold beside a flat piece."""
    offset = threshold if activation.flats else 0.0
    return torch.stack([((a - kink).abs() - offset).abs() for kink in activation.kinks]).amin(dim=0)


def _other_side(activation: Activation, a: Tensor, value: Tensor, threshold: float) -> Tensor:
    """The value each unit would have on the other side of its nearest kink."""
    other = value
    tiny = max(threshold, torch.finfo(a.dtype).tiny) * 1e-3
    reach = torch.full_like(a, float("inf"))
    for kink in activation.kinks:
        distance = (a - kink).abs()
        inward = 1.0 if kink == activation.low or kink not in activation.flats else -1.0
        if kink in activation.flats:
            crossed = torch.where(value == kink, kink + inward * distance.clamp_min(tiny), kink)
        else:
            crossed = torch.where(value >= kink, kink - distance.clamp_min(tiny), kink + distance)
        other = torch.where(distance < reach, crossed, other)
        reach = torch.minimum(reach, distance)
    return other


def _explain(jumps: Tensor, missing: float, tolerance: float) -> list[int]:
    """The units (one, else two) whose jumps add up to what is missing; nothing if none do."""
    close = ((jumps - missing).abs() <= tolerance).nonzero().flatten()
    if len(close):
        return [int(close[0])]
    values = jumps.tolist()
    for i, j in itertools.combinations(range(len(values)), 2):
        if abs(values[i] + values[j] - missing) <= tolerance:
            return [i, j]
    return []

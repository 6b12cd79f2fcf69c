"""Two convolutions merged, where the second one's equations alone do not determine its input.

Unknown is the input X of the first. Between them stands an activation that is linear on both sides of 0, ``A(o) = M o``
with slopes M. While those are held,

    ``x = M (W1 X + b1)``,   ``W2 x + b2 = o``,   ``dW2 = sum g2 x``,   ``dW1 = sum g1 X``,   ``g1 = M W2^T g2``

are linear in X: values and gradients of the second layer and gradients of the first one together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation
from rconv_fast.patterns.least_squares import WeightedSolver
from rconv_fast.patterns.problem import Convolution, Front, Miss, Reading
from rconv_fast.solve import GradientRows, Rows, ThroughRows
from rconv_fast.solve.conjugate import conjugate_gradients

# Iterations of a weighted solve, of the start.
ITERATIONS, START_ITERATIONS, RTOL = 60, 100, 1e-12
# Regularisation of the start, and of the solves in units of what one convolution gets: there are more equations.
START_RIDGE, LESS = 1e-2, 1e-2


@dataclass(frozen=True)
class Merged:
    """Two convolutions and the activation between them.

    Attributes
    ----------
    first, last : Convolution
        The convolutions; `last` is right in front of the hidden layer.
    activation : Activation
        Between them, linear on both sides of 0.
    forward : callable
        It.
    """

    first: Convolution
    last: Convolution
    activation: Activation
    forward: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> torch.Size:
        r"""Of X, (B, C, \*in)."""
        return self.first.shape

    @property
    def low(self) -> float:
        """Least value of X."""
        return self.first.low

    @property
    def high(self) -> float:
        """Largest value of X."""
        return self.first.high

    @property
    def bends(self) -> bool:
        """Yes: the slopes between are those of the iterate."""
        return True

    @property
    def image(self) -> bool:
        """Whether X is the network's input."""
        return self.first.image

    def before_last(self, x: Tensor) -> Tensor:
        r"""``A(W1 X + b1)``, (B, C, \*in) of the last convolution."""
        return self.forward(self.first.output(x)).view(self.last.shape)

    def slopes(self, x: Tensor) -> Tensor:
        """M, (B, F1, U1)."""
        return self.activation.derivative(self.before_last(x)).flatten(2)

    def output(self, x: Tensor) -> Tensor:
        """``W2 A(W1 X + b1) + b2``, (B, F, U)."""
        return self.last.output(self.before_last(x))

    def gradient_between(self, g: Tensor, slopes: Tensor) -> Tensor:
        """``g1 = M W2^T g2``, (B, F1, U1)."""
        return self.last.back(g, self.last.weight).flatten(2) * slopes

    def misses(self, x: Tensor, g: Tensor) -> list[Miss]:
        """Of the last convolution, and of the first."""
        between = self.gradient_between(g, self.slopes(x))
        return [*self.last.misses(self.before_last(x), g), *self.first.misses(x, between)]

    def rows(self, reading: Reading, x: Tensor) -> tuple[Rows, ...]:
        """Those of the last convolution through the first, and the first one's gradient rows."""
        slopes = self.slopes(x)
        between = self.first.as_planes(self.gradient_between(reading.g, slopes))

        def to_last(v: Tensor) -> Tensor:
            return self.to_last(v, slopes)

        def from_last(y: Tensor) -> Tensor:
            return self.from_last(y, slopes)

        through = [
            ThroughRows.create(block, self.shape, to_last, from_last, self.constant(slopes))
            for block in self.last.rows(reading, x)
        ]
        return (GradientRows.create(self.first.geometry, self.first.grad_weight, between), *through)

    def to_last(self, x: Tensor, slopes: Tensor) -> Tensor:
        r"""``M W1 X``, (B, C, \*in) of the last convolution."""
        return ((self.first.output(x) - self.first.bias[:, None]) * slopes).view(self.last.shape)

    def from_last(self, y: Tensor, slopes: Tensor) -> Tensor:
        """``W1^T M y``."""
        return self.first.back(y.flatten(2) * slopes, self.first.weight)

    def constant(self, slopes: Tensor) -> Tensor:
        """``M b1``."""
        return (self.first.bias[:, None] * slopes).view(self.last.shape)


class Solver(Protocol):
    """Solves the weighted equations of a front, again and again."""

    def solve(self, reading: Reading, filter_weights: Sequence[Tensor], ridge: float, start: Tensor | None) -> Tensor:
        """The minimiser; filter weights (F,) of each layer, last one first."""


def solver_of(front: Front) -> Solver:
    """The solver of a front."""
    return MergedSolver(front) if isinstance(front, Merged) else WeightedSolver(front.last)


@dataclass(frozen=True)
class MergedSolver:
    """Conjugate gradients on the weighted equations of two merged convolutions."""

    front: Merged

    def solve(self, reading: Reading, filter_weights: Sequence[Tensor], ridge: float, start: Tensor | None) -> Tensor:
        """A few steps towards the minimiser, from `start`; without one, from what the last convolution says alone."""
        front, (first, last) = self.front, (self.front.first, self.front.last)
        if start is None:
            x = WeightedSolver(last).solve(reading, filter_weights, ridge, None)
            return self._start(x.clamp(last.low, last.high))
        slopes = front.slopes(start)
        g = front.gradient_between(reading.g, slopes)
        w_last, w_first = (w.view(-1, *(1,) * (last.geometry.ndim + 1)) for w in filter_weights)

        def values_back(y: Tensor) -> Tensor:
            return last.back(reading.weight * y, last.weight)

        def gradients(x: Tensor) -> Tensor:
            return last.back(reading.g, w_last * last.weight_gradient(x, reading.g))

        def normal(x: Tensor) -> Tensor:
            y = front.to_last(x, slopes)
            back = values_back(last.output(y) - last.bias[:, None]) + gradients(y)
            own = first.back(g, w_first * first.weight_gradient(x, g))
            return front.from_last(back, slopes) + own

        constant = front.constant(slopes)
        seen = last.grad_weight - last.weight_gradient(constant, reading.g)
        back = values_back(reading.target - last.output(constant)) + last.back(reading.g, w_last * seen)
        rhs = front.from_last(back, slopes) + first.back(g, w_first * first.grad_weight)
        return self._iterate(normal, rhs, start, LESS * ridge, ITERATIONS)

    def _start(self, x: Tensor) -> Tensor:
        """The smooth X with ``W1 X + b1 = A^-1(x)`` where the activation is not flat."""
        first, activation = self.front.first, self.front.activation
        known = (activation.derivative(x) > 0).flatten(2)
        o = torch.where(known, activation.inverse(x).flatten(2), 0.0)

        def normal(v: Tensor) -> Tensor:
            return first.back((first.output(v) - first.bias[:, None]) * known, first.weight)

        rhs = first.back((o - first.bias[:, None]) * known, first.weight)
        return self._iterate(normal, rhs, torch.zeros_like(rhs), START_RIDGE, START_ITERATIONS)

    def _iterate(
        self, normal: Callable[[Tensor], Tensor], rhs: Tensor, start: Tensor, ridge: float, iterations: int
    ) -> Tensor:
        """``normal(x) + ridge t R x = rhs``, t the mean diagonal (by random signs) and R the roughness."""
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, start.shape, generator=generator) * 2 - 1).to(start)
        size = ridge * float((signs * normal(signs)).sum()) / math.prod(start.shape)
        roughness = WeightedSolver(self.front.first).roughness

        def regularised(x: Tensor) -> Tensor:
            return normal(x) + size * (x.flatten(2) @ roughness).view(x.shape)

        step, _ = conjugate_gradients(regularised, rhs - regularised(start), tolerance=RTOL, iterations=iterations)
        return start + step

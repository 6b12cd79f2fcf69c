"""A convolution whose output is seen through a hidden pattern: what is known, and what a pattern has to offer.

``o = W x + b``; known are W, b, ``dL/dW`` and what lies behind. Under a pattern two blocks of equations are linear in
x:

    ``sum_{b,u} g[b,f,u] x[b,c,u*s+k*d-p] = dW[f,c,k]``   with the gradient g = dL/do that the pattern implies
    ``o[b,f,u] = t[b,f,u]``                               where the pattern makes an output known
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import GradientRows, Rows, System, WeightRows

if TYPE_CHECKING:
    from rconv_fast.patterns.robust import Schedule


@dataclass(frozen=True)
class Convolution:
    """The convolution in front of the hidden layer. Outputs are flat planes (B, F, U) here.

    Attributes
    ----------
    geometry : ConvGeometry
        All sizes.
    weight, grad_weight : Tensor, shape (F, C/groups, *K)
        W and dL/dW.
    bias : Tensor, shape (F,)
        b.
    batch : int
        Samples whose inputs are unknown.
    low, high : float
        Range of x: 0 and inf behind a ReLU.
    image : bool
        Whether x is the network's input: neighbours are alike. Elsewhere values are small at best.
    """

    geometry: ConvGeometry
    weight: Tensor
    bias: Tensor
    grad_weight: Tensor
    batch: int = 1
    low: float = -math.inf
    high: float = math.inf
    image: bool = False

    @property
    def shape(self) -> torch.Size:
        r"""Of the unknown, (B, C, \*in)."""
        return torch.Size((self.batch, self.geometry.in_channels, *self.geometry.input_size))

    @property
    def rows_per_unknown(self) -> float:
        """Gradient rows for each unknown of one channel, ``F K / (G B n)``."""
        g = self.geometry
        return g.out_channels * g.n_taps / (g.groups * self.batch * g.n_input)

    def as_planes(self, outputs: Tensor) -> Tensor:
        r"""(B, F, U) to (B, F, \*out)."""
        return outputs.reshape(len(outputs), self.geometry.out_channels, *self.geometry.out_size)

    def output(self, x: Tensor) -> Tensor:
        """``W x + b``, (B, F, U)."""
        return apply_weight(self.geometry, x, self.weight).flatten(2) + self.bias[:, None]

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """``B x``: dL/dW if x is the input and g (B, F, U) the gradient of the output."""
        return apply_gradient(self.geometry, x, self.as_planes(g))

    def back(self, y: Tensor, kernel: Tensor) -> Tensor:
        """The adjoint of both: ``W^T y`` with kernel W, ``B^T y`` with g for y and y as the kernel."""
        return apply_weight_adjoint(self.geometry, self.as_planes(y), kernel)

    @property
    def bends(self) -> bool:
        """No."""
        return False

    @property
    def last(self) -> Convolution:
        """Itself."""
        return self

    def before_last(self, x: Tensor) -> Tensor:
        """X."""
        return x

    def misses(self, x: Tensor, g: Tensor) -> list[Miss]:
        """``B x - dW``, of filters that have a gradient."""
        return [Miss(self.weight_gradient(x, g) - self.grad_weight, self.grad_weight, g.any(-1).any(0))]

    def rows(self, reading: Reading, x: Tensor) -> tuple[Rows, ...]:
        """Gradient rows, and a row for every output that is known."""
        gradients = GradientRows.create(self.geometry, self.grad_weight, self.as_planes(reading.g))
        output = self.as_planes(reading.target - self.bias[:, None])
        values = WeightRows.create(self.geometry, self.weight, output, self.as_planes(reading.weight.sqrt()))
        return (gradients, values) if values.count else (gradients,)


@dataclass(frozen=True)
class Miss:
    """By how much ``dL/dW`` of a layer is missed, what was seen of it, and which filters have a gradient (F,)."""

    miss: Tensor
    seen: Tensor
    alive: Tensor

    @property
    def relative(self) -> float:
        """``||miss|| / ||seen||``."""
        return float(self.miss.norm() / self.seen.norm())


class Front(Protocol):
    """What stands in front of a hidden layer: one convolution, or two merged."""

    @property
    def shape(self) -> torch.Size:
        r"""Of the unknown, (B, C, \*in)."""

    @property
    def low(self) -> float:
        """Least value of the unknown."""

    @property
    def high(self) -> float:
        """Its largest value."""

    @property
    def image(self) -> bool:
        """Whether the unknown is the network's input."""

    @property
    def bends(self) -> bool:
        """Whether the equations are linear only near the iterate."""

    @property
    def last(self) -> Convolution:
        """The convolution right in front of the hidden layer."""

    def before_last(self, x: Tensor) -> Tensor:
        """Its input."""

    def output(self, x: Tensor) -> Tensor:
        """What the hidden layer takes, (B, F, U)."""

    def misses(self, x: Tensor, g: Tensor) -> list[Miss]:
        """Of the gradients of all weights, last layer first; g (B, F, U) the gradient of the output."""

    def rows(self, reading: Reading, x: Tensor) -> tuple[Rows, ...]:
        """All equations, with what lies between on the pieces of a forward run of x."""


@dataclass(frozen=True)
class Reading:
    """What a (perhaps relaxed) pattern says of the outputs: all (B, F, U).

    Attributes
    ----------
    g : Tensor
        dL/do.
    target, weight : Tensor
        The values outputs have, and the weight of the squared miss of each (0: not known).
    """

    g: Tensor
    target: Tensor
    weight: Tensor


class Hidden(Protocol):
    """A hidden pattern: what a forward run says of it, and what it says of the outputs."""

    def relaxed(self) -> Reading:
        """The start: every piece that is possible, a little."""

    def choose(self, o: Tensor) -> Tensor:
        """The pattern of a forward run."""

    def tight(self, pattern: Tensor) -> Reading:
        """A pattern taken at its word: every known output counts the same."""

    def residual(self, o: Tensor, pattern: Tensor) -> Tensor:
        """By how much a forward run misses the known outputs, one number each."""

    def robust(self, o: Tensor, pattern: Tensor, sigma: float, schedule: Schedule) -> Reading:
        """The pattern of a forward run, believed where it is clear and fits, `sigma` the size of the misfit."""

    def refined(self, convolution: Convolution, x: Tensor, pattern: Tensor, sigma: float) -> Tensor:
        """The pattern that gradients and values favour together at a fixed x; `sigma` the size of the misfit."""

    def pieces(self, o: Tensor, tie: float) -> Tensor:
        """The pieces of a forward run as a `Pattern` holds them; outputs that differ by `tie` (relative) are equal."""

    def misfit(self, o: Tensor) -> float:
        """Relative mismatch of what is seen behind the hidden layer."""


@dataclass(frozen=True)
class Problem:
    """What stands in front of a hidden layer, its pattern, and the relative misfit up to which both are met exactly."""

    front: Front
    hidden: Hidden
    tolerance: float = 1e-10

    def gradient_misfit(self, x: Tensor, reading: Reading) -> float:
        """``||B x - dW|| / ||dW||``, of the layer that it is largest for."""
        return max(miss.relative for miss in self.front.misses(x, reading.g))

    def system(self, reading: Reading, x: Tensor) -> System:
        """All equations under a pattern; what the front hides itself is on the pieces of a forward run of x."""
        return System(self.front.shape, self.front.rows(reading, x))

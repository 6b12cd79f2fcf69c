"""The rules of the recursion: what a layer's output and its gradient say about its input.

A rule knows three things of its layer ``y = f(x)`` with ``dL/dy`` given:

* ``pull_gradient``: ``dL/dx`` (to each operand);
* ``pull_value``: the values of x that follow from values of y one by one (inverting an activation, an affine
  map, a reshape, a sum whose other operand is known);
* ``rows``: linear equations for x (a convolution's gradient and weight constraints, an average).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.activation import Activation
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.solve import GradientRows, MapRows, Rows, WeightRows

Forward = Callable[..., Tensor]
Operands = Sequence[Tensor | None]


class Rule:
    """The default: a layer that says nothing of its input. `x` are the operands, None where not recovered."""

    kind: str
    needs_output: ClassVar[bool] = False

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``dL/dx`` of one operand of the given shape, from ``dL/dy`` (and y where `needs_output`)."""
        raise NotImplementedError

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge | None:
        """What the output's values say of one operand, value by value."""
        return None

    def rows(self, grad: Tensor, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
        """Linear equations for the operand."""
        return []


@dataclass(frozen=True)
class UnsupportedRule(Rule):
    """A layer the recursion cannot pass."""

    kind: str
    reason: str


# Below this derivative an activation is saturated: inverting it would amplify noise by more than the inverse.
MIN_DERIVATIVE = 1e-7


@dataclass(frozen=True)
class ConvRule(Rule):
    """A convolution or (with ``input_size = kernel_size = (1,)``) a fully connected layer."""

    kind: str
    geometry: ConvGeometry
    weight: Tensor
    bias: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None

    def _as_output(self, y: Tensor) -> Tensor:
        r"""(B, F, \*out), also for a fully connected layer's (B, F)."""
        return y.reshape(len(y), self.geometry.out_channels, *self.geometry.out_size)

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``A^T g``."""
        return apply_weight_adjoint(self.geometry, self._as_output(grad), self.weight).reshape(shape)

    def rows(self, grad: Tensor, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
        """Gradient constraints, and weight constraints where pre-activations are known."""
        rows: list[Rows] = []
        if self.grad_weight is not None:
            # g = A' dL/da, and A' is known to a rounding of 1: the relative noise of g is 1/A', y's weight is A'.
            noise = None if y is None else self._as_output(grad.abs() / y.weight.clamp_min(MIN_DERIVATIVE))
            rows.append(GradientRows.create(self.geometry, self.grad_weight, self._as_output(grad), noise))
        if y is not None and bool((y.weight > 0).any()):
            output = self._as_output(y.value)
            if self.bias is not None:
                output = output - self.bias.reshape(1, -1, *(1,) * self.geometry.ndim)
            rows.append(WeightRows.create(self.geometry, self.weight, output, self._as_output(y.weight)))
        return rows


@dataclass(frozen=True)
class ActivationRule(Rule):
    """An element-wise monotone activation; its derivative is a function of its output."""

    activation: Activation
    needs_output: ClassVar[bool] = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The activation's name."""
        return self.activation.name

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``A'(o) dL/da``."""
        assert y is not None
        return grad * self.activation.derivative(y)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """``o`` where the derivative is not 0; its error is a's times ``1/A'``: the weight is ``A'``."""
        slope = self.activation.derivative(y.value)
        weight = torch.where(slope > MIN_DERIVATIVE, slope.clamp_max(1.0), 0.0) * y.weight
        value = torch.where(weight > 0, self.activation.inverse(y.value), 0.0)
        bad = ~torch.isfinite(value)
        return Knowledge(value.masked_fill(bad, 0.0), weight.masked_fill(bad, 0.0))


@dataclass(frozen=True)
class AffineRule(Rule):
    """``y = scale x + shift``: batch norm in evaluation mode, a multiplication by a number."""

    kind: str
    scale: Tensor
    shift: Tensor
    grad_bias: Tensor | None = None

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``scale dL/dy``."""
        return grad * self.scale

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """``(y - shift) / scale`` where the scale is not 0."""
        alive = (self.scale != 0).to(y.weight)
        safe = torch.where(self.scale != 0, self.scale, 1.0)
        return Knowledge((y.value - self.shift) / safe, y.weight * alive)


@dataclass(frozen=True)
class SumRule(Rule):
    """``y = sign_0 x_0 + sign_1 x_1``: a residual addition; a known operand leaves the other one known."""

    kind: str
    signs: tuple[float, float]
    constant: Tensor | None = None

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """The same gradient on both branches (summed over what broadcasting repeated)."""
        return (self.signs[operand] * grad).sum_to_size(shape)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge | None:
        """``x_i = sign_i (y - sign_j x_j)``."""
        other = self.constant if self.constant is not None else x[1 - operand]
        if other is None or y.value.shape != torch.broadcast_shapes(y.value.shape, other.shape):
            return None
        return Knowledge(self.signs[operand] * (y.value - self.signs[1 - operand] * other), y.weight)


@dataclass(frozen=True)
class RearrangeRule(Rule):
    """Views, permutations, concatenations, padding: ``y[j] = x[source[j] - 1]``, 0 where source is 0."""

    kind: str
    sources: tuple[Tensor, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def create(cls, kind: str, forward: Forward, operands: Sequence[Tensor]) -> RearrangeRule:
        """Find the sources by running `forward` on indices instead of values."""
        sources = []
        for operand in range(len(operands)):
            indices = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in operands]
            count = operands[operand].numel()
            indices[operand] = torch.arange(1.0, count + 1, dtype=torch.float64, device=operands[operand].device)
            indices[operand] = indices[operand].reshape(operands[operand].shape)
            sources.append(forward(*indices).long())
        return cls(kind, tuple(sources), tuple(x.shape for x in operands))

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """Every output's gradient goes back to where it came from."""
        return self._sum_by_source(grad, operand)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        """Values likewise; where one input went to several outputs, their mean by weight."""
        total = self._sum_by_source(y.weight, operand)
        weighted = self._sum_by_source(y.weight * y.value, operand)
        return Knowledge(torch.where(total > 0, weighted / total, 0.0), total.clamp_max(1.0))

    def _sum_by_source(self, values: Tensor, operand: int) -> Tensor:
        shape = self.shapes[operand]
        target = values.new_zeros(shape.numel() + 1)
        target.index_add_(0, self.sources[operand].reshape(-1), values.reshape(-1))
        return target[1:].reshape(shape)

    @property
    def support(self) -> Tensor:
        """Outputs that are not constant 0."""
        return torch.stack([source > 0 for source in self.sources]).any(dim=0)


@dataclass(frozen=True)
class AverageRule(Rule):
    """A linear map, no entry negative, that cannot be inverted value by value: average pooling, a mean."""

    kind: str
    forward: Forward

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """The map's adjoint."""
        with torch.enable_grad():
            x = grad.new_zeros(shape).requires_grad_()
            (gradient,) = torch.autograd.grad(self.forward(x), x, grad)
        return gradient

    def rows(self, grad: Tensor, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
        """One equation an average."""
        return linear_map_rows(self.forward, y, shape)


def linear_map_rows(forward: Forward, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
    """Rows ``forward(x) = y`` for an affine map, where y is known."""
    if y is None or not bool((y.weight > 0).any()):
        return []
    with torch.no_grad():
        offset = forward(y.value.new_zeros(shape))
    return [MapRows.create(lambda x: forward(x) - offset, shape, y.value - offset, y.weight)]

"""Convolutions, and fully connected layers as convolutions of one position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.constraints.operators import apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.activation import MIN_DERIVATIVE
from rconv_fast.layers.base import Rule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.solve import GradientRows, Rows, WeightRows

# Entries of a fully connected layer's weight that are converted at once.
TOGETHER = 1 << 22


@dataclass(frozen=True)
class Stored:
    """A layer's parameters and their gradients as they were given; converted when the layer is solved, not before."""

    weight: Tensor
    bias: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    weight_name: str = ""
    bias_name: str = ""


@dataclass(frozen=True)
class ConvRule(Rule):
    """A convolution or (with ``input_size = kernel_size = (1,)``) a fully connected layer."""

    kind: str
    geometry: ConvGeometry
    stored: Stored
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        r"""(F, C/groups, \*K), in the working precision."""
        weight = self._read(self.stored.weight)
        assert weight is not None
        return weight.reshape(self._weight_shape)

    @property
    def bias(self) -> Tensor | None:
        """(F,) or None."""
        return self._read(self.stored.bias)

    @property
    def grad_weight(self) -> Tensor | None:
        """``dL/dW`` in the weight's shape, or None where it was not seen."""
        grad = self._read(self.stored.grad_weight)
        return None if grad is None else grad.reshape(self._weight_shape)

    @property
    def grad_bias(self) -> Tensor | None:
        """``dL/db`` (F,), or None where it was not seen or there is no bias."""
        return self._read(self.stored.grad_bias)

    @property
    def is_linear(self) -> bool:
        """Whether this is a fully connected layer on (B, C)."""
        return self.geometry.n_taps == 1 and tuple(self.geometry.input_size) == (1,)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        g = self.geometry
        return (g.out_channels, g.in_channels // g.groups, *g.kernel_size)

    def _read(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.dtype)

    def _as_output(self, y: Tensor) -> Tensor:
        r"""(B, F, \*out), also for a fully connected layer's (B, F)."""
        return y.reshape(len(y), self.geometry.out_channels, *self.geometry.out_size)

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """``A^T g``; of a large fully connected layer some columns of the weight at a time."""
        if not self.is_linear:
            return apply_weight_adjoint(self.geometry, self._as_output(grad), self.weight).reshape(shape)
        together = max(1, TOGETHER // self.geometry.out_channels)
        parts = self.stored.weight.reshape(self._weight_shape[:2]).split(together, dim=1)
        return torch.cat([grad.flatten(1) @ part.to(self.dtype) for part in parts], 1).reshape(shape)

    def rows(self, grad: Tensor, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
        """Gradient constraints, and weight constraints where pre-activations are known."""
        rows: list[Rows] = []
        if self.stored.grad_weight is not None:
            grad_weight = self.stored.grad_weight.reshape(self._weight_shape)
            # g = A' dL/da, and A' is known to a rounding of 1: the relative noise of g is 1/A', y's weight is A'.
            noise = None if y is None else self._as_output(grad.abs() / y.weight.clamp_min(MIN_DERIVATIVE))
            rows.append(self._gradient_rows(grad_weight, self._as_output(grad), noise))
        if y is not None and bool((y.weight > 0).any()):
            output = self._as_output(y.value)
            if self.bias is not None:
                output = output - self.bias.reshape(1, -1, *(1,) * self.geometry.ndim)
            weight = self.stored.weight.reshape(self._weight_shape)
            rows.append(WeightRows.create(self.geometry, weight, output, self._as_output(y.weight)))
        return rows

    def _gradient_rows(self, grad_weight: Tensor, grad: Tensor, noise: Tensor | None) -> GradientRows:
        """All rows; of a fully connected layer those of outputs that pass a gradient: half of them behind a ReLU."""
        live = grad.flatten(2).ne(0).any(dim=2).any(dim=0)
        if not self.is_linear or self.geometry.groups > 1 or not 0 < int(live.sum()) < len(live):
            return GradientRows.create(self.geometry, grad_weight, grad, noise)
        part = replace(self.geometry, out_channels=int(live.sum()))
        return GradientRows.create(part, grad_weight[live], grad[:, live], None if noise is None else noise[:, live])

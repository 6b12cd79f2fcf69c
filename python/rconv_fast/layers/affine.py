"""Affine maps value by value, and residual additions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.knowledge import Knowledge


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
    shapes: tuple[torch.Size, torch.Size]

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        """The same gradient on both branches (summed over what broadcasting repeated)."""
        return (self.signs[operand] * grad).sum_to_size(shape)

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge | None:
        """``x_i = sign_i (y - sign_j x_j)``."""
        other = x[1 - operand]
        if other is None or y.value.shape != self.shapes[operand]:  # broadcasting repeated the operand
            return None
        return Knowledge(self.signs[operand] * (y.value - self.signs[1 - operand] * other), y.weight)

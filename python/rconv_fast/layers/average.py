"""Linear maps that cannot be inverted value by value: average pooling, a mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.layers.base import Forward, Rule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.solve import MapRows, Rows


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

    def rows_through(
        self, before: Rule, forward: Forward, grad: Tensor, y: Knowledge | None, shape: torch.Size
    ) -> list[Rows]:
        """A convolution, then an average: their product is linear."""
        return linear_map_rows(forward, y, shape) if isinstance(before, ConvRule) else []


def linear_map_rows(forward: Forward, y: Knowledge | None, shape: torch.Size) -> list[Rows]:
    """Rows ``forward(x) = y`` for an affine map, where y is known."""
    if y is None or not bool((y.weight > 0).any()):
        return []
    with torch.no_grad():
        offset = forward(y.value.new_zeros(shape))
    return [MapRows.create(lambda x: forward(x) - offset, shape, y.value - offset, y.weight)]

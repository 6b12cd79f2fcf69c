"""Layers that move values about: views, permutations, concatenations, padding, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.layers.base import Forward, Operands, Rule
from rconv_fast.layers.knowledge import Knowledge


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
            x = operands[operand]
            if not x.is_meta:  # there are no numbers there, and torch would import its compiler to make none
                numbers = torch.arange(1.0, x.numel() + 1, dtype=torch.float64, device=x.device)
                indices[operand] = numbers.reshape(x.shape)
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

    @property
    def keeps_order(self) -> bool:
        """Whether the values are only given another shape (assumed on the meta device, where no order is known)."""
        if len(self.sources) != 1 or self.sources[0].numel() != self.shapes[0].numel():
            return False
        flat = self.sources[0].reshape(-1)
        if flat.is_meta:
            return True
        return torch.equal(flat, torch.arange(1, flat.numel() + 1, device=flat.device))

"""Max pooling: linear once it is known which input each maximum came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rconv_fast.layers.base import Rule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.patterns.windows import Windows


@dataclass(frozen=True)
class MaxPoolRule(Rule):
    """``y[v] = max_{u in window v} x[u]``, positions unknown."""

    kind: str
    windows: Windows
    hidden: ClassVar[bool] = True

    def at(self, piece: Tensor) -> RearrangeRule:
        """Values picked at flat positions (B, C, *out) in their planes; -1 where the position is not known."""
        n = self.windows.n
        plane = torch.arange(piece[:, :, ...].shape[:2].numel(), device=piece.device)
        plane = plane.reshape(*piece.shape[:2], *(1,) * (piece.ndim - 2))
        source = torch.where(piece >= 0, plane * n + piece + 1, 0)
        return RearrangeRule(self.kind, (source,), (torch.Size((*piece.shape[:2], *self.windows.in_size)),))

    def piece_of(self, x: Tensor) -> Tensor:
        """The positions of a forward run's maxima, torch's rule: the first of equal ones."""
        return self.windows.first_largest(x.flatten(2)).reshape(*x.shape[:2], *self.windows.out_size)

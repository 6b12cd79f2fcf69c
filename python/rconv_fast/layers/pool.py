"""Max pooling: linear once it is known which input each maximum came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rconv_fast.geometry import as_tuple
from rconv_fast.layers.base import Rule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.layers.windows import TIE, Windows


@dataclass(frozen=True)
class MaxPoolRule(Rule):
    """``y[v] = max_{u in window v} x[u]``, positions unknown."""

    kind: str
    windows: Windows
    hidden: ClassVar[bool] = True

    @classmethod
    def create(
        cls, kind: str, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
    ) -> MaxPoolRule:
        """Windows of one size over x; sizes as torch takes them, no stride being the kernel's."""
        size = tuple(x.shape[2:])
        stride = stride if stride not in (None, (), []) else kernel
        k, s, p, d = (as_tuple(v, len(size), "invert", "kernel_size") for v in (kernel, stride, padding, dilation))
        return cls(kind, Windows.create(size, k, s, p, d, ceil_mode, x.device))

    @classmethod
    def adaptive(cls, kind: str, x: Tensor, y: Tensor) -> MaxPoolRule:
        """As many windows over x as y has positions."""
        return cls(kind, Windows.adaptive(tuple(x.shape[2:]), tuple(y.shape[2:]), x.device))

    def at(self, piece: Tensor) -> RearrangeRule:
        """Values picked at flat positions (B, C, *out) in their planes; -1 where the position is not known."""
        n = self.windows.n
        plane = torch.arange(piece.shape[:2].numel(), device=piece.device)
        plane = plane.reshape(*piece.shape[:2], *(1,) * (piece.ndim - 2))
        source = torch.where(piece >= 0, plane * n + piece + 1, 0)
        return RearrangeRule(self.kind, (source,), (torch.Size((*piece.shape[:2], *self.windows.in_size)),))

    def piece_of(self, x: Tensor, tie: float = 0.0) -> Tensor:
        """The positions of a forward run's maxima, torch's rule: the first of equal ones."""
        return self.windows.first_largest(x.flatten(2), max(tie, TIE)).reshape(*x.shape[:2], *self.windows.out_size)

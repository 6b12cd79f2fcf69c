"""The windows of a pooling layer: which positions of a plane each pooled value is the maximum (or the mean) of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.geometry import Size

# Values this close, relative to the largest of the plane, are equal: a flat background, rounded.
TIE = 1e-12
Spans = list[list[int]]


@dataclass(frozen=True)
class Windows:
    """Windows of a plane of ``n`` positions, 1-D to 3-D.

    Attributes
    ----------
    index : Tensor, shape (V, Q)
        Flat positions of each window in torch's order, n where a window reaches outside the plane.
    in_size, out_size : tuple of int
        The plane, and the plane of pooled values.
    """

    index: Tensor
    in_size: Size
    out_size: Size

    @classmethod
    def create(
        cls,
        in_size: Size,
        kernel_size: Size,
        stride: Size,
        padding: Size,
        dilation: Size,
        ceil_mode: bool = False,
        device: torch.device | None = None,
    ) -> Windows:
        """The windows of ``nn.MaxPool1d`` to ``nn.MaxPool3d``."""
        sizes = zip(in_size, kernel_size, stride, padding, dilation, strict=True)
        return cls._product(in_size, [_pool_spans(*axis, ceil_mode) for axis in sizes], device)

    @classmethod
    def adaptive(cls, in_size: Size, out_size: Size, device: torch.device | None = None) -> Windows:
        """The windows of ``nn.AdaptiveMaxPool1d`` to ``nn.AdaptiveMaxPool3d``: from floor(v n/m) to ceil((v+1) n/m)."""
        spans = [
            [list(range(v * n // m, -(-(v + 1) * n // m))) for v in range(m)]
            for n, m in zip(in_size, out_size, strict=True)
        ]
        return cls._product(in_size, spans, device)

    @classmethod
    def _product(cls, in_size: Size, spans: Sequence[Spans], device: torch.device | None) -> Windows:
        """Combine the axes; all windows get as many entries as the largest has."""
        n, out_size = math.prod(in_size), tuple(len(axis) for axis in spans)
        width = [max(len(span) for span in axis) for axis in spans]
        padded = [[span + [-1] * (w - len(span)) for span in axis] for axis, w in zip(spans, width, strict=True)]
        index = [
            [_flat(place, in_size) for place in itertools.product(*window)] for window in itertools.product(*padded)
        ]
        return cls(
            torch.tensor(index, device=device).where(torch.tensor(index, device=device) >= 0, n), in_size, out_size
        )

    @property
    def n(self) -> int:
        """Positions of the plane."""
        return math.prod(self.in_size)

    @property
    def inside(self) -> Tensor:
        """Which entries lie in the plane, (V, Q)."""
        return self.index < self.n

    @property
    def overlap(self) -> bool:
        """Whether a position belongs to several windows."""
        inside = self.index[self.inside]
        return len(inside.unique()) < len(inside)

    def gather(self, plane: Tensor, outside: float = -math.inf) -> Tensor:
        """The values of each window, (B, F, n) -> (B, F, V, Q)."""
        edge = plane.new_full((*plane.shape[:-1], 1), outside)
        return torch.cat([plane, edge], dim=-1)[..., self.index]

    def first_largest(self, plane: Tensor, tie: float = TIE) -> Tensor:
        """Flat positions (B, F, V) of the maxima by torch's rule: of equal values (up to `tie`, relative) the first."""
        values = self.gather(plane)
        close = tie * float(plane.abs().max())
        first = (values >= values.amax(-1, keepdim=True) - close).to(torch.uint8).argmax(-1)
        return self.index.expand(*first.shape, -1).gather(-1, first[..., None])[..., 0]

    def add(self, values: Tensor) -> Tensor:
        """The sum at each position of what its windows hold there, (B, F, V, Q) -> (B, F, n)."""
        plane = values.new_zeros(*values.shape[:-2], self.n + 1)
        return plane.index_add_(-1, self.index.flatten(), values.flatten(-2))[..., : self.n]

    def largest(self, values: Tensor) -> Tensor:
        """The largest of what its windows hold at each position, 0 at least."""
        return self._reduce(values, "amax", 0.0)

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest of what its windows hold at each position, inf where no window is."""
        return self._reduce(values, "amin", math.inf)

    def _reduce(self, values: Tensor, reduction: str, start: float) -> Tensor:
        flat = values.flatten(-2)
        plane = flat.new_full((*flat.shape[:-1], self.n + 1), start)
        return plane.scatter_reduce(-1, self.index.flatten().expand_as(flat), flat, reduction)[..., : self.n]


def _pool_spans(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Spans:
    """The positions of each window on one axis, -1 outside; torch lets no window start in the padding behind."""
    reach = n + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-reach // stride) if ceil_mode else reach // stride) + 1
    if ceil_mode and (out - 1) * stride >= n + padding:
        out -= 1
    starts = range(-padding, out * stride - padding, stride)
    return [[i if 0 <= i < n else -1 for i in range(start, start + dilation * kernel, dilation)] for start in starts]


def _flat(place: tuple[int, ...], size: Size) -> int:
    """Row-major index of a place, -1 where one of its coordinates is outside."""
    if min(place) < 0:
        return -1
    index = 0
    for i, n in zip(place, size, strict=True):
        index = index * n + i
    return index

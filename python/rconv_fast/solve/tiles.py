"""Products of a convolution's equations in float32 with half the multiplications, by the tiles of Toom and Cook.

With the stride phases of x as channels a convolution has no stride and m taps an axis. A tile of e outputs an axis
reads n = e + m - 1 values. Polynomials are multiplied by their values at n points; transposed that is a tile's
correlation (Winograd 1980, chapter 5; Lavin and Gray 2016). With V the values of the n powers at the points, V_e and
V_m its first columns, and hats for what is transformed along both axes,

    x^ = V^-T tiles of x,   W^ = V_m W,   y^ = V_e y,   z^ = V_m z     (for each of the n^2 points a matrix)
    A x = V_e^T (W^ x^),    A^T y = V^-1 (W^T y^),    B x = V_m^T (g^ x^T),    B^T z = V^-1 (z^T g^)

so both blocks of equations share the transform of x and, on the way back, that of their sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.rounded import RoundedSystem, has_bfloat16, pays
from rconv_fast.solve.rows import GradientRows, System, WeightRows

# Finite points beside 0 and infinity: of those tried the ones that round least, three times as much as plain sums.
POINTS = (0.75, -0.75, 1.5, -1.5)
N_POINTS = len(POINTS) + 2
# Taps an axis, and channels times phases and filters, from which the matrix products are large enough to pay.
MIN_TAPS, MAX_TAPS, MIN_CHANNELS, MIN_FILTERS = 3, 5, 32, 64


class Products(Protocol):
    """What an iteration needs of a system, in a layout of its own for the rows."""

    @property
    def rhs(self) -> list[Tensor]:
        """Right-hand sides in this layout."""

    def rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Rows of the system in this layout and precision."""

    def apply(self, x: Tensor) -> list[Tensor]:
        """``M x``."""

    def adjoint(self, y: list[Tensor]) -> Tensor:
        """``M^T y``."""


def products(system: System, dtype: torch.dtype) -> Products:
    """The quickest products in a precision; in float32 where bfloat16 is asked for and does not pay."""
    blocks = [block for block in system.blocks if isinstance(block, GradientRows | WeightRows)]
    same = len(blocks) == len(system.blocks) and len({block.geometry for block in blocks}) == 1
    on_cpu = system.rhs[0].device.type == "cpu"  # elsewhere the library of the device does the like
    if dtype == torch.bfloat16:
        if same and has_bfloat16(system.rhs[0].device) and pays(blocks[0].geometry):
            return RoundedSystem.create(system)
        return products(system, torch.float32)
    if dtype == torch.float32 and same and on_cpu and _pay(blocks[0].geometry):
        return TiledSystem.create(system, blocks)
    return system.to(dtype)


def _pay(g: ConvGeometry) -> bool:
    """Whether a convolution can be cut into tiles, and has so many channels that their products outweigh transforms."""
    if g.ndim != 2 or g.groups != 1 or g.dilation != (1, 1) or min(g.out_channels, g.n_output) < MIN_FILTERS:
        return False
    alike = all(len(set(values)) == 1 for values in (g.stride, g.kernel_size, g.padding))
    return alike and g.in_channels * g.stride[0] ** 2 >= MIN_CHANNELS and MIN_TAPS <= Tiling(g).taps <= MAX_TAPS


@functools.cache
def _values(n_powers: int) -> Tensor:
    """The first powers at the points, (n, n_powers); at infinity only the last counts."""
    finite = torch.tensor([0.0, *POINTS], dtype=torch.float64)
    infinity = torch.zeros(1, n_powers, dtype=torch.float64)
    infinity[0, -1] = 1.0
    return torch.cat([finite[:, None] ** torch.arange(n_powers), infinity])


@functools.cache
def _transform(n_powers: int) -> Tensor:
    """``V_n_powers`` along two axes, (n^2, n_powers^2)."""
    values = _values(n_powers)
    return torch.kron(values, values).float()


@functools.cache
def _inverse() -> Tensor:
    """``V^-1`` along two axes."""
    inverse = torch.linalg.inv(_values(N_POINTS))
    return torch.kron(inverse, inverse).float()


def _along_points(matrix: Tensor, v: Tensor) -> Tensor:
    """A transform of v (n^2 or so, rows, columns) along its first axis."""
    return (matrix @ v.flatten(1)).view(len(matrix), *v.shape[1:])


@dataclass(frozen=True)
class Tiling:
    """Where the tiles of a convolution's outputs lie, and those of the stride phases of its input."""

    geometry: ConvGeometry

    @functools.cached_property
    def first(self) -> int:
        """The first tap's offset, in phases."""
        return -self.geometry.padding[0] // self.geometry.stride[0]

    @functools.cached_property
    def taps(self) -> int:
        """m, the taps an axis."""
        g = self.geometry
        return (g.kernel_size[0] - 1 - g.padding[0]) // g.stride[0] - self.first + 1

    @property
    def edge(self) -> int:
        """e, the outputs of a tile an axis."""
        return N_POINTS - self.taps + 1

    @functools.cached_property
    def counts(self) -> tuple[int, int]:
        """Tiles an axis."""
        rows, columns = (-(-size // self.edge) for size in self.geometry.out_size)
        return rows, columns

    @functools.cached_property
    def _margins(self) -> list[int]:
        """What pads x to whole blocks of e phases, as torch's pad wants it."""
        s, before, margins = self.geometry.stride[0], -self.first * self.geometry.stride[0], []
        for size, tiles in zip(reversed(self.geometry.input_size), reversed(self.counts), strict=True):
            margins += [before, (tiles + self._overlap) * self.edge * s - before - size]
        return margins

    @property
    def _overlap(self) -> int:
        """Blocks of e values that a tile reads beside its own."""
        return -(-N_POINTS // self.edge) - 1

    def of_input(self, x: Tensor) -> Tensor:
        """The values that each tile reads: (B, C, *in) to (n^2, C s^2, B tiles)."""
        s, e, n = self.geometry.stride[0], self.edge, N_POINTS
        padded = F.pad(x, self._margins)
        batch, channels, _, width = padded.shape
        sample, area, column, row = *padded.stride()[:2], s, s * width
        shape = (n, n, channels, s, s, batch, *self.counts)
        strides = (row, column, area, width, 1, sample, e * row, e * column)
        return padded.as_strided(shape, strides).reshape(n * n, channels * s * s, -1)

    def to_input(self, tiles: Tensor) -> Tensor:
        """The adjoint of `of_input`."""
        s, e, n, (rows, columns) = self.geometry.stride[0], self.edge, N_POINTS, self.counts
        channels, more = self.geometry.in_channels, self._overlap
        tiles = tiles.view(n, n, channels * s * s, -1, rows, columns)
        blocks = tiles.new_zeros(e, e, *tiles.shape[2:4], rows + more, columns + more)
        for down in range(more + 1):
            for right in range(more + 1):
                part = tiles[down * e : (down + 1) * e, right * e : (right + 1) * e]
                place = blocks[: len(part), : part.shape[1], :, :, down : down + rows, right : right + columns]
                place += part
        x = blocks.view(e, e, channels, s, s, -1, rows + more, columns + more).permute(5, 2, 6, 0, 3, 7, 1, 4)
        x = x.reshape(-1, channels, (rows + more) * e * s, (columns + more) * e * s)
        return F.pad(x, [-margin for margin in self._margins]).contiguous()

    def of_output(self, y: Tensor) -> Tensor:
        """(B, F, *out) to (e^2, F, B tiles)."""
        (rows, columns), e = self.counts, self.edge
        height, width = self.geometry.out_size
        padded = F.pad(y, (0, columns * e - width, 0, rows * e - height))
        tiles = padded.view(*y.shape[:2], rows, e, columns, e).permute(3, 5, 1, 0, 2, 4)
        return tiles.reshape(e * e, y.shape[1], -1)

    def of_weight(self, w: Tensor) -> Tensor:
        """(F, C, K, K) to (m^2, F, C s^2), 0 where a phase has no tap."""
        s, k, m = self.geometry.stride[0], self.geometry.kernel_size[0], self.taps
        before = -self.first * s - self.geometry.padding[0]
        after = m * s - k - before
        phases = F.pixel_unshuffle(F.pad(w, (before, after, before, after)), s)
        return phases.permute(2, 3, 0, 1).reshape(m * m, len(w), -1)


@dataclass(frozen=True)
class _TiledWeight:
    """``w A``: W^ (n^2, F, C s^2) and w (e^2, F, tiles)."""

    tiling: Tiling
    weight: Tensor
    row_weight: Tensor

    @classmethod
    def create(cls, tiling: Tiling, rows: WeightRows) -> _TiledWeight:
        weight = _along_points(_transform(tiling.taps), tiling.of_weight(rows.weight.float()))
        return cls(tiling, weight, tiling.of_output(rows.row_weight.float()))

    def rows(self, part: Tensor) -> Tensor:
        return self.tiling.of_output(part.float())

    def apply(self, x: Tensor) -> Tensor:
        return _along_points(_transform(self.tiling.edge).mT, self.weight @ x).mul_(self.row_weight)

    def add_adjoint(self, y: Tensor, total: Tensor | None) -> Tensor:
        transformed = _along_points(_transform(self.tiling.edge), y * self.row_weight)
        if total is None:
            return self.weight.mT @ transformed
        return total.baddbmm_(self.weight.mT, transformed)


@dataclass(frozen=True)
class _TiledGradient:
    """``B``: g^ (n^2, F, tiles), and which taps there are (m^2, 1, C s^2)."""

    tiling: Tiling
    grad_output: Tensor
    exists: Tensor

    @classmethod
    def create(cls, tiling: Tiling, rows: GradientRows) -> _TiledGradient:
        grad_output = _along_points(_transform(tiling.edge), tiling.of_output(rows.grad_output.float()))
        return cls(tiling, grad_output, tiling.of_weight(torch.ones_like(rows.rhs[:1], dtype=torch.float32)))

    def rows(self, part: Tensor) -> Tensor:
        return self.tiling.of_weight(part.float())

    def apply(self, x: Tensor) -> Tensor:
        return _along_points(_transform(self.tiling.taps).mT, self.grad_output @ x.mT).mul_(self.exists)

    def add_adjoint(self, y: Tensor, total: Tensor | None) -> Tensor:
        transformed = _along_points(_transform(self.tiling.taps), y).mT
        if total is None:
            return transformed @ self.grad_output
        return total.baddbmm_(transformed, self.grad_output)


@dataclass(frozen=True)
class TiledSystem:
    """The products of a system of gradient and weight rows of one convolution."""

    system: System
    tiling: Tiling
    blocks: tuple[_TiledWeight | _TiledGradient, ...]

    @classmethod
    def create(cls, system: System, blocks: Sequence[GradientRows | WeightRows]) -> TiledSystem:
        """Transform what does not change; `blocks` are the system's, all of one convolution."""
        tiling = Tiling(blocks[0].geometry)
        tiled = [
            _TiledWeight.create(tiling, rows) if isinstance(rows, WeightRows) else _TiledGradient.create(tiling, rows)
            for rows in blocks
        ]
        return cls(system, tiling, tuple(tiled))

    @functools.cached_property
    def rhs(self) -> list[Tensor]:
        """Right-hand sides in tiles."""
        return self.rows(self.system.rhs)

    def rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Outputs and taps in tiles."""
        return [block.rows(part) for block, part in zip(self.blocks, parts, strict=True)]

    def apply(self, x: Tensor) -> list[Tensor]:
        """``M x``, in tiles."""
        transformed = _along_points(_inverse().mT, self.tiling.of_input(x))
        return [block.apply(transformed) for block in self.blocks]

    def adjoint(self, y: list[Tensor]) -> Tensor:
        """``M^T y``, restricted to the support."""
        total: Tensor | None = None
        for block, part in zip(self.blocks, y, strict=True):
            total = block.add_adjoint(part, total)
        assert total is not None
        x = self.tiling.to_input(_along_points(_inverse(), total))
        return x if self.system.support is None else x * self.system.support

"""The geometry of one convolution, shared by the builders, the operators and the solvers.

Output position ``u`` and kernel offset ``k`` meet input position ``i = u*s + k*d - p`` on each axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rconv_fast.errors import require

Size = tuple[int, ...]


def as_tuple(value: int | Sequence[int], ndim: int, function: str, argument: str) -> Size:
    """Expand an int to `ndim` axes, or check that a sequence has `ndim` entries."""
    if isinstance(value, int):
        return (value,) * ndim
    sizes = tuple(int(v) for v in value)
    require(len(sizes) == ndim, function, argument, f"have {ndim} entries or be an int", sizes)
    return sizes


@dataclass(frozen=True)
class Phase:
    """One stride phase: the input positions of one residue modulo the stride, and the offsets that meet them.

    Attributes
    ----------
    taps : tuple of tuple of int
        Per axis, the kernel offsets ``k`` with ``k*d - p = r (mod s)``.
    positions : tuple of range
        Per axis, the input positions ``i = r (mod s)``.
    """

    taps: tuple[Size, ...]
    positions: tuple[range, ...]

    @property
    def n_taps(self) -> int:
        """Number of kernel offsets that touch this phase."""
        return math.prod(len(t) for t in self.taps)

    @property
    def n_positions(self) -> int:
        """Number of input positions of one channel in this phase."""
        return math.prod(len(p) for p in self.positions)


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a 1-D, 2-D or 3-D convolution, in torch's words.

    A fully connected layer is the convolution with ``input_size = kernel_size = (1,)``.
    """

    in_channels: int
    out_channels: int
    input_size: Size
    kernel_size: Size
    stride: Size
    padding: Size
    dilation: Size
    groups: int = 1

    @classmethod
    def create(
        cls,
        function: str,
        in_channels: int,
        out_channels: int,
        input_size: Sequence[int] | int,
        kernel_size: Sequence[int] | int,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
    ) -> ConvGeometry:
        """Check the arguments of a public function, named in its error messages, and build the geometry."""
        input_size = (input_size,) if isinstance(input_size, int) else tuple(map(int, input_size))
        ndim = len(input_size)
        require(1 <= ndim <= 3, function, "input_size", "have 1 to 3 axes", input_size)
        sizes = {"input_size": input_size}
        for name, value in (
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("padding", padding),
            ("dilation", dilation),
        ):
            sizes[name] = as_tuple(value, ndim, function, name)
            lowest = 0 if name == "padding" else 1
            require(min(sizes[name]) >= lowest, function, name, f"be >= {lowest} on every axis", sizes[name])
        require(min(input_size) >= 1, function, "input_size", "be >= 1 on every axis", input_size)
        require(groups >= 1, function, "groups", "be >= 1", groups)
        require(in_channels % groups == 0, function, "groups", f"divide in_channels ({in_channels})", groups)
        require(out_channels % groups == 0, function, "groups", f"divide out_channels ({out_channels})", groups)
        geometry = cls(in_channels, out_channels, groups=groups, **sizes)
        require(
            min(geometry.out_size) >= 1,
            function,
            "kernel_size",
            f"fit into the padded input (input_size {input_size}, padding {geometry.padding}, "
            f"dilation {geometry.dilation})",
            geometry.kernel_size,
        )
        return geometry

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.input_size)

    @cached_property
    def out_size(self) -> Size:
        """Spatial size of the output."""
        return tuple(
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, k, s, p, d in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def n_input(self) -> int:
        """Input positions of one channel."""
        return math.prod(self.input_size)

    @property
    def n_output(self) -> int:
        """Output positions of one filter."""
        return math.prod(self.out_size)

    @property
    def n_taps(self) -> int:
        """Kernel offsets."""
        return math.prod(self.kernel_size)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The stride phases that hold input positions, in row-major order of their residues."""
        per_axis = [self._axis_phases(axis) for axis in range(self.ndim)]
        return tuple(
            Phase(tuple(t for t, _ in combination), tuple(p for _, p in combination))
            for combination in itertools.product(*per_axis)
        )

    def _axis_phases(self, axis: int) -> list[tuple[Size, range]]:
        s, p, d = self.stride[axis], self.padding[axis], self.dilation[axis]
        phases = []
        for residue in range(min(s, self.input_size[axis])):
            taps = tuple(k for k in range(self.kernel_size[axis]) if (k * d - p - residue) % s == 0)
            phases.append((taps, range(residue, self.input_size[axis], s)))
        return phases

    def __str__(self) -> str:
        def short(size: Size) -> str:
            return str(size[0]) if len(set(size)) == 1 else "x".join(map(str, size))

        return (
            f"{self.in_channels}-{self.out_channels}-in{'x'.join(map(str, self.input_size))}"
            f"-k{short(self.kernel_size)}-s{short(self.stride)}-p{short(self.padding)}"
            f"-d{short(self.dilation)}-g{self.groups}"
        )

"""Tools for tests of constraint matrices and operators, for this package and for those built on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def geometry(
    channels: tuple[int, int],
    input_size: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Return a ``ConvGeometry`` from ``(in_channels, out_channels)`` and sizes."""
    return ConvGeometry.create("geometry", *channels, input_size, kernel_size, stride, padding, dilation, groups)


GEOMETRIES: dict[str, ConvGeometry] = {
    "same 3x3": geometry((2, 3), (6, 6), 3, padding=1),
    "valid 3x3": geometry((2, 3), (7, 5), 3),
    "pointwise": geometry((3, 4), (5, 4), 1),
    "linear": geometry((6, 5), (1,), 1),
    "stride 2, even input": geometry((1, 4), (8, 8), 3, stride=2, padding=1),
    "stride 2, odd input": geometry((2, 3), (7, 9), 3, stride=2, padding=1),
    "stride > kernel": geometry((2, 3), (9, 8), 2, stride=3),
    "stride > kernel, pointwise": geometry((1, 2), (7, 6), 1, stride=2),
    "padding >= kernel": geometry((2, 3), (4, 3), 2, padding=3),
    "padding > input": geometry((1, 2), (2, 3), 2, stride=2, padding=4),
    "dilation 2": geometry((2, 3), (9, 7), 3, padding=2, dilation=2),
    "dilation > input": geometry((1, 2), (3, 4), 2, padding=4, dilation=5),
    "stride and dilation share a factor": geometry((2, 3), (9, 10), 3, stride=2, padding=1, dilation=2),
    "unlike axes": geometry((2, 3), (9, 6), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "groups 2": geometry((4, 6), (6, 5), 3, padding=1, groups=2),
    "depthwise": geometry((3, 6), (6, 6), 3, stride=2, padding=1, groups=3),
    "1-D": geometry((2, 3), (13,), 4, stride=3, padding=2),
    "1-D kernel = input": geometry((2, 3), (5,), 5),
    "3-D": geometry((2, 3), (4, 5, 3), (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1)),
}
"""Geometries that have tripped convolution code before, by name; small enough for brute force."""


def random_geometry(generator: random.Random, largest: int = 8) -> ConvGeometry:
    """Draw a small geometry with at least one output position; `largest` bounds the input's sides."""
    while True:
        n = generator.randint(1, 3)

        def draw(low: int, high: int, n: int = n) -> tuple[int, ...]:
            return tuple(generator.randint(low, high) for _ in range(n))

        groups = generator.choice([1, 1, 2, 3])
        channels = (groups * generator.randint(1, 2), groups * generator.randint(1, 3))
        sizes = (draw(1, largest), draw(1, 4), draw(1, 4), draw(0, 4), draw(1, 3))
        candidate = ConvGeometry(*channels, *sizes, groups)
        if min(candidate.out_size) >= 1:
            return candidate


def geometries(largest: int = 8) -> SearchStrategy[ConvGeometry]:
    """Return the hypothesis strategy of ``random_geometry``; needs hypothesis installed."""
    from hypothesis import strategies

    return strategies.randoms(use_true_random=False).map(lambda source: random_geometry(source, largest))


def adjoint_test(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float = 1e-12,
) -> None:
    """Assert ``<A x, y> == <x, A^T y>``, which index slips break even where symmetric data hide them.

    Parameters
    ----------
    forward, adjoint : callable
        ``A`` and ``A^T``.
    x, y : Tensor
        Points of the domain and the range; random ones say most.
    rtol : float
        Allowed difference, relative to ``|Ax| |y| + |x| |A^T y|``.
    """
    ax, aty = forward(x), adjoint(y)
    assert ax.shape == y.shape, f"A x has shape {tuple(ax.shape)}, y {tuple(y.shape)}"
    assert aty.shape == x.shape, f"A^T y has shape {tuple(aty.shape)}, x {tuple(x.shape)}"
    left, right = (ax.double() * y.double()).sum(), (x.double() * aty.double()).sum()
    scale = ax.double().norm() * y.double().norm() + x.double().norm() * aty.double().norm()
    assert abs(left - right) <= rtol * scale, f"<Ax, y> = {left:.17g}, <x, A^T y> = {right:.17g}"


def assert_csr_valid(matrix: Tensor) -> None:
    """Assert the invariants of a CSR tensor: offsets from 0 to nnz, columns in range, sorted and unique."""
    crow, col, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    n_rows, n_cols = matrix.shape
    assert crow.dtype == col.dtype, f"offsets are {crow.dtype}, columns {col.dtype}"
    assert len(crow) == n_rows + 1, f"{len(crow)} offsets for {n_rows} rows"
    assert crow[0] == 0, f"the first offset is {crow[0]}"
    assert crow[-1] == len(col) == len(values), f"the last offset is {crow[-1]}, with {len(col)} columns"
    lengths = crow.diff()
    assert (lengths >= 0).all(), "offsets fall"
    if len(col) == 0:
        return
    assert col.min() >= 0, f"column {col.min()} < 0"
    assert col.max() < n_cols, f"column {col.max()} of {n_cols}"
    row = torch.arange(n_rows, device=col.device).repeat_interleave(lengths.long())
    position = row * n_cols + col
    assert (position.diff() > 0).all(), "columns of a row are unsorted or double"


def brute_force_gradient_constraints(geometry: ConvGeometry, grad_output: Tensor) -> Tensor:
    """Return the dense gradient-constraint matrix, from the definition: a loop over every pair of indices."""
    batch = len(grad_output)
    matrix = grad_output.new_zeros(geometry.out_channels, *geometry.kernel_size, batch, *geometry.input_size)
    for u, k, i in _meetings(geometry):
        for f in range(geometry.out_channels):
            for b in range(batch):
                row, column, source = (f, *k), (b, *i), (b, f, *u)
                matrix[row + column] = grad_output[source]
    return matrix.reshape(geometry.out_channels * geometry.n_taps, batch * geometry.n_input)


def brute_force_weight_constraints(geometry: ConvGeometry, weight: Tensor) -> Tensor:
    """Return the dense weight-constraint matrix, from the definition: a loop over every pair of indices."""
    n_filters = geometry.out_channels // geometry.groups
    n_channels = geometry.in_channels // geometry.groups
    matrix = weight.new_zeros(geometry.out_channels, *geometry.out_size, geometry.in_channels, *geometry.input_size)
    for u, k, i in _meetings(geometry):
        for f in range(geometry.out_channels):
            for c in range(n_channels):
                row, column, source = (f, *u), (f // n_filters * n_channels + c, *i), (f, c, *k)
                matrix[row + column] = weight[source]
    return matrix.reshape(geometry.out_channels * geometry.n_output, geometry.in_channels * geometry.n_input)


def _meetings(geometry: ConvGeometry) -> list[tuple[Any, Any, Any]]:
    """All (u, k, i) with i = u*s + k*d - p inside the input."""
    met: list[tuple[Any, Any, Any]] = [((), (), ())]
    for axis in range(geometry.ndim):
        s, p, d = geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis]
        met = [
            ((*us, u), (*ks, k), (*is_, u * s + k * d - p))
            for us, ks, is_ in met
            for u in range(geometry.out_size[axis])
            for k in range(geometry.kernel_size[axis])
            if 0 <= u * s + k * d - p < geometry.input_size[axis]
        ]
    return met

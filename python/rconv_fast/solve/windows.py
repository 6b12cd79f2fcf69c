"""Values past the last window of a strided convolution: in no equation, and left out of the system.

With ``n`` outputs, stride s and a window of ``d (k - 1) + 1`` values, the last of them meets the value
``(n - 1) s + d (k - 1) - p``; what lies behind (at most s - 1 values on each axis) nothing depends on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rconv_fast.geometry import ConvGeometry, Size
from rconv_fast.solve.rows import GradientRows, System, WeightRows
from rconv_fast.solve.solution import Solution


def within_windows(system: System) -> System:
    """The equations of the values that windows meet; the system itself where that is all of them."""
    blocks = [block for block in system.blocks if isinstance(block, GradientRows | WeightRows)]
    if not blocks or len(blocks) < len(system.blocks):
        return system
    sizes = tuple(map(max, zip(*(_reach(block.geometry) for block in blocks), strict=True)))
    geometries = [replace(block.geometry, input_size=sizes) for block in blocks]
    same = all(g.out_size == block.geometry.out_size for g, block in zip(geometries, blocks, strict=True))
    if sizes == tuple(system.shape[2:]) or not same:
        return system
    kept = tuple(replace(block, geometry=g) for block, g in zip(blocks, geometries, strict=True))
    support = None if system.support is None else _cut(system.support, sizes)
    return System(torch.Size((*system.shape[:2], *sizes)), kept, support)


def _reach(geometry: ConvGeometry) -> Size:
    """Values up to the last that a window meets, on each axis."""
    g = geometry
    axes = zip(g.input_size, g.out_size, g.stride, g.dilation, g.kernel_size, g.padding, strict=True)
    return tuple(min(i, (n - 1) * s + d * (k - 1) + 1 - p) for i, n, s, d, k, p in axes)


def _cut(x: Tensor, sizes: Size) -> Tensor:
    for axis, size in enumerate(sizes):
        x = x.narrow(axis + 2, 0, size)
    return x


def widened(solution: Solution, system: System) -> Solution:
    """A solution of `within_windows(system)` as one of the system: all else is 0 and not determined."""
    if solution.x.shape == system.shape:
        return solution
    evidence = replace(solution.evidence, unknowns=system.unknowns)
    x, determined = (with_zeros_behind(value, system.shape) for value in (solution.x, solution.determined))
    return Solution(x, determined, evidence)


def with_zeros_behind(x: Tensor, shape: torch.Size) -> Tensor:
    """Values of `within_windows(system)` among those of the system, or in another shape of as many."""
    if x.numel() == shape.numel():
        return x.reshape(shape)
    missing = [n - m for n, m in zip(shape[2:], x.shape[2:], strict=True)]
    return pad(x, [size for n in reversed(missing) for size in (0, n)])

"""Equations of one layer, counted: a convolution's by stride phase and by what is read, a head's by its classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rconv_fast.geometry import ConvGeometry


class PhaseRank(NamedTuple):
    """Gradient constraints and unknowns of one stride phase, for one channel of the input."""

    rows: int
    unknowns: int


# Of a tensor with one or more spatial axes: the positions on each of them.
Places = tuple[frozenset[int], ...]


def union(places: Sequence[Places]) -> Places:
    """The smallest box grid that holds all."""
    return tuple(frozenset().union(*axis) for axis in zip(*places, strict=True))


@dataclass(frozen=True)
class Tally:
    """The gradient constraints of one convolution: counts for all channels together, phases for one."""

    gradients: int
    phases: tuple[PhaseRank, ...]
    rank: int
    reached: int
    read: Places
    most: int


def tally(
    geometry: ConvGeometry,
    batch: int,
    filters: int,
    live: Places | None = None,
    averaged: tuple[int, ...] | None = None,
) -> Tally:
    """Count rows, rank bound and positions read, where `filters` and the outputs at `live` (all) have a gradient.

    An average of size `averaged` behind gives all outputs of a window one gradient: what is seen of x is its sums over
    windows, which cover the positions ``v t s + k d - p``, t the average's stride, and nothing else.
    """
    of_group = max(filters // geometry.groups, 1)
    outputs = live or tuple(frozenset(range(size)) for size in geometry.out_size)
    distinct = math.inf if averaged is None else math.prod(averaged)
    phases, rank, reached = [], 0, 0
    read: list[set[int]] = [set() for _ in outputs]
    for phase in geometry.phases:
        met = [_met(geometry, axis, taps, outputs[axis]) for axis, taps in enumerate(phase.taps)]
        counts = [min(math.prod(map(len, choice)), distinct) for choice in itertools.product(*met)]
        touched = batch * math.prod(len(frozenset().union(*taps)) for taps in met)
        phases.append(PhaseRank(of_group * phase.n_taps, batch * phase.n_positions))
        rank += int(min(touched, sum(min(of_group, batch * count) for count in counts)))
        reached += touched
        if touched:
            for axis, taps in enumerate(met):
                read[axis].update(*taps)
    channels = geometry.in_channels
    return Tally(
        geometry.out_channels // geometry.groups * geometry.n_taps * channels,
        tuple(phases),
        channels * rank,
        channels * reached,
        tuple(map(frozenset, read)),
        channels * batch * _window_sums(geometry, averaged),
    )


def _window_sums(geometry: ConvGeometry, averaged: tuple[int, ...] | None) -> int:
    """How many sums over the average's windows the kernel's offsets meet; without an average, how many values."""
    if averaged is None:
        return geometry.n_input
    total = 1
    for axis, windows in enumerate(averaged):
        step = geometry.out_size[axis] // windows * geometry.stride[axis]
        offsets = range(0, geometry.kernel_size[axis] * geometry.dilation[axis], geometry.dilation[axis])
        total *= len({v * step + offset for v in range(windows) for offset in offsets})
    return total


def _met(geometry: ConvGeometry, axis: int, taps: Sequence[int], outputs: frozenset[int]) -> list[set[int]]:
    """For each offset k of a phase, the input positions ``u s + k d - p`` that it meets from the given outputs u."""
    s, d, p = geometry.stride[axis], geometry.dilation[axis], geometry.padding[axis]
    size = geometry.input_size[axis]
    return [{i for u in outputs if 0 <= (i := u * s + tap * d - p) < size} for tap in taps]


class HeadCapacity(NamedTuple):
    """The largest batch whose every sample follows from the last layer's gradient alone, and the largest at all."""

    certain: int
    most: int


def head_capacity(loss: str, classes: int, has_bias: bool) -> HeadCapacity:
    """How large a batch the last layer's gradient can be taken apart into.

    Cross-entropy, n classes (one fewer without a bias): a sample has ``n - 2B + 1`` more equations than unknowns, so
    that it is found and proven by itself up to ``B <= n / 2``; up to ``B <= n - 1`` the batch is proven as a whole,
    once a search has found all of it, which depends on the batch.
    """
    if loss not in ("cross_entropy", "nll"):
        return HeadCapacity(1, 1)
    n = classes if has_bias else classes - 1
    return HeadCapacity(max(1, n // 2), max(1, n - 1))

"""Normal matrices of the gradient constraints, stride phase by stride phase.

The rows with offset ``k`` touch the input positions ``i = r (mod s)`` of one phase only (method, section 3),
so ``B^T B`` is block diagonal, one block a phase, the same for every channel of a group:

    ``G[(b,i),(b',i')] = sum_k H[(b,u(i,k)),(b',u(i',k))]``,  ``u(i,k) = (i + p - k d) / s``,
    ``H[(b,u),(b',u')]  = sum_f g[b,f,u] g[b',f,u']``.

H is one matrix product; G is a sum of shifted windows of H. That is a factor n_k (offsets a phase) fewer
operations than forming the rows and multiplying them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry, Phase

Window = tuple[slice, ...]


@dataclass(frozen=True)
class TapWindow:
    """One kernel offset of a phase: its row-major index, the phase's positions it meets, at which outputs."""

    tap: int
    positions: Window
    outputs: Window


def tap_windows(geometry: ConvGeometry, phase: Phase) -> list[TapWindow]:
    """The offsets of a phase that meet an output at all, in row-major order.

    On one axis position ``j`` of the phase is ``i = r + s j``; it meets k at ``u = j + (r + p - k d)/s``.
    """
    found = [TapWindow(0, (), ())]
    for axis, (taps, positions) in enumerate(zip(phase.taps, phase.positions, strict=True)):
        windows = []
        for k in taps:
            shift = (positions.start + geometry.padding[axis] - k * geometry.dilation[axis]) // geometry.stride[axis]
            first, last = max(0, -shift), min(len(positions), geometry.out_size[axis] - shift)
            if first < last:
                windows.append((k, slice(first, last), slice(first + shift, last + shift)))
        size = geometry.kernel_size[axis]
        found = [TapWindow(w.tap * size + k, (*w.positions, i), (*w.outputs, u)) for w in found for k, i, u in windows]
    return found


@lru_cache(maxsize=256)
def phase_places(geometry: ConvGeometry, phases: tuple[Phase, ...], device: torch.device) -> Tensor:
    """Flat input positions of phases with equally many, (phases, n_positions)."""
    places = torch.arange(geometry.n_input, device=device).view(geometry.input_size)
    windows = [tuple(slice(p.start, p.stop, p.step) for p in phase.positions) for phase in phases]
    return torch.stack([places[window].flatten() for window in windows])


def group_filters(geometry: ConvGeometry, grad_output: Tensor, group: int) -> Tensor:
    r"""The output gradients of one group's filters, (B, F/groups, \*out)."""
    n = geometry.out_channels // geometry.groups
    return grad_output[:, group * n : (group + 1) * n]


def output_gram(grad_output: Tensor) -> Tensor:
    r"""``H`` (B, \*out, B, \*out) of the filters of one group, grad_output (B, F/groups, \*out)."""
    rows = grad_output.transpose(0, 1).flatten(1)
    h = rows.mT @ rows
    size = (len(grad_output), *grad_output.shape[2:])
    return h.reshape(*size, *size)


def phase_gram(geometry: ConvGeometry, phase: Phase, h: Tensor) -> Tensor:
    """``G`` (B*n_positions, B*n_positions) of one phase."""
    size = (len(h), *(len(p) for p in phase.positions))
    gram = h.new_zeros(*size, *size)
    everything: Window = (slice(None),)
    for window in tap_windows(geometry, phase):
        i, u = everything + window.positions, everything + window.outputs
        gram[i + i].add_(h[u + u])
    n = math.prod(size)
    return gram.reshape(n, n)


def input_gram(geometry: ConvGeometry, grad_output: Tensor, group: int) -> Tensor:
    """``G`` (B*n_input, B*n_input) of one group, from those of its phases."""
    h = output_gram(group_filters(geometry, grad_output, group))
    batch, n = len(h), geometry.n_input
    gram = h.new_zeros(batch, n, batch, n)
    for phase in geometry.phases:
        (place,) = phase_places(geometry, (phase,), h.device)
        rows = h.new_zeros(batch, len(place), batch, n)
        rows[..., place] = phase_gram(geometry, phase, h).view(batch, len(place), batch, -1)
        gram[:, place] = rows
    return gram.view(batch * n, batch * n)


def phase_rows(geometry: ConvGeometry, phase: Phase, grad_output: Tensor) -> Tensor:
    """The rows themselves, dense: (F/groups * offsets of `tap_windows`, B*n_positions)."""
    batch, filters = grad_output.shape[:2]
    size = tuple(len(p) for p in phase.positions)
    windows = tap_windows(geometry, phase)
    everything = (slice(None), slice(None))
    rows = grad_output.new_zeros(filters, len(windows), batch, *size)
    for t, window in enumerate(windows):
        outputs = grad_output[everything + window.outputs]
        rows[:, t][everything + window.positions] = outputs.transpose(0, 1)
    return rows.reshape(filters * len(windows), batch * math.prod(size))


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one or more matrices."""
    return functools.reduce(torch.add, parts)


# Four steps with a block of four vectors find the extreme eigenvalues to well within a factor of two, which
# is all that a decision between solvers needs.
POWER_STEPS, POWER_VECTORS = 4, 4


def gram_condition(gram: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Condition number of the rows, ``sqrt(lambda_max / lambda_min)`` of their Gram matrix, by powers.

    Parameters
    ----------
    gram : Tensor, shape (..., n, n)
        One or several.
    solve : callable
        Applies their inverses to columns.

    Returns
    -------
    Tensor, shape (...)
        The condition numbers.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[-1], POWER_VECTORS, generator=generator, dtype=torch.float64)
    largest = smallest = start.to(gram).expand(*gram.shape[:-1], POWER_VECTORS)
    for _ in range(POWER_STEPS):
        largest = gram @ (largest / largest.norm(dim=-2, keepdim=True))
        smallest = solve(smallest / smallest.norm(dim=-2, keepdim=True))
    squared: Tensor = largest.norm(dim=-2).amax(-1) * smallest.norm(dim=-2).amax(-1)
    return squared.sqrt()

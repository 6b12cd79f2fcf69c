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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


def phase_index(phase: Phase) -> Window:
    """Index of the phase's positions in an unknown (B, C, *in)."""
    return (slice(None), slice(None), *(slice(p.start, p.stop, p.step) for p in phase.positions))


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
    places = torch.arange(n, device=h.device).view(geometry.input_size)
    gram = h.new_zeros(batch, n, batch, n)
    for phase in geometry.phases:
        place = places[phase_index(phase)[2:]].flatten()
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


def gather_phase(x: Tensor, phase: Phase) -> Tensor:
    r"""The unknowns of a phase as a matrix: (B, C, \*in) -> (B*n_positions, C)."""
    part = x[phase_index(phase)]
    return part.movedim(1, -1).reshape(-1, x.shape[1])


def scatter_phase(x: Tensor, phase: Phase, values: Tensor) -> None:
    """Write `values` (B*n_positions, C) back to the phase's positions of ``x (B, C, *in)``."""
    part = x[phase_index(phase)]
    part.copy_(values.reshape(len(x), *part.shape[2:], x.shape[1]).movedim(-1, 1))


# On a GPU a float64 phase of up to this many unknowns is inverted: a product is one step, a triangular solve takes the
# rows one after the other. All uses correct what the inverse's rounding leaves, as they do for the factor's.
MAX_INVERTED = {"cpu": 0, "cuda": 4096}


@dataclass(frozen=True)
class PhaseFactor:
    """``(G + shift)^-1`` of one phase of one group; matrix: the Cholesky factor, or the inverse itself."""

    phase: Phase
    channels: slice
    matrix: Tensor
    inverted: bool

    @classmethod
    def create(cls, phase: Phase, channels: slice, cholesky: Tensor) -> PhaseFactor:
        """From the lower Cholesky factor of ``G + shift``."""
        inverted = cholesky.dtype == torch.float64 and len(cholesky) <= MAX_INVERTED.get(cholesky.device.type, 0)
        return cls(phase, channels, torch.cholesky_inverse(cholesky) if inverted else cholesky, inverted)

    def solve(self, v: Tensor) -> Tensor:
        """``(G + shift)^-1 v``, v (B*n_positions, C/groups)."""
        return self.matrix @ v if self.inverted else torch.cholesky_solve(v, self.matrix)


@dataclass(frozen=True)
class GramFactor:
    """``(B^T B + shift)^-1`` for all phases, groups, channels; ``failed``: phases that are not definite."""

    factors: tuple[PhaseFactor, ...]
    failed: tuple[Phase, ...]

    @classmethod
    def create(
        cls,
        blocks: Sequence[tuple[ConvGeometry, Tensor]],
        shift: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> GramFactor:
        r"""Factor the sum of the blocks' Gram matrices, phase by phase.

        Parameters
        ----------
        blocks : sequence of (ConvGeometry, Tensor)
            Geometry and output gradients; all of one stride and number of groups, so that their phases agree.
        shift : Tensor, optional
            Added to the diagonal; broadcasts to (B, C, \*in) and is averaged over a group's channels.
        dtype : torch.dtype, optional
            Of the factors.
        """
        geometry = blocks[0][0]
        factors, failed = [], []
        per_group = geometry.in_channels // geometry.groups
        for group in range(geometry.groups):
            channels = slice(group * per_group, (group + 1) * per_group)
            grams = [output_gram(group_filters(g, grad_output, group)) for g, grad_output in blocks]
            for index, phase in enumerate(geometry.phases):
                gram = sum_of(phase_gram(g, g.phases[index], h) for (g, _), h in zip(blocks, grams, strict=True))
                if shift is not None:
                    gram.diagonal().add_(gather_phase(shift[:, channels], phase).mean(dim=1))
                factor, info = torch.linalg.cholesky_ex(gram if dtype is None else gram.to(dtype))
                if int(info) != 0:  # synchronize!
                    failed.append(phase)
                else:
                    factors.append(PhaseFactor.create(phase, channels, factor))
        return cls(tuple(factors), tuple(failed))

    def solve(self, v: Tensor) -> Tensor:
        """Apply the inverse to ``v (B, C, *in)``; phases that failed get 0."""
        x = torch.zeros_like(v)
        for factor in self.factors:
            part = gather_phase(v[:, factor.channels], factor.phase)
            solved = factor.solve(part.to(factor.matrix.dtype))
            scatter_phase(x[:, factor.channels], factor.phase, solved.to(v.dtype))
        return x


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one or more matrices."""
    return functools.reduce(torch.add, parts)


# Four steps with a block of four vectors find the extreme eigenvalues to well within a factor of two, which
# is all that a decision between solvers needs.
POWER_STEPS, POWER_VECTORS = 4, 4


def gram_condition(gram: Tensor, solve: Callable[[Tensor], Tensor]) -> float:
    """Condition number of the rows, ``sqrt(lambda_max / lambda_min)`` of their Gram matrix, by powers.

    `solve` applies the inverse to columns.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), POWER_VECTORS, generator=generator, dtype=torch.float64).to(gram)
    largest, smallest = start, start
    for _ in range(POWER_STEPS):
        largest = gram @ (largest / largest.norm(dim=0))
        smallest = solve(smallest / smallest.norm(dim=0))
    return math.sqrt(float(largest.norm(dim=0).max() * smallest.norm(dim=0).max()))

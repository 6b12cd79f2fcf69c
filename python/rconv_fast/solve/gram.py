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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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


# Bytes of the Gram matrices that are factored in one call: small ones share its overhead, large ones memory only.
STACK_BYTES = 1 << 27


@dataclass(frozen=True)
class PhaseStack:
    """Stride phases of as many positions each, for the channels of one group.

    Attributes
    ----------
    phases : tuple of Phase
        The m phases.
    group : int
        The group.
    channels : slice
        Its input channels.
    places : Tensor, shape (m, n_positions)
        Flat input positions of each.
    """

    phases: tuple[Phase, ...]
    group: int
    channels: slice
    places: Tensor

    @classmethod
    def create(cls, geometry: ConvGeometry, phases: Sequence[Phase], group: int, device: torch.device) -> PhaseStack:
        """From phases with equally many positions."""
        every = torch.arange(geometry.n_input, device=device).view(geometry.input_size)
        places = torch.stack([every[phase_index(phase)[2:]].flatten() for phase in phases])
        per_group = geometry.in_channels // geometry.groups
        return cls(tuple(phases), group, slice(group * per_group, (group + 1) * per_group), places)

    def only(self, kept: Sequence[bool]) -> PhaseStack:
        """Some of the phases."""
        index = [i for i, keep in enumerate(kept) if keep]
        return replace(self, phases=tuple(self.phases[i] for i in index), places=self.places[index])

    def gather(self, x: Tensor) -> Tensor:
        r"""The phases' unknowns as matrices: (B, C, \*in) -> (m, B*n_positions, C/groups)."""
        part = x.flatten(2)[:, self.channels, self.places]  # (B, C/groups, m, n_positions)
        return part.permute(2, 0, 3, 1).flatten(1, 2)

    def scatter(self, x: Tensor, values: Tensor) -> None:
        """Write `values` (m, B*n_positions, C/groups) back to the phases' positions of ``x (B, C, *in)``."""
        part = values.unflatten(1, (len(x), -1)).permute(1, 3, 0, 2)
        x.view(*x.shape[:2], -1)[:, self.channels, self.places] = part


def phase_stacks(
    geometry: ConvGeometry, phases: Iterable[Phase], group: int, grad_output: Tensor
) -> Iterator[PhaseStack]:
    """Sort phases by their size; the Gram matrices of a stack fit into `STACK_BYTES`, if there are several."""
    by_size: dict[int, list[Phase]] = {}
    for phase in phases:
        by_size.setdefault(phase.n_positions, []).append(phase)
    for n_positions, equal in by_size.items():
        each = (len(grad_output) * n_positions) ** 2 * grad_output.element_size()
        together = max(1, STACK_BYTES // max(1, each))
        for first in range(0, len(equal), together):
            yield PhaseStack.create(geometry, equal[first : first + together], group, grad_output.device)


# On a GPU float64 phases of up to this many unknowns are inverted: a product is one step, a triangular solve takes the
# rows one after the other. All uses correct what the inverse's rounding leaves, as they do for the factor's.
MAX_INVERTED = {"cpu": 0, "cuda": 4096}


@dataclass(frozen=True)
class PhaseFactor:
    """``(G + shift)^-1`` of a stack's phases; matrix (m, n, n): the Cholesky factors, or the inverses themselves."""

    stack: PhaseStack
    matrix: Tensor
    inverted: bool

    @classmethod
    def create(cls, stack: PhaseStack, cholesky: Tensor) -> PhaseFactor:
        """From the lower Cholesky factors of ``G + shift``."""
        small = cholesky.shape[-1] <= MAX_INVERTED.get(cholesky.device.type, 0)
        inverted = small and cholesky.dtype == torch.float64
        return cls(stack, torch.cholesky_inverse(cholesky) if inverted else cholesky, inverted)

    def only(self, kept: Sequence[bool]) -> PhaseFactor:
        """That of some of the phases."""
        if all(kept):
            return self
        return replace(self, stack=self.stack.only(kept), matrix=self.matrix[[i for i, k in enumerate(kept) if k]])

    def solve(self, v: Tensor) -> Tensor:
        """``(G + shift)^-1 v``, v (m, B*n_positions, columns)."""
        return self.matrix @ v if self.inverted else torch.cholesky_solve(v, self.matrix)


@dataclass(frozen=True)
class GramFactor:
    """``(B^T B + shift)^-1`` for all phases, groups, channels; phases of which there is no factor get 0."""

    factors: tuple[PhaseFactor, ...]

    @classmethod
    def create(
        cls,
        blocks: Sequence[tuple[ConvGeometry, Tensor]],
        shift: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> GramFactor | None:
        r"""Factor the sum of the blocks' Gram matrices, phase by phase; None where one is not positive definite.

        Parameters
        ----------
        blocks : sequence of (ConvGeometry, Tensor)
            Geometry and output gradients; all of one stride and number of groups, so that their phases agree.
        shift : Tensor, optional
            Added to the diagonal; broadcasts to (B, C, \*in) and is averaged over a group's channels.
        dtype : torch.dtype, optional
            Of the factors.
        """
        geometry, main = blocks[0]
        factors = []
        for group in range(geometry.groups):
            hs = [output_gram(group_filters(g, grad_output, group)) for g, grad_output in blocks]
            for stack in phase_stacks(geometry, geometry.phases, group, main):
                indices = [geometry.phases.index(phase) for phase in stack.phases]
                gram = sum_of(
                    torch.stack([phase_gram(g, g.phases[index], h) for index in indices])
                    for (g, _), h in zip(blocks, hs, strict=True)
                )
                if shift is not None:
                    gram.diagonal(dim1=1, dim2=2).add_(stack.gather(shift).mean(dim=2))
                factor, info = torch.linalg.cholesky_ex(gram if dtype is None else gram.to(dtype))
                if bool(info.any()):  # synchronize!
                    return None
                factors.append(PhaseFactor.create(stack, factor))
        return cls(tuple(factors))

    def solve(self, v: Tensor) -> Tensor:
        """Apply the inverse to ``v (B, C, *in)``."""
        x = v.new_zeros(v.shape)
        for factor in self.factors:
            solved = factor.solve(factor.stack.gather(v).to(factor.matrix.dtype))
            factor.stack.scatter(x, solved.to(v.dtype))
        return x


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

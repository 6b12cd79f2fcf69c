"""Factors of the stride phases' normal matrices, phases of one size together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry, Phase
from rconv_fast.solve.phases.gram import group_filters, output_gram, phase_gram, phase_places, sum_of

# Bytes of the Gram matrices that are factored in one call: small ones share its overhead, large ones memory only.
STACK_BYTES = 1 << 27


@dataclass(frozen=True)
class PhaseStack:
    """Stride phases of as many positions each, for the channels of one group.

    Attributes
    ----------
    phases : tuple of Phase
        The m phases.
    channels : slice
        The group's input channels.
    places : Tensor, shape (m, n_positions)
        Flat input positions of each.
    """

    phases: tuple[Phase, ...]
    channels: slice
    places: Tensor

    @classmethod
    def create(cls, geometry: ConvGeometry, phases: Sequence[Phase], group: int, device: torch.device) -> PhaseStack:
        """From phases with equally many positions."""
        per_group = geometry.in_channels // geometry.groups
        channels = slice(group * per_group, (group + 1) * per_group)
        return cls(tuple(phases), channels, phase_places(geometry, tuple(phases), device))

    def only(self, kept: Sequence[bool]) -> PhaseStack:
        """Some of the phases."""
        index = [i for i, keep in enumerate(kept) if keep]
        return replace(self, phases=tuple(self.phases[i] for i in index), places=self.places[index])

    def gather(self, x: Tensor) -> Tensor:
        r"""The phases' unknowns as matrices: (B, C, \*in) -> (m, B*n_positions, C/groups)."""
        part = x.flatten(2)[:, self.channels]
        part = part.gather(2, self.places.flatten().expand(*part.shape[:2], -1))  # ten times faster than index_select
        return part.view(*part.shape[:2], *self.places.shape).permute(2, 0, 3, 1).flatten(1, 2)

    def scatter(self, x: Tensor, values: Tensor) -> None:
        """Write `values` (m, B*n_positions, C/groups) back to the phases' positions of ``x (B, C, *in)``."""
        part = values.unflatten(1, (len(x), -1)).permute(1, 3, 0, 2).flatten(2)
        x.view(*x.shape[:2], -1)[:, self.channels].scatter_(2, self.places.flatten().expand_as(part), part)


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


# Float64 phases of up to this many unknowns are inverted: a product takes half as long as two triangular solves, and on
# a GPU is one step where they take the rows one after the other. All uses correct what the inverse's rounding leaves,
# as they do for the factor's. The inverse takes as long as a dozen solves: on a CPU it is for those who iterate.
MAX_INVERTED, MAX_INVERTED_FOR_ONE_SOLVE = {"cpu": 1024, "cuda": 4096}, {"cpu": 0, "cuda": 4096}


@dataclass(frozen=True)
class PhaseFactor:
    """``(G + shift)^-1`` of a stack's phases; matrix (m, n, n): the Cholesky factors, or the inverses themselves."""

    stack: PhaseStack
    matrix: Tensor
    inverted: bool

    @classmethod
    def create(cls, stack: PhaseStack, cholesky: Tensor, *, iterated: bool = False) -> PhaseFactor:
        """From the lower Cholesky factors of ``G + shift``; whether more than a few solves will be `iterated`."""
        largest = MAX_INVERTED if iterated else MAX_INVERTED_FOR_ONE_SOLVE
        small = cholesky.shape[-1] <= largest.get(cholesky.device.type, 0)
        inverted = small and cholesky.dtype == torch.float64
        return cls(stack, torch.cholesky_inverse(cholesky) if inverted else cholesky, inverted)

    def only(self, kept: Sequence[bool]) -> PhaseFactor:
        """That of some of the phases."""
        if all(kept):
            return self
        return replace(self, stack=self.stack.only(kept), matrix=self.matrix[[i for i, k in enumerate(kept) if k]])

    def solve(self, v: Tensor) -> Tensor:
        """``(G + shift)^-1 v``, v (m, B*n_positions, columns)."""
        if not self.inverted:
            return torch.cholesky_solve(v, self.matrix)
        return (v.mT.contiguous() @ self.matrix).mT  # few long rows: up to ten times faster than few long columns


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
                factors.append(PhaseFactor.create(stack, factor, iterated=True))
        return cls(tuple(factors))

    def solve(self, v: Tensor) -> Tensor:
        """Apply the inverse to ``v (B, C, *in)``."""
        x = v.new_zeros(v.shape)
        for factor in self.factors:
            solved = factor.solve(factor.stack.gather(v).to(factor.matrix.dtype))
            factor.stack.scatter(x, solved.to(v.dtype))
        return x

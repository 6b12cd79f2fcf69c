"""Small systems of one convolution, and what the singular value decomposition says of them."""

from __future__ import annotations

import torch
from torch import Tensor

from layers import random_grad_output, random_input, random_weight
from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import (
    GradientRows,
    Rows,
    System,
    WeightRows,
)

DOUBLE = {"dtype": torch.float64}
RTOL = 1e-13
# Singular values of the random systems are either above 1e-6 or rounding of the largest.
RANK_TOLERANCE = 1e-9


class Case:
    """An input x, and the equations that one convolution's gradients and outputs are for it."""

    def __init__(self, geometry: ConvGeometry, batch: int = 1, live: float = 1.0) -> None:
        self.geometry = geometry
        self.x = random_input(geometry, batch, **DOUBLE)
        self.weight = random_weight(geometry, **DOUBLE)
        self.g = random_grad_output(geometry, batch, **DOUBLE)
        self.g = self.g * (torch.rand_like(self.g) < live)
        self.known = torch.rand_like(self.g) < live

    @property
    def gradient(self) -> GradientRows:
        return GradientRows.create(self.geometry, apply_gradient(self.geometry, self.x, self.g), self.g)

    @property
    def outputs(self) -> WeightRows:
        output = apply_weight(self.geometry, self.x, self.weight)
        nan = torch.where(self.known, output, torch.nan)  # values that are not known must not be read
        return WeightRows.create(self.geometry, self.weight, nan, self.known.double())

    def system(self, *blocks: Rows) -> System:
        return System(self.x.shape, blocks or (self.gradient, self.outputs))


def half_blind(case: Case) -> Case:
    """Nothing is known of the right half of the outputs, and they pass no gradient."""
    half = case.g.shape[-1] // 2
    case.g[..., half:] = 0
    case.known[..., half:] = False
    return case


def dense(system: System) -> tuple[Tensor, Tensor]:
    """The matrix of a system, column by column, and its right-hand side."""
    units = torch.eye(system.shape.numel(), dtype=torch.float64).reshape(-1, *system.shape)
    columns = [torch.cat([part.reshape(-1) for part in system.apply(unit)]) for unit in units]
    return torch.stack(columns, dim=1), torch.cat([part.reshape(-1) for part in system.rhs])


class Reference:
    """What the singular value decomposition says of a dense system."""

    def __init__(self, matrix: Tensor, rhs: Tensor) -> None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
        self.rank = int((s > RANK_TOLERANCE * s[0]).sum())
        kept = s[: self.rank]
        self.condition = float(kept[0] / kept[-1]) if self.rank else 1.0
        self.x = vh[: self.rank].mT @ ((u[:, : self.rank].mT @ rhs) / kept)
        self.determined = vh[self.rank :].abs().amax(0) < 1e-6 if self.rank < len(vh) else self.x == self.x


def reference(system: System) -> Reference:
    return Reference(*dense(system))


def assert_same_answer(solution, case: Case, expected: Reference, tolerance: float = 1e-11) -> None:
    shape = case.x.shape
    assert torch.equal(solution.determined, expected.determined.reshape(shape))
    error = (solution.x.reshape(-1) - expected.x).abs().max()
    assert error <= tolerance * expected.condition * expected.x.abs().max()
    fixed = solution.determined
    assert (solution.x - case.x)[fixed].abs().sum() <= tolerance * expected.condition * case.x.numel()

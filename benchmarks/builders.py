"""Constraint matrices to build: layers with their sources of values, and our builders of them.

Sizes are (filters, input side, kernel, stride, padding) of square layers, one sample; channels first for weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.constraints import ops
from rconv_fast.constraints.backends import backend_for
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.geometry import ConvGeometry

SIZES = [
    (12, 16, 5, 1, 2),
    (128, 8, 3, 1, 1),
    (64, 56, 3, 1, 1),
    (64, 112, 7, 2, 3),
    (256, 28, 3, 1, 1),
    (512, 14, 3, 1, 1),
]
WEIGHT_SIZES = [(3, 64, 56, 3, 1, 1), (3, 32, 112, 7, 2, 3), (64, 64, 14, 3, 1, 1)]  # channels first


@dataclass
class Case:
    """A layer with its source of values, buffers as large as its matrix for the copies, and outputs to keep."""

    source: Tensor
    side: int
    kernel: int
    stride: int
    padding: int
    buffers: tuple[Tensor, Tensor]
    mask: Tensor | None = None

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1


def gradient_case(size: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64) -> Case:
    filters, side, kernel, stride, padding = size
    out_side = (side + 2 * padding - kernel) // stride + 1
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(1, filters, out_side, out_side, dtype=torch.float64, generator=generator)
    case = Case(grad_output.to(device, dtype), side, kernel, stride, padding, (torch.empty(0), torch.empty(0)))
    return with_buffers(case, ours_gradient(case))


def weight_case(size: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64) -> Case:
    channels, filters, side, kernel, stride, padding = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(filters, channels, kernel, kernel, dtype=torch.float64, generator=generator)
    case = Case(weight.to(device, dtype), side, kernel, stride, padding, (torch.empty(0), torch.empty(0)))
    return with_buffers(case, ours_weight(case))


def with_buffers(case: Case, matrix: Tensor) -> Case:
    buffer = torch.zeros(csr_bytes(matrix), dtype=torch.uint8, device=matrix.device)
    case.buffers = (buffer, torch.zeros_like(buffer))
    return case


def geometry_of(case: Case, channels: int, filters: int) -> ConvGeometry:
    sizes = (case.side, case.side), (case.kernel, case.kernel), case.stride, case.padding
    return ConvGeometry.create("benchmark", channels, filters, *sizes)


def gradient_layout(case: Case) -> ConstraintLayout:
    return ConstraintLayout.of_gradient(geometry_of(case, 1, case.source.shape[1]), 1)


def csr_bytes(matrix: Tensor) -> int:
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    return sum(part.numel() * part.element_size() for part in parts)


# --- Ours ------------------------------------------------------------------------------------------------


def ours_gradient(case: Case) -> Tensor:
    sizes = {"stride": case.stride, "padding": case.padding}
    return ops.gradient_constraints(case.source, (case.side, case.side), case.kernel, **sizes)


def ours_gradient_nonzeros(case: Case) -> Tensor:
    sizes = {"stride": case.stride, "padding": case.padding}
    size = (case.side, case.side)
    return ops.gradient_constraints(case.source, size, case.kernel, drop_zeros=True, **sizes)


def ours_weight(case: Case) -> Tensor:
    sizes = {"stride": case.stride, "padding": case.padding}
    return ops.weight_constraints(case.source, (case.side, case.side), mask=case.mask, **sizes)


# --- In parts: what a loop over steps of one layer pays --------------------------------------------------


@dataclass
class Parts:
    """A case whose pattern is there already."""

    case: Case
    numbers: tuple[int, ...]
    crow: Tensor
    nnz: int


def parts_of(setup: Callable[[], Case]) -> Parts:
    case = setup()
    matrix = ours_gradient(case)
    return Parts(case, gradient_layout(case).numbers, matrix.crow_indices(), matrix.values().numel())


def values_alone(parts: Parts) -> Tensor:
    return torch.ops.rconv_fast.values(parts.case.source, parts.crow, parts.nnz, parts.numbers)


def pattern_alone(parts: Parts) -> tuple[Tensor, Tensor]:
    return torch.ops.rconv_fast.pattern(parts.numbers, parts.case.source.device)


def sum_values(parts: Parts) -> Tensor:
    return torch.ops.rconv_fast.sum_values(values_alone(parts), parts.crow, parts.numbers)


def half_dead(setup: Callable[[], Case]) -> Case:
    """Put the gradient behind a ReLU: half of it is 0."""
    case = setup()
    case.source = case.source.relu()
    return case


# --- Masks and wide indices ------------------------------------------------------------------------------


def half_known(case: Case) -> Case:
    """Put the outputs behind a ReLU: about half of them are known."""
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(len(case.source), case.out_side, case.out_side, generator=generator) < 0.5
    case.mask = known.to(case.source.device)
    return case


@dataclass(kw_only=True)
class WideCase(Case):
    """A case whose matrix gets int64 indices, which the public functions choose for larger ones only."""

    layout: ConstraintLayout


def widened(case: Case, layout_of: Callable[[Case], ConstraintLayout]) -> WideCase:
    layout = layout_of(case)
    object.__setattr__(layout, "index_dtype", torch.int64)
    return WideCase(**vars(case), layout=layout)


def weight_layout(case: Case) -> ConstraintLayout:
    return ConstraintLayout.of_weight(geometry_of(case, case.source.shape[1], len(case.source)))


def ours_wide(case: WideCase) -> Tensor:
    backend, layout = backend_for(case.source.device), case.layout
    crow = backend.offsets(layout, case.source.device)
    col = backend.columns(crow, layout.nnz, layout)
    values = backend.values(case.source, crow, layout.nnz, layout)
    return csr(crow, col, values, layout.n_cols)


def csr(crow: Tensor, col: Tensor, values: Tensor, n_cols: int) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, (len(crow) - 1, n_cols), check_invariants=False)

"""Building the constraint matrices: against a memory copy, numpy writing CSR by hand, scipy, torch.

Sizes are (filters, input side, kernel, stride, padding) of square layers, one sample, float64. All clocks
include the allocation of what is returned. The two copies move as many bytes as the matrix has (values,
columns, row offsets): "into fresh memory" allocates its destination as a builder must, "into warm memory"
does not. "fill of fresh pages" writes constants to two new arrays of the sizes of values and columns, in huge
pages and on all threads: what the system takes to hand out memory that is written from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from bench import Entry
from rconv_fast.constraints import ops
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


# --- Competitors -----------------------------------------------------------------------------------------


def copy_warm(case: Case) -> Tensor:
    return case.buffers[1].copy_(case.buffers[0])


def copy_fresh(case: Case) -> Tensor:
    return torch.empty_like(case.buffers[0]).copy_(case.buffers[0])


def fill_fresh(case: Case) -> list[Tensor]:
    """Ask numpy for huge pages and fill them on torch's threads, for values and for columns."""
    n = len(case.buffers[0]) // 12
    return [torch.from_numpy(np.empty(n, dtype)).fill_(1) for dtype in (np.float64, np.int32)]


def met(case: Case, k: int) -> range:
    """Return the outputs u with 0 <= u*s + k - p < side."""
    first = max(0, -((k - case.padding) // case.stride))
    last = min(case.out_side - 1, (case.side - 1 - k + case.padding) // case.stride)
    return range(first, last + 1)


def numpy_by_hand(case: Case) -> scipy.sparse.csr_array:
    """All filters at once for each kernel offset, written straight into the final arrays."""
    g = case.source[0].numpy()
    n_filters, s, p, ranges = len(g), case.stride, case.padding, [met(case, k) for k in range(case.kernel)]
    counts = np.array([len(y) * len(x) for y in ranges for x in ranges])
    starts = np.concatenate([[0], np.cumsum(counts)])
    values = np.empty((n_filters, starts[-1]))
    col = np.empty((n_filters, starts[-1]), dtype=np.int32)
    crow = np.empty(n_filters * len(counts) + 1, dtype=np.int32)
    crow[:-1] = (np.arange(n_filters)[:, None] * starts[-1] + starts[:-1]).ravel()
    crow[-1] = n_filters * starts[-1]
    for ky, y in enumerate(ranges):
        i = (np.arange(y.start, y.stop, dtype=np.int32) * s + ky - p) * case.side
        for kx, x in enumerate(ranges):
            t = ky * case.kernel + kx
            j = np.arange(x.start, x.stop, dtype=np.int32) * s + kx - p
            here = slice(starts[t], starts[t + 1])
            shape = (n_filters, len(y), len(x))
            values[:, here].reshape(shape)[...] = g[:, y.start : y.stop, x.start : x.stop]
            col[:, here] = (i[:, None] + j).ravel()
    parts = (values.ravel(), col.ravel(), crow)
    return scipy.sparse.csr_array(parts, shape=(len(crow) - 1, case.side**2), copy=False)


def scipy_coo(case: Case) -> scipy.sparse.csr_array:
    return coo_to_csr(np, scipy.sparse.coo_array, case.source[0].numpy(), case)


def coo_to_csr(xp: Any, coo: Any, g: Any, case: Case) -> Any:
    """Index arrays of all entries, then COO to CSR; `xp` is numpy or cupy, `coo` its sparse matrices' class."""
    n_filters, out_side, kernel = len(g), case.out_side, case.kernel
    axes = (n_filters, kernel, kernel, out_side, out_side)
    f, ky, kx, u, v = xp.ogrid[tuple(slice(n) for n in axes)]
    y, x = u * case.stride + ky - case.padding, v * case.stride + kx - case.padding
    inside = xp.broadcast_to((y >= 0) & (y < case.side) & (x >= 0) & (x < case.side), axes)
    row = xp.broadcast_to((f * kernel + ky) * kernel + kx, axes)[inside]
    col = xp.broadcast_to(y * case.side + x, axes)[inside]
    values = xp.broadcast_to(g[:, None, None], axes)[inside]
    shape = (n_filters * kernel**2, case.side**2)
    return coo((values, (row, col)), shape=shape).tocsr()


def torch_unfold_coo(case: Case) -> Tensor:
    """Unfold the input's indices, then torch's COO to CSR."""
    g = case.source[0]
    n_filters, n_taps = len(g), case.kernel**2
    index = torch.arange(1, case.side**2 + 1, dtype=torch.float64, device=g.device)
    index = index.reshape(1, 1, case.side, case.side)
    unfold = partial(torch.nn.functional.unfold, kernel_size=case.kernel, padding=case.padding)
    col = unfold(index, stride=case.stride)[0].long() - 1
    inside = (col >= 0).expand(n_filters, *col.shape)
    row = torch.arange(n_filters * n_taps, device=g.device).reshape(n_filters, n_taps, 1).expand_as(inside)[inside]
    values = g.reshape(n_filters, 1, -1).expand_as(inside)[inside]
    coordinates = torch.stack([row, col.expand_as(inside)[inside]])
    shape = (n_filters * n_taps, case.side**2)
    return torch.sparse_coo_tensor(coordinates, values, shape, check_invariants=False).to_sparse_csr()


def numpy_weight_by_hand(case: Case) -> scipy.sparse.csr_array:
    """All filters and channels at once for each output position, written straight into the final arrays."""
    w = case.source.numpy()
    n_filters, n_channels, kernel, _ = w.shape
    taps = []
    for u in range(case.out_side):
        first = u * case.stride - case.padding
        taps.append((first, max(0, -first), min(kernel, case.side - first)))
    n = np.array([end - begin for _, begin, end in taps])
    starts = np.concatenate([[0], np.cumsum(n_channels * np.outer(n, n).ravel())])
    values = np.empty((n_filters, starts[-1]))
    col = np.empty((n_filters, starts[-1]), dtype=np.int32)
    crow = np.empty(n_filters * (len(starts) - 1) + 1, dtype=np.int32)
    crow[:-1] = (np.arange(n_filters)[:, None] * starts[-1] + starts[:-1]).ravel()
    crow[-1] = n_filters * starts[-1]
    plane = np.arange(n_channels, dtype=np.int32)[:, None, None] * case.side**2
    for u, (y, y0, y1) in enumerate(taps):
        for v, (x, x0, x1) in enumerate(taps):
            t = u * case.out_side + v
            here = slice(starts[t], starts[t + 1])
            shape = (n_filters, n_channels, y1 - y0, x1 - x0)
            values[:, here].reshape(shape)[...] = w[:, :, y0:y1, x0:x1]
            i = np.arange(y + y0, y + y1, dtype=np.int32)[:, None] * case.side
            col[:, here] = (plane + i + np.arange(x + x0, x + x1, dtype=np.int32)).ravel()
    parts = (values.ravel(), col.ravel(), crow)
    return scipy.sparse.csr_array(parts, shape=(len(crow) - 1, n_channels * case.side**2), copy=False)


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


# --- Entries ---------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    copies = {"copy into fresh memory": copy_fresh, "copy into warm memory": copy_warm}
    by_others = copies | {
        "fill of fresh pages": fill_fresh,
        "numpy writing CSR by hand": numpy_by_hand,
        "scipy COO to CSR": scipy_coo,
        "torch unfold, COO to CSR": torch_unfold_coo,
    }
    found = []
    for size in SIZES:
        setup = partial(gradient_case, size, "cpu")
        where = f"cpu/{','.join(map(str, size))}"
        found += [
            Entry(f"gradient/{where}", setup, ours_gradient, by_others, csr_bytes, quick=size[1] <= 16),
            Entry(
                f"gradient-parts/{where}",
                partial(parts_of, setup),
                values_alone,
                {"the pattern alone": pattern_alone, "the values and their transpose": sum_values},
            ),
            Entry(
                f"gradient-relu/{where}",
                partial(half_dead, setup),
                ours_gradient_nonzeros,
                {"the full matrix": ours_gradient},
                csr_bytes,
            ),
        ]
    for size in WEIGHT_SIZES:
        setup = partial(weight_case, size, "cpu")
        name = f"weight/cpu/{','.join(map(str, size))}"
        by_hand = copies | {"numpy writing CSR by hand": numpy_weight_by_hand}
        found.append(Entry(name, setup, ours_weight, by_hand, csr_bytes))
    return found

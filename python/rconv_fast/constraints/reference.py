"""The constraint matrices in plain torch: the words of the definition, on any device.

Meant to be read and to check the kernels against, not to be fast: it lists every pair of row and entry, the
ones outside the input too. It stands in where the compiled module is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.constraints.layout import ConstraintLayout


def entries(layout: ConstraintLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and source index of every entry of the full matrix, in CSR order (int64)."""
    # Dimensions: filter, rows of each axis, plane, entries of each axis.
    n, shape = len(layout.axes), [layout.n_filters, *(a.n_rows for a in layout.axes), layout.n_planes]
    shape += [a.n_entries for a in layout.axes]

    def along(dimension: int) -> Tensor:
        return torch.arange(shape[dimension], device=device).view(-1, *[1] * (2 * n + 1 - dimension))

    filters, planes = along(0), along(n + 1)
    group = filters // (layout.n_filters // layout.n_groups)
    inside = torch.ones(shape, dtype=torch.bool, device=device)
    row, column = filters, group * layout.n_planes + planes
    source = torch.zeros_like(planes)
    for a, axis in enumerate(layout.axes):
        r, e = along(1 + a), along(n + 2 + a)
        i = r * axis.row_step + e * axis.entry_step - axis.padding
        inside &= (i >= 0) & (i < axis.size)
        row = row * axis.n_rows + r
        column = column * axis.size + i
        source = source * axis.n_entries + e
    source = source + filters * layout.filter_stride + planes * layout.plane_stride
    row, column, source = (index.expand(shape)[inside] for index in (row, column, source))
    return row, column, source


def _offsets(row: Tensor, layout: ConstraintLayout) -> Tensor:
    counts = torch.bincount(row, minlength=layout.n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def offsets(layout: ConstraintLayout, device: torch.device) -> Tensor:
    """First entry of each row when every row is kept, and the end."""
    row, _, _ = entries(layout, device)
    return _offsets(row, layout).to(layout.index_dtype)


def columns(start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor:
    """Columns of the `nnz` entries in the rows that `start` keeps."""
    row, column, _ = entries(layout, start.device)
    return column[start.diff().bool()[row]].to(start.dtype).reshape(nnz)


def values(source: Tensor, start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor:
    """Return the source element of each of the `nnz` entries in the rows that `start` keeps."""
    row, _, index = entries(layout, source.device)
    return source.reshape(-1)[index[start.diff().bool()[row]]].reshape(nnz)


def sum_values(values: Tensor, start: Tensor, layout: ConstraintLayout) -> Tensor:
    """Sum, for each source element, over the entries that read it: the transpose of ``values``."""
    row, _, index = entries(layout, values.device)
    return values.new_zeros(layout.n_source).index_add(0, index[start.diff().bool()[row]], values)


def nonzero_pattern(source: Tensor, layout: ConstraintLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Row offsets, columns and source indices of the entries whose source is not 0."""
    row, column, index = entries(layout, source.device)
    keep = source.reshape(-1)[index] != 0
    dtype = layout.index_dtype
    return _offsets(row[keep], layout).to(dtype), column[keep].to(dtype), index[keep].to(dtype)

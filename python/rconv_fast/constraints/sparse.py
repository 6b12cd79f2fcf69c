"""Sparse matrices as scipy's and cupy's, sharing the memory of torch's tensors.

What this package computes with itself never is a sparse CSR tensor: torch warns of those once a process.
"""

from __future__ import annotations

from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from rconv_fast.constraints.library import Components
from rconv_fast.constraints.streams import cupy_on_torch_stream
from rconv_fast.errors import require, require_type


def to_scipy(matrix: Tensor) -> scipy.sparse.csr_array:
    """Return a sparse CSR tensor on the CPU as ``scipy.sparse.csr_array``, without a copy.

    The two share memory: changing the one in place changes the other. Gradients do not flow through.
    """
    _require_csr(matrix, "to_scipy")
    require(matrix.device.type == "cpu", "to_scipy", "matrix", "be on the cpu", matrix.device)
    matrix = matrix.detach()
    return csr_array((matrix.values(), matrix.crow_indices(), matrix.col_indices()), matrix.shape[1])


def csr_array(components: Components, n_cols: int) -> scipy.sparse.csr_array:
    """``(values, crow, col)`` on the CPU as ``scipy.sparse.csr_array``, without a copy."""
    values, crow, col = (part.numpy() for part in components)
    result = scipy.sparse.csr_array((values, col, crow), shape=(len(crow) - 1, n_cols), copy=False)
    result.has_canonical_format = True  # columns are sorted and unique
    return result


def to_dense(components: Components, n_cols: int) -> Tensor:
    """``(values, crow, col)`` as a dense tensor on their device."""
    values, crow, col = components
    dense = values.new_zeros(len(crow) - 1, n_cols)
    rows = torch.arange(len(dense), device=crow.device).repeat_interleave(crow.diff(), output_size=len(col))
    dense[rows, col.long()] = values
    return dense


def to_cupy(matrix: Tensor) -> Any:
    """Return a sparse CSR tensor on the GPU as ``cupyx.scipy.sparse.csr_matrix``, without a copy.

    Built on torch's current stream. The two share memory. cupy reads two offsets back (one host
    synchronisation), so build it once a geometry and assign ``.data`` after that.
    """
    _require_csr(matrix, "to_cupy")
    require(matrix.device.type == "cuda", "to_cupy", "matrix", "be on a GPU", matrix.device)
    with cupy_on_torch_stream(matrix.device, "to_cupy") as cupy:
        from cupyx.scipy.sparse import csr_matrix

        matrix = matrix.detach()
        parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
        components = tuple(map(cupy.from_dlpack, parts))
        result = csr_matrix(components, shape=tuple(matrix.shape), copy=False)  # synchronize!
        result.has_canonical_format = True
        return result


def _require_csr(matrix: Tensor, function: str) -> None:
    require_type(isinstance(matrix, Tensor), function, "matrix", "be a torch tensor", type(matrix).__name__)
    require_type(matrix.layout == torch.sparse_csr, function, "matrix", "be sparse CSR", matrix.layout)

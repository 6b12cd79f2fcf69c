"""The matrices as scipy's and cupy's, over the same memory."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from layers import gradient_matrix, random_grad_output, random_weight, weight_matrix
from rconv_fast.constraints.sparse import to_cupy, to_scipy
from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.geometry import ConvGeometry


def test_scipy_shares_memory_and_agrees(geometry: ConvGeometry) -> None:
    matrix = gradient_matrix(geometry, random_grad_output(geometry).requires_grad_())
    theirs = to_scipy(matrix)
    assert isinstance(theirs, scipy.sparse.csr_array)
    assert theirs.shape == matrix.shape
    assert theirs.indices.dtype == theirs.indptr.dtype == np.int32
    if len(theirs.data):
        assert theirs.data.ctypes.data == matrix.values().data_ptr()
        assert theirs.indices.ctypes.data == matrix.col_indices().data_ptr()
    assert np.array_equal(theirs.toarray(), matrix.detach().to_dense().numpy())
    # We say that it is canonical; a fresh array has scipy look for itself.
    assert theirs.has_canonical_format
    assert scipy.sparse.csr_array((theirs.data, theirs.indices, theirs.indptr), theirs.shape).has_canonical_format


@pytest.mark.cuda
def test_cupy_shares_memory_and_agrees(geometry: ConvGeometry) -> None:
    pytest.importorskip("cupy")
    matrix = weight_matrix(geometry, random_weight(geometry, device="cuda"))
    theirs = to_cupy(matrix)
    assert theirs.shape == tuple(matrix.shape)
    if matrix._nnz():
        assert theirs.data.data.ptr == matrix.values().data_ptr()
        assert theirs.indices.data.ptr == matrix.col_indices().data_ptr()
    assert np.array_equal(theirs.get().toarray(), matrix.to_dense().cpu().numpy())


def test_wrong_matrices_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^to_scipy: matrix must be sparse CSR, got torch.strided$"):
        to_scipy(torch.eye(2))
    with pytest.raises(ArgumentError, match=r"^to_cupy: matrix must be on a GPU, got cpu$"):
        to_cupy(torch.eye(2).to_sparse_csr())

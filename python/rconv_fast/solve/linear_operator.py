"""A layer's stacked system as scipy's and cupy's ``LinearOperator``, for their solvers and for comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rconv_fast.constraints.streams import cupy_on_torch_stream, import_cupy
from rconv_fast.solve.rows import System


def as_linear_operator(system: System) -> Any:
    """``M`` as a scipy ``LinearOperator`` (CPU) or a cupy one (CUDA), of shape (rows of all blocks, unknowns).

    Products run in torch as convolutions. Every output of a block is a row, also those of weight 0. Vectors are
    shared with torch, not copied; on CUDA they run on torch's current stream.
    """
    shapes = [part.shape for part in system.rhs]
    sizes = [math.prod(shape) for shape in shapes]
    like = system.rhs[0]

    def matvec(v: Any) -> Any:
        x = _to_torch(v, like).reshape(system.shape)
        return _from_torch(torch.cat([part.reshape(-1) for part in system.apply(x)]))

    def rmatvec(v: Any) -> Any:
        parts = _to_torch(v, like).reshape(-1).split(sizes)
        y = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return _from_torch(system.adjoint(y).reshape(-1))

    shape = (sum(sizes), math.prod(system.shape))
    dtype = np.dtype(str(like.dtype).removeprefix("torch."))
    if like.is_cuda:
        with cupy_on_torch_stream(like.device, "as_linear_operator"):
            from cupyx.scipy.sparse.linalg import LinearOperator as CupyOperator

            return CupyOperator(shape, matvec=matvec, rmatvec=rmatvec, dtype=dtype)
    from scipy.sparse.linalg import LinearOperator

    return LinearOperator(shape, matvec=matvec, rmatvec=rmatvec, dtype=dtype)


def _to_torch(v: Any, like: Tensor) -> Tensor:
    """A numpy or cupy vector as a tensor of the system's dtype, sharing memory where the dtype agrees."""
    tensor = torch.utils.dlpack.from_dlpack(v) if like.is_cuda else torch.from_numpy(np.ascontiguousarray(v))
    return tensor.to(like)


def _from_torch(t: Tensor) -> Any:
    if t.is_cuda:
        return import_cupy("as_linear_operator").from_dlpack(t)
    return t.numpy()

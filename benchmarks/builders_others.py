"""Competitors of our builders: memory copies, numpy writing CSR by hand, scipy, torch, cupy.

All clocks include the allocation of what is returned. The two copies move as many bytes as the matrix has (values,
columns, row offsets): "into fresh memory" allocates its destination as a builder must, the other writes into warm
memory. "fill of fresh pages" writes constants to two new arrays of the sizes of values and columns, in huge pages and
on all threads: what the system takes to hand out memory that is written from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from builders import Case
from rconv_fast.constraints.streams import cupy_on_torch_stream


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


def cupy_coo(case: Case) -> Any:
    with cupy_on_torch_stream(case.source.device, "plain cupy") as cupy:
        from cupyx.scipy.sparse import coo_matrix

        return coo_to_csr(cupy, coo_matrix, cupy.from_dlpack(case.source[0]), case)


class Replayed:
    """What a function launches, captured once for each case in a CUDA graph: the device's time without the host's."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function
        self.case: Any = None

    def __call__(self, case: Any) -> Tensor:
        if case is not self.case:
            self.case, self.graph = case, torch.cuda.CUDAGraph()
            self.function(case)  # what is set up at a first call is not captured
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.returned = self.function(case)
        self.graph.replay()
        return self.returned

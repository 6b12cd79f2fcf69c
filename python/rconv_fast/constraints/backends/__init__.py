"""Where the work is done: one backend a device, all with the functions of ``rconv_fast.constraints.reference``.

``cpu`` and ``cuda`` allocate memory and have the compiled kernels fill it; without the compiled module the
reference itself stands in on the CPU. Which one runs follows from the tensor's device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from rconv_fast.constraints import reference
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.errors import BuildError

_core: ModuleType | None
load_error = ""
try:
    from rconv_fast import _core
except ImportError as error:  # a source tree that was never built, or a system without libgomp
    _core, load_error = None, str(error)


Triple = tuple[Tensor, Tensor, Tensor]


class Backend(Protocol):
    """What the operators ask of a device; ``rconv_fast.constraints.reference`` says it in plain torch."""

    def offsets(self, layout: ConstraintLayout, device: torch.device) -> Tensor: ...  # noqa: D102
    def columns(self, start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor: ...  # noqa: D102
    def values(self, source: Tensor, start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor: ...  # noqa: D102
    def sum_values(self, values: Tensor, start: Tensor, layout: ConstraintLayout) -> Tensor: ...  # noqa: D102
    def nonzero_pattern(self, source: Tensor, layout: ConstraintLayout) -> Triple: ...  # noqa: D102


class KernelBackend:
    """Allocates, and has the compiled kernels of one device fill.

    Parameters
    ----------
    kernels : module
        ``_core.cpu`` or ``_core.cuda``.
    empty : callable
        ``empty(n, dtype, device)`` is memory for `n` elements.
    launch : callable
        ``launch(kernel, tensor, *arguments)`` calls the kernel on the tensor's device, adding the number of
        threads or the stream.
    """

    def __init__(self, kernels: Any, empty: Callable[..., Tensor], launch: Callable[..., None]) -> None:
        self.kernels = kernels
        self.empty = empty
        self.launch = launch

    def offsets(self, layout: ConstraintLayout, device: torch.device) -> Tensor:
        """See ``reference.offsets``."""
        crow = self.empty(layout.n_rows + 1, layout.index_dtype, device)
        self.launch(self.kernels.fill_offsets, crow, layout.numbers, _is_wide(crow), crow.data_ptr())
        return crow

    def columns(self, start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor:
        """See ``reference.columns``."""
        col = self.empty(nnz, start.dtype, start.device)
        if nnz:
            pointers = (start.data_ptr(), col.data_ptr())
            self.launch(self.kernels.fill_columns, col, layout.numbers, _is_wide(col), *pointers)
        return col

    def values(self, source: Tensor, start: Tensor, nnz: int, layout: ConstraintLayout) -> Tensor:
        """See ``reference.values``."""
        values = self.empty(nnz, source.dtype, source.device)
        if nnz:
            source = source.contiguous()
            pointers = (start.data_ptr(), source.data_ptr(), values.data_ptr())
            types = (_is_double(source), _is_wide(start))
            self.launch(self.kernels.fill_values, values, layout.numbers, *types, *pointers)
        return values

    def sum_values(self, values: Tensor, start: Tensor, layout: ConstraintLayout) -> Tensor:
        """See ``reference.sum_values``."""
        source = values.new_empty(layout.n_source)
        if len(source):
            values = values.contiguous()
            pointers = (start.data_ptr(), values.data_ptr(), source.data_ptr())
            types = (_is_double(values), _is_wide(start))
            self.launch(self.kernels.sum_values, source, layout.numbers, *types, *pointers)
        return source

    def nonzero_pattern(self, source: Tensor, layout: ConstraintLayout) -> Triple:
        """See ``reference.nonzero_pattern``; reads the number of entries back from the device."""
        source = source.contiguous()
        start = torch.zeros(layout.n_rows + 1, dtype=layout.index_dtype, device=source.device)
        counts = torch.empty_like(start[1:])
        types = (_is_double(source), _is_wide(start))
        given = (layout.numbers, *types)
        self.launch(self.kernels.count_nonzeros, start, *given, source.data_ptr(), counts.data_ptr())
        torch.cumsum(counts, 0, dtype=start.dtype, out=start[1:])
        nnz = int(start[-1])  # synchronize!
        col, origin = (self.empty(nnz, start.dtype, start.device) for _ in range(2))
        if nnz:
            pointers = (start.data_ptr(), source.data_ptr(), col.data_ptr(), origin.data_ptr())
            self.launch(self.kernels.fill_nonzeros, start, *given, *pointers)
        return start, col, origin


def backend_for(device: torch.device) -> Backend:
    """Return the backend of a device, or raise ``BuildError`` with the remedy."""
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda" and _CUDA is not None:
        return _CUDA
    if device.type == "cuda":
        raise BuildError(
            "rconv_fast.constraints.ops: the build must have CUDA for a tensor on the GPU, got a build without; "
            "install a wheel with CUDA or rebuild with -Ccmake.define.RCONV_CUDA=ON, or move the tensor to the CPU"
        )
    raise BuildError(f"rconv_fast.constraints.ops: the tensor must be on cpu or cuda, got {device}")


def _is_wide(index: Tensor) -> bool:
    return index.dtype == torch.int64


def _is_double(values: Tensor) -> bool:
    return values.dtype == torch.float64


def _backends() -> tuple[Backend, Backend | None]:
    if _core is None:
        return reference, None
    from rconv_fast.constraints.backends import cpu, cuda

    on_cuda = KernelBackend(_core.cuda, cuda.empty, cuda.launch) if _core.has_cuda else None
    return KernelBackend(_core.cpu, cpu.empty, cpu.launch), on_cuda


_CPU, _CUDA = _backends()

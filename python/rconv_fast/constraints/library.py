"""The operators of the constraint matrices, registered with torch: bodies, fakes, derivatives.

Operators under ``torch.ops.rconv_fast`` take and return dense tensors; ``layout`` is
``ConstraintLayout.numbers``. All are deterministic, bit by bit, on any number of threads and on any device.

==========================================  ====================================  ===========  =========
operator                                    returns                               backward     host sync
==========================================  ====================================  ===========  =========
``pattern(layout, device)``                 ``crow, col`` of the full matrix      (integers)   none
``masked_pattern(mask, layout)``            ``start, crow, col``, rows kept       (integers)   one
``nonzero_pattern(source, layout)``         ``crow, col, origin``, nonzeros       (integers)   one
``values(source, start, nnz, layout)``      the source element of each entry      sum_values   none
``sum_values(values, start, layout)``       for each source element, the sum      values       none
==========================================  ====================================  ===========  =========

``values`` and ``sum_values`` are each other's transpose, so both differentiate any number of times.
``start`` is ``crow`` over all rows, where a row left out has no entries. The pattern depends on the
geometry alone: whoever builds many matrices of one layer asks for it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rconv_fast.constraints.backends import backend_for
from rconv_fast.constraints.layout import ConstraintLayout, layout_of
from rconv_fast.errors import ArgumentError

Components = tuple[Tensor, Tensor, Tensor]

# Defined by hand and not by custom_op, which costs three times as much a call.
_library = torch.library.Library("rconv_fast", "DEF")
_library.define("pattern(SymInt[] layout, Device device) -> (Tensor, Tensor)")
_library.define("masked_pattern(Tensor mask, SymInt[] layout) -> (Tensor, Tensor, Tensor)")
_library.define("nonzero_pattern(Tensor source, SymInt[] layout) -> (Tensor, Tensor, Tensor)")
_library.define("values(Tensor source, Tensor start, SymInt nnz, SymInt[] layout) -> Tensor")
_library.define("sum_values(Tensor values, Tensor start, SymInt[] layout) -> Tensor")


# Bodies, for any device: the backend follows from the tensor's device.


def _pattern(numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    layout, backend = layout_of(tuple(numbers)), backend_for(device)
    crow = backend.offsets(layout, device)
    return crow, backend.columns(crow, layout.nnz, layout)


def _masked_pattern(mask: Tensor, numbers: Sequence[int]) -> Components:
    layout, backend = layout_of(tuple(numbers)), backend_for(mask.device)
    mask = mask.reshape(-1)
    _check_op("masked_pattern", "mask", mask, layout.n_rows, (torch.bool,), mask.device)
    full = backend.offsets(layout, mask.device)
    # start[r] = entries kept before row r, rank[r] = rows kept before it; one more for the end.
    start, rank = torch.zeros_like(full), torch.zeros(len(full), dtype=torch.int64, device=mask.device)
    torch.cumsum(full.diff() * mask, 0, dtype=start.dtype, out=start[1:])
    torch.cumsum(mask, 0, out=rank[1:])
    nnz, n_rows = torch.stack([start[-1], rank[-1]]).tolist()  # synchronize!
    # A row left out shares rank and start with the next row kept: whichever is written, it is the same.
    crow = start.new_empty(n_rows + 1).scatter_(0, rank, start)
    return start, crow, backend.columns(start, nnz, layout)


def _nonzero_pattern(source: Tensor, numbers: Sequence[int]) -> Components:
    layout, backend = layout_of(tuple(numbers)), backend_for(source.device)
    _check_op("nonzero_pattern", "source", source, layout.n_source, _REAL, source.device)
    return backend.nonzero_pattern(source, layout)


def _values(source: Tensor, start: Tensor, nnz: int, numbers: Sequence[int]) -> Tensor:
    layout, backend = layout_of(tuple(numbers)), backend_for(source.device)
    _check_op("values", "source", source, layout.n_source, _REAL, source.device)
    _check_op("values", "start", start, layout.n_rows + 1, (layout.index_dtype,), source.device)
    return backend.values(source, start.contiguous(), nnz, layout)


def _sum_values(values: Tensor, start: Tensor, numbers: list[int]) -> Tensor:
    layout, backend = layout_of(tuple(numbers)), backend_for(values.device)
    _check_op("sum_values", "values", values, len(values), _REAL, values.device)
    _check_op("sum_values", "start", start, layout.n_rows + 1, (layout.index_dtype,), values.device)
    return backend.sum_values(values, start.contiguous(), layout)


_REAL = (torch.float32, torch.float64)


def _check_op(
    op: str, argument: str, tensor: Tensor, numel: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Check what the kernels take on trust: they see addresses only."""
    if tensor.numel() != numel or tensor.dtype not in dtypes or tensor.device != device:
        must = f"have {numel} elements of {' or '.join(map(str, dtypes))} on {device}"
        got = f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
        raise ArgumentError(f"rconv_fast.{op}: {argument} must {must}, got {got}")


# Fakes: sizes in closed form, so that everything behind them has exact shapes; new ones where data decide.


def _pattern_fake(numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    layout = ConstraintLayout.from_numbers(numbers)
    crow = torch.empty(layout.n_rows + 1, dtype=layout.index_dtype, device=device)
    return crow, crow.new_empty(layout.nnz)


def _masked_pattern_fake(mask: Tensor, numbers: Sequence[int]) -> Components:
    layout = ConstraintLayout.from_numbers(numbers)
    context = torch.library.get_ctx()
    start = mask.new_empty(layout.n_rows + 1, dtype=layout.index_dtype)
    n_offsets, nnz = context.new_dynamic_size(min=1), context.new_dynamic_size()
    return start, start.new_empty(n_offsets), start.new_empty(nnz)


def _nonzero_pattern_fake(source: Tensor, numbers: Sequence[int]) -> Components:
    layout = ConstraintLayout.from_numbers(numbers)
    crow = source.new_empty(layout.n_rows + 1, dtype=layout.index_dtype)
    nnz = torch.library.get_ctx().new_dynamic_size()
    return crow, crow.new_empty(nnz), crow.new_empty(nnz)


def _values_fake(source: Tensor, start: Tensor, nnz: int, numbers: Sequence[int]) -> Tensor:  # noqa: ARG001
    return source.new_empty(nnz)


def _sum_values_fake(values: Tensor, start: Tensor, numbers: Sequence[int]) -> Tensor:  # noqa: ARG001
    return values.new_empty(ConstraintLayout.from_numbers(numbers).n_source)


# Derivatives: values(g) = S g with a 0/1 matrix S, sum_values(v) = S^T v.


def _values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    source, start, _, ctx.numbers = inputs
    ctx.shape = source.shape
    ctx.save_for_backward(start)


def _values_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    (start,) = ctx.saved_tensors
    return torch.ops.rconv_fast.sum_values(grad, start, ctx.numbers).reshape(ctx.shape), None, None, None


def _sum_values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    values, start, ctx.numbers = inputs
    ctx.nnz = values.shape[0]
    ctx.save_for_backward(start)


def _sum_values_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    (start,) = ctx.saved_tensors
    return torch.ops.rconv_fast.values(grad, start, ctx.nnz, ctx.numbers), None, None


for _name, _body, _fake in (
    ("pattern", _pattern, _pattern_fake),
    ("masked_pattern", _masked_pattern, _masked_pattern_fake),
    ("nonzero_pattern", _nonzero_pattern, _nonzero_pattern_fake),
    ("values", _values, _values_fake),
    ("sum_values", _sum_values, _sum_values_fake),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rconv_fast::{_name}", _fake, lib=_library)
for _name, _backward, _setup in (
    ("values", _values_backward, _values_setup),
    ("sum_values", _sum_values_backward, _sum_values_setup),
):
    torch.library.register_autograd(f"rconv_fast::{_name}", _backward, setup_context=_setup, lib=_library)

OPERATORS: Any = torch.ops.rconv_fast

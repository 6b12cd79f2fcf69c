r"""The constraint matrices of a convolution, as torch operators.

Output position ``u`` and kernel offset ``k`` meet input position ``i = u*s + k*d - p``. Hence

* gradient constraints ``dW[f,c,k] = sum_{b,u} g[b,f,u] x[b,c,i]``: rows (f, k), columns (b, i);
* weight constraints ``o[f,u] = sum_{c,k} W[f,c,k] x[c,i]``: rows (f, u), columns (c, i).

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

import operator
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rconv_fast.constraints.backends import backend_for
from rconv_fast.constraints.layout import ConstraintLayout
from rconv_fast.errors import ArgumentError, require, require_type
from rconv_fast.geometry import ConvGeometry, Size
from rconv_fast.memory import require_memory

__all__ = ["gradient_components", "gradient_constraints", "weight_components", "weight_constraints"]

IntOrSize = int | Sequence[int]
Components = tuple[Tensor, Tensor, Tensor]
Function = TypeVar("Function")


# --- Public functions ------------------------------------------------------------------------------------


def gradient_constraints(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    drop_zeros: bool = False,
) -> Tensor:
    r"""Build the sparse matrix that maps one input channel to its weight gradient.

    ``A[(f,k), (b,i)] = g[b,f,u]`` where ``i = u*s + k*d - p``.

    Equivalent, with ``groups=1``, for every channel c:
    ``A @ x[:, c].reshape(-1) == grad_weight[:, c].reshape(-1)``.

    Parameters
    ----------
    grad_output : Tensor, shape (B, F, \*out)
        Gradient of the loss in the convolution's output, float32 or float64.
    input_size : int or sequence of int
        Spatial size of the input, 1 to 3 axes.
    kernel_size, stride, padding, dilation : int or sequence of int
        As in ``torch.nn.functional.conv2d``.
    groups : int
        As there. The rows of all filters stand in the one matrix: take those of a channel's group.
    drop_zeros : bool
        Leave out the entries where ``grad_output`` is 0 (behind a ReLU, about half).

    Returns
    -------
    Tensor, sparse CSR, shape (F * prod(kernel_size), B * prod(input_size))
        Columns sorted and unique in each row; int32 indices while they fit, else int64. Differentiable in
        ``grad_output``. NaN and Inf become entries like any other number.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument has the wrong shape, value or dtype.
    SystemTooLargeError
        If the matrix is larger than the device's memory.

    Notes
    -----
    One pass over the memory written, no sort. No host synchronisation, but for one with ``drop_zeros``, whose
    backward is torch's ``index_add`` and so not bitwise repeatable on a GPU. Under
    ``torch.compile(fullgraph=True)`` use ``gradient_components``.

    Examples
    --------
    >>> g = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> gradient_constraints(g, 4, 2).to_dense()
    tensor([[1., 2., 3., 0.],
            [0., 1., 2., 3.]])
    """
    numbers = _gradient_numbers(grad_output, input_size, kernel_size, stride, padding, dilation, groups)
    if not drop_zeros:
        _require_memory("gradient_constraints", grad_output, numbers)
    return _to_csr(_gradient_components(grad_output, numbers, drop_zeros), numbers)


def gradient_components(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    drop_zeros: bool = False,
) -> Components:
    """Return ``(values, crow, col)`` of ``gradient_constraints``; works inside ``torch.compile``."""
    numbers = _gradient_numbers(grad_output, input_size, kernel_size, stride, padding, dilation, groups)
    return _gradient_components(grad_output, numbers, drop_zeros)


def weight_constraints(
    weight: Tensor,
    input_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Build the sparse matrix of a convolution: ``A @ x.reshape(-1) == conv(x, weight).reshape(-1)[mask]``.

    ``A[(f,u), (c,i)] = W[f,c,k]`` where ``i = u*s + k*d - p``, for one sample x (C, \*in).

    Parameters
    ----------
    weight : Tensor, shape (F, C // groups, \*K)
        The convolution's weight, float32 or float64.
    input_size, stride, padding, dilation, groups
        As in ``gradient_constraints``.
    mask : Tensor of bool, shape (F, \*out), optional
        Keep only the rows of the outputs marked True.

    Returns
    -------
    Tensor, sparse CSR, shape (n_rows, C * prod(input_size))
        ``n_rows`` is the number of outputs kept. Differentiable in ``weight``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument has the wrong shape, value or dtype.
    SystemTooLargeError
        If the matrix is larger than the device's memory.

    Notes
    -----
    No host synchronisation, but for one with ``mask``.

    Examples
    --------
    >>> weight_constraints(torch.tensor([[[1.0, 2.0]]]), 4).to_dense()
    tensor([[1., 2., 0., 0.],
            [0., 1., 2., 0.],
            [0., 0., 1., 2.]])
    """
    numbers = _weight_numbers(weight, input_size, stride, padding, dilation, groups, mask)
    if mask is None:
        _require_memory("weight_constraints", weight, numbers)
    return _to_csr(_weight_components(weight, numbers, mask), numbers)


def weight_components(
    weight: Tensor,
    input_size: IntOrSize,
    *,
    stride: IntOrSize = 1,
    padding: IntOrSize = 0,
    dilation: IntOrSize = 1,
    groups: int = 1,
    mask: Tensor | None = None,
) -> Components:
    """Return ``(values, crow, col)`` of ``weight_constraints``; works inside ``torch.compile``."""
    numbers = _weight_numbers(weight, input_size, stride, padding, dilation, groups, mask)
    return _weight_components(weight, numbers, mask)


# --- Arguments -------------------------------------------------------------------------------------------

# A layout travels as its numbers, a tuple of ints: what operators take and torch.compile understands.
Numbers = tuple[int, ...]


def _gradient_numbers(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    stride: IntOrSize,
    padding: IntOrSize,
    dilation: IntOrSize,
    groups: int,
) -> Numbers:
    _require_real(grad_output, "gradient_constraints", "grad_output")
    sizes = (input_size, kernel_size, stride, padding, dilation)
    numbers: Numbers = _gradient_numbers_of(_static(grad_output.shape), *map(_hashable, sizes), groups)
    return numbers


def _weight_numbers(
    weight: Tensor,
    input_size: IntOrSize,
    stride: IntOrSize,
    padding: IntOrSize,
    dilation: IntOrSize,
    groups: int,
    mask: Tensor | None,
) -> Numbers:
    name = "weight_constraints"
    _require_real(weight, name, "weight")
    sizes = (input_size, stride, padding, dilation)
    numbers: Numbers
    numbers, mask_shape = _weight_numbers_of(_static(weight.shape), *map(_hashable, sizes), groups)
    if mask is not None:
        require_type(mask.dtype == torch.bool, name, "mask", "be a bool tensor", mask.dtype)
        require(mask.device == weight.device, name, "mask", f"be on {weight.device}", mask.device)
        require(mask.shape == mask_shape, name, "mask", f"have shape {mask_shape}", tuple(mask.shape))
    return numbers


# Checking a geometry takes longer than building a small matrix, and a model has few geometries.


def _assume_constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=256)
@_assume_constant_result
def _gradient_numbers_of(
    shape: Size,
    input_size: int | Size,
    kernel_size: int | Size,
    stride: int | Size,
    padding: int | Size,
    dilation: int | Size,
    groups: int,
) -> Numbers:
    name = "gradient_constraints"
    require(3 <= len(shape) <= 5, name, "grad_output", "have shape (B, F, *out) with 1 to 3 spatial axes", shape)
    require(shape[1] >= 1, name, "grad_output", "have at least one filter", shape)
    batch, n_filters, *out_size = shape
    geometry = ConvGeometry.create(name, groups, n_filters, input_size, kernel_size, stride, padding, dilation, groups)
    expected = f"(B, F, {', '.join(map(str, geometry.out_size))})"
    fits = tuple(out_size) == geometry.out_size
    require(fits, name, "grad_output", f"have shape {expected} for this geometry", shape)
    return ConstraintLayout.of_gradient(geometry, batch).numbers


@lru_cache(maxsize=256)
@_assume_constant_result
def _weight_numbers_of(
    shape: Size,
    input_size: int | Size,
    stride: int | Size,
    padding: int | Size,
    dilation: int | Size,
    groups: int,
) -> tuple[Numbers, Size]:
    """Return the layout's numbers and the shape a mask must have."""
    name = "weight_constraints"
    require(3 <= len(shape) <= 5, name, "weight", "have shape (F, C/groups, *K) with 1 to 3 spatial axes", shape)
    require(min(shape) >= 1, name, "weight", "have at least one element", shape)
    n_filters, n_channels, *kernel_size = shape
    geometry = ConvGeometry.create(
        name, n_channels * groups, n_filters, input_size, kernel_size, stride, padding, dilation, groups
    )
    return ConstraintLayout.of_weight(geometry).numbers, (n_filters, *geometry.out_size)


def _require_real(tensor: Tensor, function: str, argument: str) -> None:
    require_type(isinstance(tensor, Tensor), function, argument, "be a torch tensor", type(tensor).__name__)
    real = tensor.dtype in (torch.float32, torch.float64)
    require_type(real, function, argument, "be float32 or float64", tensor.dtype)
    strided = tensor.layout == torch.strided
    require_type(strided, function, argument, "be a dense tensor", tensor.layout)


def _require_memory(function: str, values: Tensor, numbers: Numbers) -> None:
    layout = _layout_of(numbers)
    index_bytes = layout.index_dtype.itemsize
    need = layout.nnz * (values.element_size() + index_bytes) + layout.n_rows * index_bytes
    if need > _ALWAYS_FITS:  # asking the system costs more than building a small matrix
        require_memory(function, "the matrix", need, values.device)


_ALWAYS_FITS = 2**26


def _static(shape: Sequence[int]) -> Size:
    # index() has torch.compile specialise on the sizes: the counts of a layout are loops over them.
    return tuple(map(operator.index, shape))


def _hashable(size: IntOrSize) -> int | Size:
    return size if isinstance(size, int) else tuple(size)


# --- From the layout to the matrix -----------------------------------------------------------------------


def _gradient_components(grad_output: Tensor, numbers: Numbers, drop_zeros: bool) -> Components:
    run = _operators_for(grad_output)
    if drop_zeros:
        crow, col, origin = run.nonzero_pattern(grad_output, numbers)
        return grad_output.reshape(-1).index_select(0, origin), crow, col
    crow, col = run.pattern(numbers, grad_output.device)
    return run.values(grad_output, crow, col.shape[0], numbers), crow, col


def _weight_components(weight: Tensor, numbers: Numbers, mask: Tensor | None) -> Components:
    run = _operators_for(weight)
    if mask is None:
        start, col = run.pattern(numbers, weight.device)
        crow = start
    else:
        start, crow, col = run.masked_pattern(mask, numbers)
    return run.values(weight, start, col.shape[0], numbers), crow, col


def _operators_for(source: Tensor) -> Any:
    """The registered operators, or their bodies where nothing watches: the dispatcher costs half a small matrix."""
    watched = (
        torch.compiler.is_compiling()
        or source.requires_grad
        or type(source) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(source)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )
    return torch.ops.rconv_fast if watched else _BODIES


def _to_csr(components: Components, numbers: Numbers) -> Tensor:
    values, crow, col = components
    shape = (crow.shape[0] - 1, _layout_of(numbers).n_cols)
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


# --- Operators -------------------------------------------------------------------------------------------

# Defined by hand and not by custom_op, which costs three times as much a call.
_library = torch.library.Library("rconv_fast", "DEF")
_library.define("pattern(SymInt[] layout, Device device) -> (Tensor, Tensor)")
_library.define("masked_pattern(Tensor mask, SymInt[] layout) -> (Tensor, Tensor, Tensor)")
_library.define("nonzero_pattern(Tensor source, SymInt[] layout) -> (Tensor, Tensor, Tensor)")
_library.define("values(Tensor source, Tensor start, SymInt nnz, SymInt[] layout) -> Tensor")
_library.define("sum_values(Tensor values, Tensor start, SymInt[] layout) -> Tensor")


# Bodies, for any device: the backend follows from the tensor's device.


@lru_cache(maxsize=256)
def _layout_of(numbers: Numbers) -> ConstraintLayout:
    return ConstraintLayout.from_numbers(numbers)


def _pattern(numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    layout, backend = _layout_of(tuple(numbers)), backend_for(device)
    crow = backend.offsets(layout, device)
    return crow, backend.columns(crow, layout.nnz, layout)


def _masked_pattern(mask: Tensor, numbers: Sequence[int]) -> Components:
    layout, backend = _layout_of(tuple(numbers)), backend_for(mask.device)
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
    layout, backend = _layout_of(tuple(numbers)), backend_for(source.device)
    _check_op("nonzero_pattern", "source", source, layout.n_source, _REAL, source.device)
    return backend.nonzero_pattern(source, layout)


def _values(source: Tensor, start: Tensor, nnz: int, numbers: Sequence[int]) -> Tensor:
    layout, backend = _layout_of(tuple(numbers)), backend_for(source.device)
    _check_op("values", "source", source, layout.n_source, _REAL, source.device)
    _check_op("values", "start", start, layout.n_rows + 1, (layout.index_dtype,), source.device)
    return backend.values(source, start.contiguous(), nnz, layout)


def _sum_values(values: Tensor, start: Tensor, numbers: list[int]) -> Tensor:
    layout, backend = _layout_of(tuple(numbers)), backend_for(values.device)
    _check_op("sum_values", "values", values, len(values), _REAL, values.device)
    _check_op("sum_values", "start", start, layout.n_rows + 1, (layout.index_dtype,), values.device)
    return backend.sum_values(values, start.contiguous(), layout)


_BODIES = SimpleNamespace(
    pattern=_pattern, masked_pattern=_masked_pattern, nonzero_pattern=_nonzero_pattern, values=_values
)
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

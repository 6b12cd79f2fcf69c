"""From the arguments of a matrix to its layout: what is checked, and what is remembered."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from rconv_fast.constraints.layout import ConstraintLayout, Numbers, layout_of
from rconv_fast.errors import require, require_type
from rconv_fast.geometry import ConvGeometry, Size
from rconv_fast.memory import require_memory

IntOrSize = int | Sequence[int]
Function = TypeVar("Function")

# Asking the system for its memory costs more than building a matrix of so many bytes.
_ALWAYS_FITS = 2**26


def gradient_numbers(
    grad_output: Tensor,
    input_size: IntOrSize,
    kernel_size: IntOrSize,
    stride: IntOrSize,
    padding: IntOrSize,
    dilation: IntOrSize,
    groups: int,
) -> Numbers:
    """Check the arguments of ``gradient_constraints``; return the numbers of its layout."""
    _require_real(grad_output, "gradient_constraints", "grad_output")
    sizes = (input_size, kernel_size, stride, padding, dilation)
    numbers: Numbers = _gradient_numbers_of(_static(grad_output.shape), *map(_hashable, sizes), groups)
    return numbers


def weight_numbers(
    weight: Tensor,
    input_size: IntOrSize,
    stride: IntOrSize,
    padding: IntOrSize,
    dilation: IntOrSize,
    groups: int,
    mask: Tensor | None,
) -> Numbers:
    """Check the arguments of ``weight_constraints``; return the numbers of its layout, without a mask."""
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


def _assume_constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Checking a geometry takes longer than building a small matrix, and a model has few geometries.
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


def require_room(function: str, values: Tensor, numbers: Numbers) -> None:
    """Refuse a matrix with values like these that the device's memory does not hold."""
    layout = layout_of(numbers)
    index_bytes = layout.index_dtype.itemsize
    need = layout.nnz * (values.element_size() + index_bytes) + layout.n_rows * index_bytes
    if need > _ALWAYS_FITS:
        require_memory(function, "the matrix", need, values.device)


def _static(shape: Sequence[int]) -> Size:
    # index() has torch.compile specialise on the sizes: the counts of a layout are loops over them.
    return tuple(map(operator.index, shape))


def _hashable(size: IntOrSize) -> int | Size:
    return size if isinstance(size, int) else tuple(size)

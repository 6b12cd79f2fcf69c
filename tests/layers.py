"""Random tensors of a geometry, and the two matrices of it, as the tests of the builders need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rconv_fast.constraints import ops
from rconv_fast.geometry import ConvGeometry


def sizes(geometry: ConvGeometry) -> dict[str, Any]:
    return {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }


def random_input(geometry: ConvGeometry, batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, geometry.in_channels, *geometry.input_size, **options)


def random_grad_output(geometry: ConvGeometry, batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, geometry.out_channels, *geometry.out_size, **options)


def random_weight(geometry: ConvGeometry, **options: Any) -> Tensor:
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    return torch.randn(shape, **options)


def random_mask(geometry: ConvGeometry, **options: Any) -> Tensor:
    return torch.rand(geometry.out_channels, *geometry.out_size, **options) > 0.5


def convolve(geometry: ConvGeometry, x: Tensor, weight: Tensor) -> Tensor:
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[geometry.ndim]
    return function(x, weight, None, **sizes(geometry))


def gradient_matrix(geometry: ConvGeometry, grad_output: Tensor, **options: Any) -> Tensor:
    size = (geometry.input_size, geometry.kernel_size)
    return ops.gradient_constraints(grad_output, *size, **sizes(geometry), **options)


def weight_matrix(geometry: ConvGeometry, weight: Tensor, **options: Any) -> Tensor:
    return ops.weight_constraints(weight, geometry.input_size, **sizes(geometry), **options)

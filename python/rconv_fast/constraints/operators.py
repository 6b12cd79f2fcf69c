"""Products with the constraint matrices of a convolution, without the matrices: they are convolutions.

With ``i = u*s + k*d - p`` (see ``rconv_fast.geometry``), weights ``W`` and output gradients ``g``:

=========  ================================================  ==================================
product    formula                                           is
=========  ================================================  ==================================
``A x``    ``o[b,f,u]  = sum_{c,k} W[f,c,k] x[b,c,i]``        the convolution
``A^T y``  ``x[b,c,i]  = sum_{f,u} W[f,c,k] y[b,f,u]``        its gradient in the input
``B x``    ``dW[f,c,k] = sum_{b,u} g[b,f,u] x[b,c,i]``        its gradient in the weight
``B^T y``  ``x[b,c,i]  = sum_{f,u} g[b,f,u] y[f,c,k]``        its gradient in the input, weight y
=========  ================================================  ==================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.geometry import ConvGeometry


def apply_weight(geometry: ConvGeometry, x: Tensor, weight: Tensor) -> Tensor:
    r"""``A x``: x (B, C, \*in), weight (F, C/groups, \*K) -> (B, F, \*out)."""
    if _is_linear(geometry):
        return (x.flatten(1) @ weight.flatten(1).mT).reshape(len(x), -1, 1)
    zeros = [0] * geometry.ndim
    product: Tensor = torch.ops.aten.convolution(
        x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, zeros, geometry.groups
    )
    return product


def apply_weight_adjoint(geometry: ConvGeometry, y: Tensor, weight: Tensor) -> Tensor:
    r"""``A^T y`` (and ``B^T y`` with g for y, y for weight): (B, F, \*out) -> (B, C, \*in)."""
    if _is_linear(geometry):
        return (y.flatten(1) @ weight.flatten(1)).reshape(len(y), -1, 1)
    if _phases_are_faster(geometry, y):
        return _adjoint_by_phases(geometry, y, weight)
    like = y.new_empty(1).expand(len(y), geometry.in_channels, *geometry.input_size)
    return _convolution_backward(geometry, y, like, weight, 0)


def apply_gradient(geometry: ConvGeometry, x: Tensor, grad_output: Tensor) -> Tensor:
    r"""``B x``: x (B, C, \*in), grad_output (B, F, \*out) -> (F, C/groups, \*K)."""
    if _is_linear(geometry):
        return (grad_output.flatten(1).mT @ x.flatten(1)).unsqueeze(-1)
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    return _convolution_backward(geometry, grad_output, x, x.new_empty(1).expand(shape), 1)


def _convolution_backward(geometry: ConvGeometry, grad_output: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """One of the gradients of a convolution: in the input (`which` 0) or in the weight (1)."""
    mask = [which == 0, which == 1, False]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * geometry.ndim,
        geometry.groups,
        mask,
    )
    return gradients[which]


# On a CPU the gradient of a strided float32 convolution of few channels in its input takes twice as long as that of one
# without stride and with as many channels as there are phases; small kernels and pictures gain nothing.
MAX_PHASE_CHANNELS, MIN_PHASE_KERNEL, MIN_PHASE_OUTPUTS = 4, 4, 1024


def _phases_are_faster(geometry: ConvGeometry, y: Tensor) -> bool:
    """Whether `_adjoint_by_phases` is applicable and faster."""
    if y.dtype != torch.float32 or y.device.type != "cpu" or geometry.ndim != 2 or geometry.groups != 1:
        return False
    height, width = geometry.stride
    large = geometry.n_output >= MIN_PHASE_OUTPUTS and min(geometry.kernel_size) >= MIN_PHASE_KERNEL
    return large and geometry.in_channels <= MAX_PHASE_CHANNELS and height == width > 1 and geometry.dilation == (1, 1)


def _adjoint_by_phases(geometry: ConvGeometry, y: Tensor, weight: Tensor) -> Tensor:
    """``A^T y`` with the stride phases of x as channels, ``x[c, u*s + r] = x'[(c, r), u]``: that has no stride."""
    s, taps = geometry.stride[0], [-(-k // geometry.stride[0]) for k in geometry.kernel_size]
    size = tuple(o + t - 1 for o, t in zip(geometry.out_size, taps, strict=True))
    phases = ConvGeometry.create("adjoint", geometry.in_channels * s * s, geometry.out_channels, size, taps)
    (height, width), (rows, columns) = geometry.kernel_size, taps
    padded = torch.nn.functional.pad(weight, (0, columns * s - width, 0, rows * s - height))
    x = apply_weight_adjoint(phases, y, torch.nn.functional.pixel_unshuffle(padded, s))
    (top, left), (n, m) = geometry.padding, geometry.input_size
    bottom, right = n + top - size[0] * s, m + left - size[1] * s
    return torch.nn.functional.pad(torch.nn.functional.pixel_shuffle(x, s), (-left, right, -top, bottom)).contiguous()


def _is_linear(geometry: ConvGeometry) -> bool:
    """A fully connected layer: one position, one offset; a matrix product is faster than a convolution."""
    return geometry.n_input == geometry.n_taps == geometry.n_output == geometry.groups == 1 and geometry.padding == (0,)

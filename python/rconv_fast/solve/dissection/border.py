"""How many directions a square convolution leaves nearly open at the border of the picture.

With the stride phases of x as channels, a convolution with as many filters as that gives is a square matrix of
polynomials in ``exp(i theta)``, one variable an axis: its symbol ``P(theta)``. Along an axis a finite picture cuts it
to a block Toeplitz matrix, which for each frequency of the other axis has as many nearly null directions as the
determinant of P winds around 0 (Gohberg and Feldman 1974): vectors that grow towards one border until they are cut off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.geometry import ConvGeometry

# Frequencies of the axis along which the determinant is followed and of the other, and the largest symbol.
ALONG, ACROSS, MAX_FILTERS = 128, 32, 64


def is_square(geometry: ConvGeometry) -> bool:
    """Whether the symbol is a square matrix, small enough, of an ordinary convolution of pictures."""
    phases = math.prod(geometry.stride)
    square = geometry.out_channels == geometry.in_channels * phases <= MAX_FILTERS
    return square and geometry.ndim == 2 and geometry.groups == 1 and set(geometry.dilation) == {1}


def open_directions(geometry: ConvGeometry, weight: Tensor) -> int:
    """``sum_axes mean |winding of det P| * outputs of the other axis``, for a geometry that `is_square`."""
    total = 0.0
    for axis in (0, 1):
        determinant = torch.linalg.det(_symbol(geometry, weight, axis))
        # the symbol counts from the first tap; the output u stands at the tap that meets x'[u]
        steps = torch.angle(determinant.roll(-1, 0) / determinant).nan_to_num(0.0)  # a singular symbol does not wind
        turns = steps.sum(0) / (2 * math.pi)
        shift = -(-geometry.padding[axis] // geometry.stride[axis])
        windings = (turns + shift * geometry.out_channels).abs()
        mean = float(windings.sum() + windings[1:-1].sum()) / ACROSS  # the frequencies left out are as those kept
        total += mean * geometry.out_size[1 - axis]
    return round(total)


def winds(geometry: ConvGeometry, weight: Tensor) -> bool:
    """Whether a convolution is square and leaves directions nearly open."""
    return is_square(geometry) and open_directions(geometry, weight) > 0


def _symbol(geometry: ConvGeometry, weight: Tensor, axis: int) -> Tensor:
    """``P[f, (c, r)](theta) = sum_t W[f, c, t*s + r] exp(-i theta t)``, (ALONG, half of ACROSS, F, C s^2).

    On a grid of frequencies along an axis and across it; of the latter those from 0 to pi, the others are conjugate.
    """
    (height, width), (rows, columns) = geometry.stride, geometry.kernel_size
    top, left = -geometry.padding[0] % height, -geometry.padding[1] % width
    w = F.pad(weight, (left, -(columns + left) % width, top, -(rows + top) % height))
    w = w.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (F, C, t_y, r_y, t_x, r_x)
    taps = w.permute(2 + 2 * axis, 4 - 2 * axis, 0, 1, 3, 5).flatten(3)
    symbol: Tensor = torch.fft.rfft2(taps.double(), s=(ALONG, ACROSS), dim=(0, 1))
    return symbol

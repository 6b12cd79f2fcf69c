"""The gradient behind the first step of Adam, whose sign and size are known functions of it.

With empty moments the step ``w' = w - lr s`` divides the gradient by its own size,

    s = g / (|g| + eps),      so that      g = eps s / (1 - |s|),      dg = (|g| + eps)^2 / eps * ds

The larger a gradient is beside eps, the nearer s is to 1 and the less of its size is left: of one that is R times as
large as eps, a rounding of s leaves R times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rconv_fast.observation import CANCELLED

# Roundings of the step's own arithmetic, each uniform: two moments, their corrections, root, eps, quotient, lr.
_ROUNDINGS = 8
# Where 1 - |s| is below so many standard deviations of s, only the sign and a least size are known; s above 1 by as
# many belongs to no first step.
SURE = 5.0


def arithmetic_noise(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard deviation of a step over lr that its computing in `dtype` leaves."""
    return s.abs() * torch.finfo(dtype).eps * math.sqrt(_ROUNDINGS / 12)


def gradient_of_first_step(s: Tensor, noise: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient and its standard deviation, infinite where the size is lost: then the gradient is a least size.

    No entry is said to be surer than its tensor is on average: a layer's equations mix them, and 1e-16 beside 1e-8 is
    more than float64 holds.

    Parameters
    ----------
    s : Tensor
        ``(w - w') / lr``.
    noise : Tensor
        Standard deviation of s.
    eps : float
        Of Adam.

    Examples
    --------
    >>> gradient_of_first_step(torch.tensor([0.5, -1.0]), torch.tensor([1e-3, 1e-3]), eps=1e-8)
    (tensor([ 1.0000e-08, -9.9000e-07]), tensor([4.0000e-11,        inf]))
    """
    lost = s.abs() > 1 - SURE * noise
    least = (1 - 2 * SURE * noise).clamp_min(0.0)
    size = torch.where(lost, least, s.abs())
    gradient = s.sign() * eps * size / (1 - size)
    deviation = (gradient.abs() + eps).square() / eps * noise
    usual = deviation[~lost].square().mean().sqrt().nan_to_num()
    return gradient, torch.where(lost, math.inf, torch.maximum(deviation, usual))


def with_noise_of_sums(
    gradients: Mapping[str, Tensor], noise: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """No noise below what rounding leaves of terms that cancel, as those of a bias in front of a batch norm do.

    The smaller a gradient, the better Adam shows it: also one that is nothing but rounding.
    """
    sizes = [g[noise[name].isfinite()].double().square().mean().sqrt().nan_to_num() for name, g in gradients.items()]
    least = CANCELLED * torch.finfo(dtype).eps * max(map(float, sizes))
    return {name: sigma.clamp_min(least) for name, sigma in noise.items()}

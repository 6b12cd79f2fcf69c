"""I2F: a lower bound of the error that noise on the gradients leaves in any gradient-matching answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rconv_fast.errors import require
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.noise_model import noise_of
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise
from rconv_fast.wrappers import working_copy

# Power iterations end when the eigenvalue moves by less than this share, or after so many products.
RTOL, MOST = 1e-4, 300
# Draws of the noise over which the bound is a mean; its spread between draws is a few per cent.
DRAWS = 8


def i2f_bound(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    noise: float | Noise,
    *,
    loss: str = "cross_entropy",
    reduction: str = "mean",
    seed: int = 0,
) -> float:
    r"""Lower bound of the inversion influence function [1]_: how far Gaussian noise moves the recovered batch.

    To first order noise d on the gradients moves the minimiser of ``||grad(x) - g - d||^2`` by ``(J J^T)^-1 J d``,
    with ``J = d^2 L / dx dw`` (equation 4 of [1]_); its norm is at least ``||J d|| / lambda_max(J J^T)`` (equation 5).
    Returned is the root mean square over the values of the batch, ``||J d|| / (lambda_max sqrt(n))``, a mean over draws
    of d.

    Parameters
    ----------
    model : nn.Module
        Left as it is; it is differentiated twice.
    inputs : Tensor, shape (B, \*input_shape)
        The private batch.
    labels : Tensor, shape (B, ...)
        Its labels, or targets.
    noise : float or mapping of str to float or Tensor
        Standard deviation of the gradients' entries: relative to each tensor's root mean square, or by parameter name.
    loss, reduction : str
        As in ``rconv_fast.invert``.
    seed : int
        Of the draws.

    Returns
    -------
    float
        In the units of `inputs`; infinite where the gradients do not depend on them.

    References
    ----------
    .. [1] Zhang, Hong, Deng, Mahdavi, Zhou, "Understanding Deep Gradient Leakage via Inversion Influence Functions",
       NeurIPS 2023, section 3.
    """
    require(len(inputs) == len(labels) > 0, "i2f_bound", "labels", f"hold {len(inputs)} entries", len(labels))
    work = working_copy(model, inputs.dtype)
    one = {name: torch.ones((), dtype=inputs.dtype, device=inputs.device) for name, _ in work.named_parameters()}
    nothing = {name: torch.zeros_like(p) for name, p in work.named_parameters()}
    # with nothing seen in units of 1 the residual is the gradient itself, by name as the parameters are
    gradients = GradientMap(work, Loss(loss, reduction), labels, nothing, one).at(inputs)
    largest = _largest_eigenvalue(gradients.normal, inputs, seed)
    if largest == 0:
        return math.inf
    sigma, _ = noise_of(dict(zip(one, gradients.residual, strict=True)), noise)
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(DRAWS):
        drawn = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in gradients.residual]
        moved = gradients.adjoint([d * sigma[name].to(d) for name, d in zip(one, drawn, strict=True)])
        norms.append(float(moved.double().norm()))
    return sum(norms) / DRAWS / (largest * math.sqrt(inputs.numel()))


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor, seed: int) -> float:
    """Of a symmetric positive semidefinite map, by power iteration from a random vector."""
    v = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
    value = 0.0
    for _ in range(MOST):
        v = apply(v / v.norm())
        before, value = value, float(v.norm())
        if value == 0 or abs(value - before) <= RTOL * value:
            break
    return value

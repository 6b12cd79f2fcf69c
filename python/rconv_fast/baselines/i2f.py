"""I2F: a lower bound of the error that noise on the gradients leaves in any gradient-matching answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rconv_fast.baselines.problem import standard_deviations
from rconv_fast.errors import require
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise

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
    with ``J = d^2 L / dx dw``; its norm is at least ``||J d|| / lambda_max(J J^T)``. Returned is the root mean square
    over the values of the batch, ``||J d|| / (lambda_max sqrt(n))``, a mean over draws of d.

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
    value = Loss(loss, reduction)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        x = inputs.detach().clone().requires_grad_()
        found = torch.autograd.grad(
            value(model(x), labels), list(parameters.values()), create_graph=True, materialize_grads=True
        )
        gradients = {n: g for n, g in zip(parameters, found, strict=True) if g.requires_grad}
        # <u, g(x)> is linear in u: its gradient in x is J u, and the gradient of <v, J u> in u is J^T v
        u = {name: torch.zeros_like(g, requires_grad=True) for name, g in gradients.items()}
        inner = torch.stack([(u[name] * g).sum() for name, g in gradients.items()]).sum()
        (jacobian_u,) = torch.autograd.grad(inner, x, create_graph=True)

    def forward(d: Mapping[str, Tensor]) -> Tensor:
        return torch.autograd.grad(list(gradients.values()), x, [d[n] for n in gradients], retain_graph=True)[0]

    def transposed(v: Tensor) -> dict[str, Tensor]:
        parts = torch.autograd.grad(jacobian_u, list(u.values()), v, retain_graph=True, materialize_grads=True)
        return dict(zip(u, parts, strict=True))

    generator = torch.Generator().manual_seed(seed)
    begin = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    largest = _largest_eigenvalue(lambda v: forward(transposed(v)), begin)
    if largest == 0:
        return math.inf
    sigma = standard_deviations({n: g.detach() for n, g in gradients.items()}, noise)
    norms = []
    for _ in range(DRAWS):
        draws = {n: torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for n, g in gradients.items()}
        moved = forward({n: d * torch.as_tensor(sigma.get(n, 0.0)).to(d) for n, d in draws.items()})
        norms.append(float(moved.double().norm()))
    return sum(norms) / DRAWS / (largest * math.sqrt(x.numel()))


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], v: Tensor) -> float:
    """Of a symmetric positive semidefinite map, by power iteration."""
    value = 0.0
    for _ in range(MOST):
        v = apply(v / v.norm())
        before, value = value, float(v.norm())
        if value == 0 or abs(value - before) <= RTOL * value:
            break
    return value

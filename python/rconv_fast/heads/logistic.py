"""The logistic head, of one or several logits: one sample from its gradient.

``dW = delta x^T``, ``db = delta``. With a bias ``delta`` is known; without one, ``x = p v`` and ``delta = u / p`` leave
one number p, and the loss gives the equation for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rconv_fast.heads.separation import HeadSeparation, check_head, rounding_of

# A residual is accepted up to this factor above the rounding of the gradients.
_SAFETY = 1e3
# Points per sign of the search for p where several logits share one sample.
_GRID = 4096
_BISECTIONS = 200


def separate_logistic_head(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reduction: str = "mean",
) -> list[HeadSeparation]:
    """Recover one sample from a head trained with ``binary_cross_entropy_with_logits``.

    With ``w = 1/n`` (mean over the n logits) or 1 (sum), ``delta = w (sigmoid(W x + c) - y)``. With a bias,
    ``delta = db`` and ``x = dW^T db / |db|^2``, and ``y = sigmoid(W x + c) - delta / w`` must be 0 or 1. One logit
    without a bias: ``u = W x`` solves ``W . dW = w u (sigmoid(u + c) - y)``, at most two roots for each y. Several
    logits without a bias: ``x = p v``, ``delta = sigma u / p``, and p is searched.

    Parameters
    ----------
    grad_weight : Tensor, shape (n, d)
        Gradient of the head's weight.
    grad_bias : Tensor, shape (n,), or None
        Gradient of its bias; None for a head without one.
    weight, bias : Tensor
        The head's parameters; `bias` may be None, or a constant when `grad_bias` is None.
    reduction : {"mean", "sum"}
        Of the loss.

    Returns
    -------
    list of HeadSeparation
        With a bias one reading, or none if the gradient is not that of one sample with a label of 0 or 1. Without a
        bias up to four for one logit: try each, the gradient match of the whole model decides. ``labels`` are the
        targets (1, n). In the dtype of `grad_weight`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape, type or value is wrong or the gradient is zero.

    Notes
    -----
    Without bias and offset, ``(x, y)`` and ``(-x, 1 - y)`` have the same gradient: both are returned.

    References
    ----------
    R-GAP (Zhu and Blaschko, ICLR 2021), section 3: the scalar equation of a logistic head.
    """
    function = "separate_logistic_head"
    check_head(function, grad_weight, grad_bias, weight, bias, reduction)
    n = grad_weight.shape[0]
    w = 1.0 / n if reduction == "mean" else 1.0
    dw, wt = grad_weight.detach().double(), weight.detach().double()
    c = wt.new_zeros(n) if bias is None else bias.detach().double()
    tolerance = _SAFETY * rounding_of(grad_weight, grad_bias)
    if grad_bias is not None:
        delta = grad_bias.detach().double()
        readings = [_logistic_reading(dw, dw.mT @ delta / (delta @ delta), delta, wt, c, w)]
    elif n == 1:
        readings = [
            _logistic_reading(dw, dw[0] / delta, delta[None], wt, c, w)
            for delta in _logistic_deltas((wt * dw).sum() / w, c[0], w)
        ]
    else:
        u, s, vh = torch.linalg.svd(dw, full_matrices=False)
        readings = [
            _logistic_reading(dw, p * s[0] * vh[0], u[:, 0] / p, wt, c, w)
            for p in _logistic_scales(u[:, 0] / w, s[0] * (wt @ vh[0]), c)
        ]
    limits = [tolerance * max(1.0, float(w / r.grad_logits.abs().max())) for r in readings]
    good = [r for r, limit in zip(readings, limits, strict=True) if float(r.residuals[0]) <= limit]
    spare = n if grad_bias is not None else n - 1  # every logit says 0 or 1; without a bias one of them gives p
    return [replace(r, spare=spare, complete=spare > 0).to(grad_weight.dtype) for r in good]


def _logistic_reading(
    grad_weight: Tensor, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, w: float
) -> HeadSeparation:
    sigmoid = torch.sigmoid(weight @ x + bias)
    labels = (sigmoid - delta / w).round().clamp(0, 1)
    gap = (w * (sigmoid - labels) - delta).norm() / delta.norm()
    mixed = (grad_weight - torch.outer(delta, x)).norm() / grad_weight.norm()
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    residual = torch.maximum(gap, mixed)[None]
    return HeadSeparation(x[None], labels[None], delta[None], residual, 1, one, False, float(mixed), 1)


def _logistic_deltas(product: Tensor, offset: Tensor, w: float) -> list[Tensor]:
    """All ``delta`` of one logit: ``u sigmoid(u + c) = a`` for y = 0, and with ``u -> -u, c -> -c`` for y = 1."""
    deltas = [w * torch.sigmoid(u + offset) for u in _roots_of_u_sigmoid(product, offset)]
    return deltas + [-w * torch.sigmoid(v - offset) for v in _roots_of_u_sigmoid(product, -offset)]


def _roots_of_u_sigmoid(value: Tensor, offset: Tensor) -> list[Tensor]:
    """Roots of ``f(u) = u sigmoid(u + c) = a``: f falls from 0 to one minimum at a negative u, then rises."""

    def f(u: Tensor) -> Tensor:
        return u * torch.sigmoid(u + offset)

    # f' = 0 where u (1 - sigmoid(u + c)) = -1, which has one solution, left of 0
    low, high = -2.0 - offset.abs() - 2.0, torch.zeros_like(value)
    lowest = _bisect(lambda u: 1 + u * torch.sigmoid(-u - offset), low, high, value.new_zeros(()))
    if value < f(lowest):
        return []
    far = value.abs() * 2 + offset.abs() + 2  # sigmoid(far + c) > 1/2
    roots = [_bisect(f, lowest, far, value)]
    if value < 0:
        left = lowest - 1
        while f(left) < value and left > -800:  # f(-800) underflows
            left = 2 * left
        roots.append(_bisect(lambda u: -f(u), left, lowest, -value))
    return roots


def _bisect(rising: object, low: Tensor, high: Tensor, value: Tensor) -> Tensor:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = rising(middle) < value  # type: ignore[operator]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _logistic_scales(u: Tensor, slope: Tensor, offset: Tensor) -> list[Tensor]:
    """Scales p for which ``sigmoid(p slope + c) - u / p`` is 0 or 1 in every logit, polished by Gauss-Newton."""
    reach = 40.0 / slope.abs().max()
    smallest = u.abs().max() * 0.5  # |delta / w| <= 1 < 2
    grid = torch.logspace(0, 1, _GRID, dtype=u.dtype, device=u.device)
    grid = smallest * (reach / smallest).clamp_min(10.0) ** (grid.log10())
    p = torch.cat([-grid, grid])
    target = torch.sigmoid(p[:, None] * slope + offset) - u / p[:, None]
    cost = (target - target.round().clamp(0, 1)).square().sum(1)
    best = cost.argsort()[:16]
    p, labels = p[best], target[best].round().clamp(0, 1)
    for _ in range(60):
        sigmoid = torch.sigmoid(p[:, None] * slope + offset)
        residual = p[:, None] * (sigmoid - labels) - u  # times p: no pole
        jacobian = sigmoid - labels + p[:, None] * sigmoid * (1 - sigmoid) * slope
        p = p - (residual * jacobian).sum(1) / jacobian.square().sum(1).clamp_min(1e-300)
    kept: list[Tensor] = []
    for value in p:
        if torch.isfinite(value) and value != 0 and all((value / k - 1).abs() > 1e-9 for k in kept):
            kept.append(value)
    return kept

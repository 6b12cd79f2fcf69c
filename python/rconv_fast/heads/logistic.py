"""The logistic head, of one or several logits: every reading of its gradient as that of one sample.

``dW = delta x^T``, ``db = delta``. With a bias ``delta`` is known; without one, ``x = p v`` and ``delta = u / p`` leave
one number p, and the loss gives the equation for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.problem import SAFETY, STATED_SAFETY
from rconv_fast.heads.separation import NOTHING_LEFT, HeadSeparation

# Roots of p are bisected, and searched on a grid, to so much more than the rounding of the gradients.
_BISECTIONS = 200
# Points per sign of the search for p where several logits share one sample.
_GRID = 4096


def logistic_readings(head: Head) -> list[HeadSeparation]:
    """One sample from a head trained with ``binary_cross_entropy_with_logits``.

    With ``w = s / n`` (mean over the n logits) or s (sum) and the scale s, ``delta = w (sigmoid(W x + c) - y)``. With
    a bias, ``delta = db`` and ``x = dW^T db / |db|^2``, and ``y = sigmoid(W x + c) - delta / w`` must be 0 or 1. One
    logit without a bias: ``u = W x`` solves ``W . dW = w u (sigmoid(u + c) - y)``, at most two roots for each y.
    Several logits without a bias: p is searched.

    Parameters
    ----------
    head : Head
        The last layer.

    Returns
    -------
    list of HeadSeparation
        With a bias one reading, or none if the gradient is not that of one sample with a label of 0 or 1. Without a
        bias up to four for one logit: try each, the gradient match of the whole model decides. ``labels`` are the
        targets (1, n).

    Notes
    -----
    Without bias and offset, ``(x, y)`` and ``(-x, 1 - y)`` have the same gradient: both are returned. One logit without
    a bias has no equation left over: almost every batch has such a reading. An unknown scale takes one more.

    References
    ----------
    R-GAP (Zhu and Blaschko, ICLR 2021), section 3: the scalar equation of a logistic head.
    """
    n, dw, wt = head.n_classes, head.grad_weight, head.weight
    w = 1.0 / n if head.loss.reduction == "mean" else 1.0
    w = w if head.scale is None else w * head.scale
    if head.grad_bias is not None:
        readings = [_reading(head, dw.mT @ head.grad_bias / head.grad_bias.square().sum(), head.grad_bias, w)]
    elif head.scale is None:
        return []
    elif n == 1:
        readings = [
            _reading(head, dw[0] / delta, delta[None], w)
            for delta in _deltas_of_one_logit((wt * dw).sum() / w, head.bias[0], w)
        ]
    else:
        u, s, vh = torch.linalg.svd(dw, full_matrices=False)
        readings = [
            _reading(head, p * s[0] * vh[0], u[:, 0] / p, w)
            for p in _scales(u[:, 0] / w, s[0] * (wt @ vh[0]), head.bias)
        ]
    return [r for r in readings if r is not None]


def _reading(head: Head, x: Tensor, delta: Tensor, w: float) -> HeadSeparation | None:
    """The sample with the labels nearest to its equations; None where they contradict it."""
    logits = head.logits(x)
    sigmoid = torch.sigmoid(logits)
    labels = (sigmoid - delta / w > 0.5).to(delta)
    scale = 1.0 if head.scale is None else head.scale
    if head.scale is None:  # delta < 0 exactly where y = 1
        labels = (delta < 0).to(delta)
        pull = sigmoid - labels
        scale = float(pull @ delta / (pull @ pull)) / w
        w = w * scale
    gap = w * (sigmoid - labels) - delta
    mixed = (head.grad_weight - torch.outer(delta, x)).norm()
    # the client's sigmoid is rounded relatively, and absolutely where 1 was subtracted
    unit = head.rounding * (abs(w) * (sigmoid * (1 + logits.abs().max()) + labels) + delta.abs())
    rounded = head.rounding * head.grad_weight.norm()
    safety = SAFETY
    if head.sigma_weight is not None:
        sigma = head.sigma_weight.square().mean().sqrt()
        slope = abs(w) * sigmoid * (1 - sigmoid) * head.weight.norm(dim=1)
        unit = unit + sigma * slope / delta.norm() + (0.0 if head.sigma_bias is None else head.sigma_bias)
        rounded = rounded + sigma * head.grad_weight.numel() ** 0.5
        safety = STATED_SAFETY
    if not bool((gap.abs() <= safety * unit).all() & (mixed <= safety * rounded)):
        return None
    # every logit says 0 or 1; without a bias one of them gives p, an unknown scale takes another
    spare = head.n_classes - (not head.has_bias) - (head.scale is None)
    residual = torch.maximum(gap.norm() / delta.norm(), mixed / head.grad_weight.norm())[None]
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    reason = "" if spare > 0 else NOTHING_LEFT
    return HeadSeparation(
        x[None], labels[None], delta[None], residual, 1, one, spare > 0,
        head.mismatch(x[None], delta[None]), 1, reason, spare=spare, scale=scale,
    )  # fmt: skip


def _deltas_of_one_logit(product: Tensor, offset: Tensor, w: float) -> list[Tensor]:
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


def _bisect(rising: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, value: Tensor) -> Tensor:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = rising(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _scales(u: Tensor, slope: Tensor, offset: Tensor) -> list[Tensor]:
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

"""Heads that are not a softmax: logistic (one or several logits) and regression with the squared error.

One sample's gradient is ``dW = delta x^T``, ``db = delta``. With a bias ``delta`` is known; without one,
``x = p v`` and ``delta = u / p`` leave one number p, and the loss gives the equation for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.errors import require
from rconv_fast.head import check_head_gradients, rounding_of

# A residual is accepted up to this factor above the rounding of the gradients.
_SAFETY = 1e3
# Points per sign of the search for p where several logits share one sample.
_GRID = 4096
_BISECTIONS = 200
_STARTS = 24


@dataclass(frozen=True)
class HeadReading:
    """One batch that a head's gradient allows.

    Attributes
    ----------
    inputs : Tensor, shape (B, d)
        Input features of the head.
    targets : Tensor, shape (B, n)
        Labels (0 or 1) of a logistic head, target values of a regression.
    grad_logits : Tensor, shape (B, n)
        ``dL/dlogits``, including the mean's factor.
    residual : float
        Relative violation of the equations that the reading was not solved from; 0 where there are none, so
        that only a gradient match of the whole model can tell readings apart.
    """

    inputs: Tensor
    targets: Tensor
    grad_logits: Tensor
    residual: float


def separate_logistic_head(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reduction: str = "mean",
) -> list[HeadReading]:
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
    list of HeadReading
        With a bias one reading, or none if the gradient is not that of one sample with a label of 0 or 1. Without a
        bias up to four for one logit: try each, the gradient match of the whole model decides. In the dtype of
        `grad_weight`.

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
    _check(function, grad_weight, grad_bias, weight, bias, reduction)
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
    readings = [r for r in readings if r.residual <= tolerance * max(1.0, float(w / r.grad_logits.abs().max()))]
    return [_cast(r, grad_weight.dtype) for r in readings]


def _logistic_reading(
    grad_weight: Tensor, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, w: float
) -> HeadReading:
    sigmoid = torch.sigmoid(weight @ x + bias)
    labels = (sigmoid - delta / w).round().clamp(0, 1)
    gap = (w * (sigmoid - labels) - delta).norm() / delta.norm()
    mixed = (grad_weight - torch.outer(delta, x)).norm() / grad_weight.norm()
    return HeadReading(x[None], labels[None], delta[None], float(torch.maximum(gap, mixed)))


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


def separate_mse_head(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Tensor | None = None,
    reduction: str = "mean",
    seed: int = 0,
) -> list[HeadReading]:
    """Recover the batch of a regression head trained with the squared error.

    ``delta_b = w (W x_b + c - t_b)`` with ``w = 2 / (B n)`` (mean over all elements) or 2 (sum). One sample with a
    bias: ``delta = db``, ``x = dW^T db / |db|^2``, and the target ``t = W x + c - delta / w`` comes out too. Given
    targets: ``x_b = V S p_b`` and ``sum_b delta_b p_b^T = U``, solved for all ``p_b`` by Levenberg-Marquardt.

    Parameters
    ----------
    grad_weight : Tensor, shape (n, d)
        Gradient of the head's weight.
    grad_bias : Tensor, shape (n,), or None
        Gradient of its bias.
    weight, bias : Tensor
        The head's parameters; `bias` may be None.
    targets : Tensor, shape (B, n), optional
        The targets, if they are known: needed without a bias, and for more than one sample.
    reduction : {"mean", "sum"}
        Of the loss.
    seed : int
        Seed of the starting points.

    Returns
    -------
    list of HeadReading
        Readings that satisfy all equations; empty when none was found. The rows follow the given targets.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape, type or value is wrong; if there is neither a bias gradient nor targets (then x is determined
        up to a factor only); if the batch is larger than n.

    Notes
    -----
    Without targets, a batch of several samples passes for one only if its gradient has rank 1; else the list is empty.
    The reading of one sample without targets has no equation left over: ``residual`` is the distance to rank 1.
    """
    function = "separate_mse_head"
    _check(function, grad_weight, grad_bias, weight, bias, reduction)
    n = grad_weight.shape[0]
    dw, wt = grad_weight.detach().double(), weight.detach().double()
    c = wt.new_zeros(n) if bias is None else bias.detach().double()
    tolerance = _SAFETY * rounding_of(grad_weight, grad_bias)
    if targets is None:
        got = "neither: the input is determined up to a factor only"
        require(grad_bias is not None, function, "targets", "be given where there is no bias gradient", got)
        assert grad_bias is not None
        delta = grad_bias.detach().double()
        require(bool(delta.any()), function, "grad_bias", "not be zero", "a zero gradient")
        x = dw.mT @ delta / (delta @ delta)
        mixed = float((dw - torch.outer(delta, x)).norm() / dw.norm())
        w = 2.0 / n if reduction == "mean" else 2.0
        reading = HeadReading(x[None], (wt @ x + c - delta / w)[None], delta[None], mixed)
        return [_cast(reading, grad_weight.dtype)] if mixed <= tolerance else []
    t = targets.detach().to(dw).reshape(-1, n)
    b = t.shape[0]
    require(1 <= b <= n, function, "targets", f"hold 1 to {n} samples", b)
    w = 2.0 / (b * n) if reduction == "mean" else 2.0
    db = None if grad_bias is None else grad_bias.detach().double()
    found = _solve_mse(dw, db, wt, c, t, w, torch.Generator().manual_seed(seed))
    return [_cast(r, grad_weight.dtype) for r in found if r.residual <= tolerance]


def _solve_mse(
    grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor, bias: Tensor, targets: Tensor, w: float,
    generator: torch.Generator,
) -> list[HeadReading]:  # fmt: skip
    """Levenberg-Marquardt on P for ``D P = U``, ``D 1 = db`` with ``D = w (W V S P^T + c - T^T)``."""
    b = targets.shape[0]
    u, s, vh = torch.linalg.svd(grad_weight, full_matrices=False)
    u, s, vh = u[:, :b], s[:b], vh[:b]
    if bool(s[-1] <= s[0] * 1e-14):
        return []
    slope = weight @ (vh.mT * s)
    unit = slope.norm() / b**0.5  # measure p in outputs
    slope, s = slope / unit, s / unit
    weights = u * unit

    system = _MseSystem(slope, bias[:, None] - targets.mT, weights, w, grad_bias, float(unit))
    first = torch.linalg.lstsq(w * system.offset, weights).solution
    noise = torch.randn(_STARTS, b, b, generator=generator, dtype=torch.float64).to(s.device)
    size = targets.abs().max().clamp_min(1.0) * 4.0 ** (torch.arange(_STARTS, device=s.device) % 5 - 2.0)
    near = torch.arange(_STARTS, device=s.device)[:, None, None] < 4
    start = torch.where(near, first + noise * 0.1 * first.norm(), noise * size[:, None, None])
    start[0] = first
    found: list[HeadReading] = []
    for p in system.minimise(start):
        x = (p * s) @ vh
        delta = w * (x @ weight.mT + bias - targets)
        left = (grad_weight - delta.mT @ x).norm() / grad_weight.norm()
        if grad_bias is not None:
            left = torch.maximum(left, (grad_bias - delta.sum(0)).norm() / grad_bias.norm())
        new = all(float((x - f.inputs).norm() / x.norm()) > 1e-6 for f in found)
        if float(left) < 1e-3 and new:
            found.append(HeadReading(x, targets, delta, float(left)))
    return sorted(found, key=lambda r: r.residual)


@dataclass(frozen=True)
class _MseSystem:
    """``R(P) = [D P - U, (D 1 - db) f]`` with ``D = w (M P^T + offset)``, for many P of shape (B, B) at once."""

    slope: Tensor  # [n, B]: M
    offset: Tensor  # [n, B]: c - T^T
    weights: Tensor  # [n, B]: U
    w: float
    grad_bias: Tensor | None
    unit: float

    def residual(self, p: Tensor) -> Tensor:
        delta = self.w * (self.slope @ p.mT + self.offset)  # [m, n, B]
        parts = [(delta @ p - self.weights).flatten(1)]
        if self.grad_bias is not None:
            parts.append((delta.sum(2) - self.grad_bias) * self._bias_factor())
        return torch.cat(parts, 1)

    def jacobian(self, p: Tensor) -> Tensor:
        """``dR_jc / dP_bk = w M_jk P_bc + D_jb [c = k]`` and ``w M_jk f``, shape (m, equations, B^2)."""
        m, b, _ = p.shape
        delta = self.w * (self.slope @ p.mT + self.offset)
        eye = torch.eye(b, dtype=p.dtype, device=p.device)
        first = self.w * torch.einsum("jk,mbc->mjcbk", self.slope, p) + torch.einsum("mjb,ck->mjcbk", delta, eye)
        parts = [first.reshape(m, -1, b * b)]
        if self.grad_bias is not None:
            row = self.w * self._bias_factor() * self.slope[None, :, None, :].expand(m, -1, b, -1)
            parts.append(row.reshape(m, -1, b * b))
        return torch.cat(parts, 1)

    def _bias_factor(self) -> float:
        assert self.grad_bias is not None
        return self.unit / max(float(self.grad_bias.norm()), 1e-300)

    def minimise(self, p: Tensor, iterations: int = 80) -> Tensor:
        """Levenberg-Marquardt from every start."""
        r = self.residual(p)
        damping = torch.full_like(r[:, 0], 1e-2)
        for _ in range(iterations):
            jacobian = self.jacobian(p)
            normal = jacobian.mT @ jacobian
            diagonal = normal.diagonal(dim1=1, dim2=2)
            diagonal += (damping * diagonal.mean(1) + 1e-300)[:, None]
            factor, info = torch.linalg.cholesky_ex(normal)
            step = torch.cholesky_solve(jacobian.mT @ r[:, :, None], factor).reshape(p.shape)
            trial = p - step
            new = self.residual(trial)
            better = (info == 0) & (new.norm(dim=1) < r.norm(dim=1))
            p = torch.where(better[:, None, None], trial, p)
            r = torch.where(better[:, None], new, r)
            damping = (damping * torch.where(better, 0.2, 4.0)).clamp(1e-15, 1e8)
        return p


def _check(
    function: str,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reduction: str,
) -> None:
    check_head_gradients(function, grad_weight, grad_bias, weight)
    shape = (grad_weight.shape[0],)
    require(bias is None or tuple(bias.shape) == shape, function, "bias", f"have shape {shape}",
            None if bias is None else tuple(bias.shape))  # fmt: skip
    require(grad_bias is None or bias is not None, function, "bias", "be given with grad_bias", None)
    require(reduction in ("mean", "sum"), function, "reduction", "be 'mean' or 'sum'", repr(reduction))


def _cast(reading: HeadReading, dtype: torch.dtype) -> HeadReading:
    return HeadReading(
        reading.inputs.to(dtype), reading.targets.to(dtype), reading.grad_logits.to(dtype), reading.residual
    )

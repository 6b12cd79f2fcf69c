"""The samples that fit a head's gradient best in units of its noise, and how far each of them may be off.

Gauss-Newton on ``M = [dW, db] = sum_b delta_b (x_b, 1)^T`` with ``delta_b = w_b (softmax(W x_b + c) - t_b)``. The
noise of M is taken as ``sigma_ij = s_i t_j``, exact for a constant one and for one in proportion to a single sample's
gradient; everything below is in units of it: ``M / (s t^T)``, ``delta / s``, ``x / t``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.heads.head import Head

# A step is halved so often before it is given up; the steps; the least relative gain that is worth another one.
_HALVINGS = 6
_STEPS = 10
_GAIN = 1e-4
# Unknowns of the dense normal matrix.
_MAX_UNKNOWNS = 4096
# And where only the errors are wanted, beside a search that took milliseconds.
_MAX_UNKNOWNS_ERRORS = 512
# Where the stated noise of an entry is less than this share of its tensor's, rounding elsewhere rules.
_LEAST_SIGMA = 1e-2
# Features that may be further off than this are not called found: where nothing but rounding was said of, and where the
# noise was stated, so that the error is expected.
_COMPLETE = 3e-4
_NOISY_COMPLETE = 0.05


@dataclass(frozen=True)
class Refined:
    """The best fit.

    Attributes
    ----------
    x : Tensor, shape (m, d)
        Features.
    delta : Tensor, shape (m, n)
        Gradients of the logits.
    errors : Tensor or None
        Predicted relative error of each sample's features (m,); None where there are too many unknowns for it.
    factor : float
        By how much the given weights are to be multiplied, where the scale is open.
    chi2, freedom : float
        Sum of squares in units of the noise, and what is expected of it.
    """

    x: Tensor
    delta: Tensor
    errors: Tensor | None
    factor: float
    chi2: float
    freedom: float

    @property
    def misfit(self) -> str:
        """How it does not fit, in words; empty where it does."""
        return "" if self.fits else f"the mismatch is {(self.chi2 / self.freedom) ** 0.5:.2g} times the stated noise"

    @property
    def fits(self) -> bool:
        """Whether the mismatch is noise: six standard deviations, and half as much again for the noise's own error."""
        return self.chi2 <= self.freedom * (1.5 + 6 * math.sqrt(2 / self.freedom))


def complete_limit(head: Head) -> float:
    """Predicted relative error of the features up to which a separation counts as complete."""
    return _NOISY_COMPLETE if head.noisy else _COMPLETE


def refine(
    head: Head, sigma: tuple[Tensor, Tensor | None], x: Tensor, target: Tensor, weight: Tensor, steps: int = _STEPS
) -> Refined:
    """Improve separated samples.

    Parameters
    ----------
    head : Head
        The layer; with its ``scale`` None a common factor of the weights is found too.
    sigma : tuple of Tensor
        Standard deviation of the entries of ``dW`` and ``db``.
    x : Tensor, shape (m, d)
        Features to start from.
    target, weight : Tensor, shapes (m, n) and (m,)
        Targets and weights of the samples in the gradient.
    steps : int
        At most; 0 for the errors alone.
    """
    fit = _Fit.create(head, sigma, target, weight)
    point = fit.at(x / fit.t[: x.shape[1]], 1.0)
    small = fit.unknowns(point) <= (_MAX_UNKNOWNS if steps else _MAX_UNKNOWNS_ERRORS)
    for _ in range(steps if small else 0):
        step = fit.step(point)
        better = fit.search(point, *step)
        if better is None:
            break
        gain, point = 1 - better.chi2 / point.chi2, better
        if gain < _GAIN:
            break
    errors = fit.errors(point) if small else None
    freedom = max(1.0, float(fit.matrix.numel() - point.x.numel()))
    return Refined(point.x * fit.t[: x.shape[1]], point.delta * fit.s, errors, point.factor, point.chi2, freedom)


@dataclass(frozen=True)
class _Point:
    """A candidate: whitened features (m, d) and deltas (m, n), the softmax, the residual (n, D)."""

    x: Tensor
    extended: Tensor  # [m, D]: with the constant feature of the bias
    factor: float
    softmax: Tensor
    delta: Tensor
    residual: Tensor
    chi2: float


@dataclass(frozen=True)
class _Fit:
    """The whitened problem."""

    matrix: Tensor  # [n, D]
    s: Tensor  # [n]
    t: Tensor  # [D]
    weight: Tensor  # [n, d]: W t
    bias: Tensor
    target: Tensor
    weights: Tensor
    free_scale: bool
    span: Tensor  # [d, n]: orthonormal basis of the rows of `weight`; all of space where that is not much less

    @classmethod
    def create(cls, head: Head, sigma: tuple[Tensor, Tensor | None], target: Tensor, weights: Tensor) -> _Fit:
        matrix, spread = head.grad_weight, sigma[0].expand_as(head.grad_weight)
        if head.grad_bias is not None:
            last = spread.mean() if sigma[1] is None else sigma[1]
            matrix = torch.cat([matrix, head.grad_bias[:, None]], 1)
            spread = torch.cat([spread, last.expand_as(head.grad_bias)[:, None]], 1)
        level = spread.square().mean(0).sqrt()
        t = level.clamp_min(_LEAST_SIGMA * float(level.square().mean().sqrt()))
        rows = (spread / t).square().mean(1).sqrt()
        s = rows.clamp_min(_LEAST_SIGMA * float(rows.square().mean().sqrt()))
        d = head.weight.shape[1]
        weight = head.weight * t[:d]
        if len(weight) + len(target) < d:
            span = torch.linalg.qr(weight.mT).Q
        else:
            span = torch.eye(d, dtype=t.dtype, device=t.device)
        return cls(matrix / s[:, None] / t, s, t, weight, head.bias, target, weights, head.scale is None, span)

    def at(self, x: Tensor, factor: float) -> _Point:
        softmax = torch.softmax(x @ self.weight.mT + self.bias, 1)
        delta = factor * self.weights[:, None] * (softmax - self.target) / self.s
        constant = (1 / self.t[x.shape[1] :]).expand(len(x), -1)
        extended = torch.cat([x, constant], 1)
        residual = self.matrix - delta.mT @ extended
        return _Point(x, extended, factor, softmax, delta, residual, float(residual.square().sum()))

    def unknowns(self, point: _Point) -> int:
        """Of the dense part: features outside the span of W and x enter through delta alone."""
        m, d = point.x.shape
        return m * min(d, len(self.weight) + m)

    def search(self, point: _Point, dx: Tensor, factor: float) -> _Point | None:
        """The longest of a step and its halves that lowers chi^2."""
        for halving in range(_HALVINGS):
            share = 0.5**halving
            trial = self.at(point.x + share * dx, point.factor * (1 + share * factor))
            if trial.chi2 < point.chi2:
                return trial
        return None

    def step(self, point: _Point) -> tuple[Tensor, float]:
        """The Gauss-Newton step of the features, and of the factor."""
        basis, jacobian, factor = self._normal(point)
        m, d = point.x.shape
        slope = self._pull(point, jacobian, basis, point.residual)
        if self.free_scale:
            slope = torch.cat([slope.flatten(), self._scale_pull(point, point.residual)[None]])
        solved = torch.cholesky_solve(slope.reshape(-1, 1), factor)[:, 0]
        inside = solved[: m * basis.shape[1]].reshape(m, -1) @ basis.mT
        outside = point.residual[:, :d] - point.residual[:, :d] @ basis @ basis.mT
        gram = point.delta @ point.delta.mT
        inside = inside + torch.linalg.pinv(gram, hermitian=True) @ point.delta @ outside
        return inside, float(solved[-1]) if self.free_scale else 0.0

    def errors(self, point: _Point) -> Tensor:
        """``sqrt(tr cov(x_b)) / |x_b|`` in the features' own units: the Cramer-Rao bound of this gradient alone.

        Infinite where the gradient leaves a direction open: its normal matrix has no Cholesky factor.
        """
        basis, _, factor = self._normal(point)
        if not bool((factor.diagonal() > 0).all()):
            return point.x.new_full((len(point.x),), math.inf)
        m, d = point.x.shape
        k = basis.shape[1]
        covariance = torch.cholesky_inverse(factor)[: m * k, : m * k].reshape(m, k, m, k)
        t2 = self.t[:d].square()
        metric = basis.mT @ (t2[:, None] * basis)
        inside = (covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1) * metric).sum((1, 2))
        gram = torch.linalg.pinv(point.delta @ point.delta.mT, hermitian=True).diagonal()
        outside = gram * (t2.sum() - metric.diagonal().sum()).clamp_min(0)
        errors: Tensor = (inside + outside).clamp_min(0).sqrt() / (point.x * self.t[:d]).norm(dim=1)
        return errors

    def _normal(self, point: _Point) -> tuple[Tensor, Tensor, Tensor]:
        """A basis Q of the span of W and x, the Jacobians ``A_b Q`` of the deltas, and the Cholesky factor of J^T J.

        ``J_b u = (A_b u) x_b^T + delta_b u^T``, and all inner products of two such matrices.
        """
        m, d = point.x.shape
        n = len(self.weight)
        basis = self.span
        if n + m < d:
            own = point.x - point.x @ basis @ basis.mT
            basis = torch.cat([basis, torch.linalg.qr(own.mT).Q], 1)
        slope = self.weight @ basis
        p = point.softmax
        jacobian = p[:, :, None] * (slope - (p @ slope)[:, None])
        jacobian = jacobian * (point.factor * self.weights[:, None] / self.s)[:, :, None]
        k = basis.shape[1]
        x = point.x @ basis
        flat = jacobian.permute(1, 0, 2).reshape(n, m * k)
        normal = (flat.mT @ flat).reshape(m, k, m, k) * (point.extended @ point.extended.mT)[:, None, :, None]
        cross = (flat.mT @ point.delta.mT).reshape(m, k, m)  # A_b^T delta_c
        mixed = cross[:, :, :, None] * x[:, None, None, :]
        normal += mixed + mixed.permute(2, 3, 0, 1)
        normal += (point.delta @ point.delta.mT)[:, None, :, None] * torch.eye(k, dtype=x.dtype, device=x.device)[
            :, None
        ]
        matrix = normal.reshape(m * k, m * k)
        if self.free_scale:
            predicted = point.delta.mT @ point.extended
            column = self._pull(point, jacobian, basis, predicted).reshape(-1, 1)
            corner = predicted.square().sum().reshape(1, 1)
            matrix = torch.cat([torch.cat([matrix, column], 1), torch.cat([column.mT, corner], 1)])
        matrix.diagonal().mul_(1 + 1e-12)
        return basis, jacobian, torch.linalg.cholesky_ex(matrix).L

    def _pull(self, point: _Point, jacobian: Tensor, basis: Tensor, matrix: Tensor) -> Tensor:
        """``J_b^T R = A_b^T R x_b + R^T delta_b`` in the basis, (m, k)."""
        d = point.x.shape[1]
        through = ((matrix @ point.extended.mT).mT[:, None] @ jacobian)[:, 0]
        return through + point.delta @ matrix[:, :d] @ basis

    def _scale_pull(self, point: _Point, matrix: Tensor) -> Tensor:
        return ((point.delta.mT @ point.extended) * matrix).sum()

"""The regression head of the squared error: one sample with its target, or a batch whose targets are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.levenberg_marquardt import State, damped_step, minimise
from rconv_fast.heads.other_loss import other_loss
from rconv_fast.heads.problem import STATED_SAFETY
from rconv_fast.heads.separation import NOTHING_LEFT, HeadSeparation

# A residual is accepted up to this factor above the rounding of the gradients.
_SAFETY = 1e3
# Starting points, and the steps from each.
_STARTS = 24
_ITERATIONS = 80


def mse_readings(head: Head, targets: Tensor | None = None, seed: int = 0) -> list[HeadSeparation]:
    """The batch of a regression head trained with the squared error.

    ``delta_b = w (W x_b + c - t_b)`` with ``w = 2 s / (B n)`` (mean over all elements) or 2 s (sum) and the scale s.
    One sample with a bias: ``delta = db``, ``x = dW^T db / |db|^2``, and the target ``t = W x + c - delta / w`` comes
    out too. Given targets: ``x_b = V S p_b`` and ``sum_b delta_b p_b^T = U``, solved for all ``p_b``.

    Parameters
    ----------
    head : Head
        The last layer.
    targets : Tensor, shape (B, n), optional
        The targets, if they are known: needed without a bias, and for more than one sample.
    seed : int
        Of the starting points.

    Returns
    -------
    list of HeadSeparation
        Readings that satisfy all equations; empty when none was found. The rows follow the given targets, which are
        ``labels``.

    Notes
    -----
    Without targets, a batch of several samples passes for one only if its gradient has rank 1: always where there is
    one output, whose reading leaves no equation over. An unknown scale makes the target unknown up to a factor.
    """
    scale = 1.0 if head.scale is None else head.scale
    if targets is None:
        return _one_sample(head, scale)
    if head.scale is None or not 1 <= len(targets) <= head.n_classes:
        return []
    w = scale * (2.0 / targets.numel() if head.loss.reduction == "mean" else 2.0)
    tolerance = _tolerance(head)
    found = _solve(head, targets.to(head.weight), w, torch.Generator().manual_seed(seed))
    return [r for r in found if r.head_residual <= tolerance]


def _tolerance(head: Head) -> float:
    """Relative mismatch that the noise explains."""
    if head.sigma_weight is None:
        return _SAFETY * head.rounding
    return STATED_SAFETY * float(head.sigma_weight.square().mean().sqrt() / head.grad_weight.square().mean().sqrt())


def _one_sample(head: Head, scale: float) -> list[HeadSeparation]:
    """``x = dW^T db / |db|^2``; none at another rank, or without a bias gradient: x is then known up to a factor."""
    n, delta = head.n_classes, head.grad_bias
    if delta is None or not bool(delta.any()):
        return []
    x = head.grad_weight.mT @ delta / (delta @ delta)
    mixed = head.mismatch(x[None], delta[None])
    w = scale * (2.0 / n if head.loss.reduction == "mean" else 2.0)
    reading = _reading(x[None], (head.logits(x) - delta / w)[None], delta[None], mixed, spare=n - 1)
    if mixed > _tolerance(head):
        return []
    other = other_loss(head.logits(x[None]), delta[None] / scale, head.rounding)
    if other is not None:  # free targets explain any gradient; a class explains no other one
        reason = f"{other} explains this gradient with no free target: pass that loss"
        reading = replace(reading, complete=False, reason=reason)
    return [replace(reading, scale=scale)]


def _reading(x: Tensor, targets: Tensor, delta: Tensor, mismatch: float, spare: int) -> HeadSeparation:
    b = len(x)
    ones = torch.ones(b, dtype=torch.int64, device=x.device)
    residuals = x.new_full((b,), mismatch)
    reason = "" if spare > 0 else NOTHING_LEFT
    return HeadSeparation(x, targets, delta, residuals, b, ones, spare > 0, mismatch, b, reason, spare=spare)


def _solve(head: Head, targets: Tensor, w: float, generator: torch.Generator) -> list[HeadSeparation]:
    """Levenberg-Marquardt on P for ``D P = U``, ``D 1 = db`` with ``D = w (W V S P^T + c - T^T)``."""
    b = len(targets)
    u, s, vh = torch.linalg.svd(head.grad_weight, full_matrices=False)
    if b > len(s) or bool(s[b - 1] <= s[0] * 1e-14):
        return []
    u, s, vh = u[:, :b], s[:b], vh[:b]
    slope = head.weight @ (vh.mT * s)
    unit = slope.norm() / b**0.5  # measure p in outputs
    slope, s = slope / unit, s / unit
    weights = u * unit
    problems = _MseProblems(slope, head.bias[:, None] - targets.mT, weights, w, head.grad_bias, float(unit))
    first = torch.linalg.lstsq(w * problems.offset, weights).solution
    noise = torch.randn(_STARTS, b, b, generator=generator, dtype=torch.float64).to(s.device)
    size = targets.abs().max().clamp_min(1.0) * 4.0 ** (torch.arange(_STARTS, device=s.device) % 5 - 2.0)
    near = torch.arange(_STARTS, device=s.device)[:, None, None] < 4
    start = torch.where(near, first + noise * 0.1 * first.norm(), noise * size[:, None, None])
    start[0] = first
    spare = b * (len(u) - b) + (len(u) if head.has_bias else 0)
    found: list[HeadSeparation] = []
    for p in minimise(problems, start, iterations=_ITERATIONS, tolerance=0.0, budget=head.budget):
        x = (p * s) @ vh
        delta = w * (head.logits(x) - targets)
        left = head.mismatch(x, delta)
        new = all(float((x - f.inputs).norm() / x.norm()) > 1e-6 for f in found)
        if left < 1e-3 and new:
            found.append(_reading(x, targets, delta, left, spare))
    return sorted(found, key=lambda r: r.head_residual)


@dataclass
class _State(State):
    delta: Tensor  # [m, n, B]
    residual: Tensor  # [m, equations]


@dataclass(frozen=True)
class _MseProblems:
    """``R(P) = [D P - U, (D 1 - db) f]`` with ``D = w (M P^T + offset)``, for many P of shape (B, B) at once."""

    slope: Tensor  # [n, B]: M
    offset: Tensor  # [n, B]: c - T^T
    weights: Tensor  # [n, B]: U
    w: float
    grad_bias: Tensor | None
    unit: float

    def take(self, index: Tensor) -> _MseProblems:  # noqa: ARG002 (all starts share one problem)
        """The same: every start solves the same equations."""
        return self

    def evaluate(self, z: Tensor) -> _State:
        """Residuals at P = z."""
        delta = self.w * (self.slope @ z.mT + self.offset)
        parts = [(delta @ z - self.weights).flatten(1)]
        if self.grad_bias is not None:
            parts.append((delta.sum(2) - self.grad_bias) * self._bias_factor())
        residual = torch.cat(parts, 1)
        return _State(z, residual.square().sum(1), delta, residual)

    def step(self, state: _State, damping: Tensor) -> Tensor:
        """``dR_jc / dP_bk = w M_jk P_bc + D_jb [c = k]`` and ``w M_jk f``."""
        p, delta = state.z, state.delta
        m, b, _ = p.shape
        eye = torch.eye(b, dtype=p.dtype, device=p.device)
        first = self.w * torch.einsum("jk,mbc->mjcbk", self.slope, p) + torch.einsum("mjb,ck->mjcbk", delta, eye)
        parts = [first.reshape(m, -1, b * b)]
        if self.grad_bias is not None:
            row = self.w * self._bias_factor() * self.slope[None, :, None, :].expand(m, -1, b, -1)
            parts.append(row.reshape(m, -1, b * b))
        jacobian = torch.cat(parts, 1)
        slope = (state.residual[:, None] @ jacobian)[:, 0]
        return damped_step(jacobian.mT @ jacobian, slope, damping).reshape(p.shape)

    def _bias_factor(self) -> float:
        assert self.grad_bias is not None
        return self.unit / max(float(self.grad_bias.norm()), 1e-300)

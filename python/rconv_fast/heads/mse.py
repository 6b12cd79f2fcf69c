"""The regression head of the squared error: one sample with its target, or a batch whose targets are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import require
from rconv_fast.heads.levenberg_marquardt import State, damped_step, minimise
from rconv_fast.heads.separation import HeadSeparation, check_head, rounding_of

# A residual is accepted up to this factor above the rounding of the gradients.
_SAFETY = 1e3
# Starting points, and the steps from each.
_STARTS = 24
_ITERATIONS = 80


def separate_mse_head(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Tensor | None = None,
    reduction: str = "mean",
    seed: int = 0,
    budget: Budget = Budget(),  # noqa: B008 (frozen)
) -> list[HeadSeparation]:
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
    budget : Budget
        When it is over, the search from further starts ends.

    Returns
    -------
    list of HeadSeparation
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
    check_head(function, grad_weight, grad_bias, weight, bias, reduction)
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
        reading = _reading(x[None], (wt @ x + c - delta / w)[None], delta[None], mixed, spare=n - 1)
        return [reading.to(grad_weight.dtype)] if mixed <= tolerance else []
    t = targets.detach().to(dw).reshape(-1, n)
    b = t.shape[0]
    require(1 <= b <= n, function, "targets", f"hold 1 to {n} samples", b)
    w = 2.0 / (b * n) if reduction == "mean" else 2.0
    db = None if grad_bias is None else grad_bias.detach().double()
    found = _solve_mse(dw, db, wt, c, t, w, torch.Generator().manual_seed(seed), budget)
    return [r.to(grad_weight.dtype) for r in found if r.head_residual <= tolerance]


def _reading(x: Tensor, targets: Tensor, delta: Tensor, mismatch: float, spare: int) -> HeadSeparation:
    b = len(x)
    ones = torch.ones(b, dtype=torch.int64, device=x.device)
    residuals = x.new_full((b,), mismatch)
    return HeadSeparation(x, targets, delta, residuals, b, ones, spare > 0, mismatch, b, spare=spare)


def _solve_mse(
    grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor, bias: Tensor, targets: Tensor, w: float,
    generator: torch.Generator, budget: Budget,
) -> list[HeadSeparation]:  # fmt: skip
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

    problems = _MseProblems(slope, bias[:, None] - targets.mT, weights, w, grad_bias, float(unit))
    first = torch.linalg.lstsq(w * problems.offset, weights).solution
    noise = torch.randn(_STARTS, b, b, generator=generator, dtype=torch.float64).to(s.device)
    size = targets.abs().max().clamp_min(1.0) * 4.0 ** (torch.arange(_STARTS, device=s.device) % 5 - 2.0)
    near = torch.arange(_STARTS, device=s.device)[:, None, None] < 4
    start = torch.where(near, first + noise * 0.1 * first.norm(), noise * size[:, None, None])
    start[0] = first
    found: list[HeadSeparation] = []
    spare = b * (len(u) - b) + (0 if grad_bias is None else len(u))
    for p in minimise(problems, start, iterations=_ITERATIONS, tolerance=0.0, budget=budget):
        x = (p * s) @ vh
        delta = w * (x @ weight.mT + bias - targets)
        left = (grad_weight - delta.mT @ x).norm() / grad_weight.norm()
        if grad_bias is not None:
            left = torch.maximum(left, (grad_bias - delta.sum(0)).norm() / grad_bias.norm())
        new = all(float((x - f.inputs).norm() / x.norm()) > 1e-6 for f in found)
        if float(left) < 1e-3 and new:
            found.append(_reading(x, targets, delta, float(left), spare))
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

"""The Cramer-Rao bound: how well anyone can know the inputs from gradients with this noise; no attack needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rconv_fast.errors import require
from rconv_fast.estimate.fisher import dense_fisher, has_structure
from rconv_fast.estimate.gauss_newton import solve_normal
from rconv_fast.estimate.gradient_map import GradientMap, Linearisation
from rconv_fast.estimate.information import Information
from rconv_fast.estimate.noise_model import noise_of
from rconv_fast.losses import Loss
from rconv_fast.observation import Noise
from rconv_fast.wrappers import working_copy

# The information matrix is formed and inverted up to this many input values (3072: 32 x 32 x 3).
DENSE_UP_TO = 3072
# Samples and iterations of the estimate for larger inputs.
SAMPLES, ITERATIONS, TOLERANCE = 16, 500, 1e-3


@dataclass(frozen=True)
class Bound:
    r"""What no unbiased estimate of the inputs can beat.

    Attributes
    ----------
    std : Tensor
        (B, \*input_shape): least standard deviation of each input value, inf where the gradients leave it open.
    mse : float
        Mean of its square.
    psnr : float
        Of an estimate that meets the bound, peak 1, in dB; -inf where a value is open.
    exact : bool
        From the information matrix itself; False: estimated from random solves, `std` to about 20 %.
    """

    std: Tensor
    mse: float
    psnr: float
    exact: bool


def cramer_rao(
    model: nn.Module,
    loss: Loss | str,
    inputs: Tensor,
    targets: Tensor,
    noise: float | Noise,
    *,
    known_scale: bool = True,
) -> Bound:
    r"""Least error of any unbiased estimate of `inputs` from the model's gradients with this noise.

    ``var(x) >= diag F^-1``, ``F = J^T S^-1 J`` with J the Jacobian of all gradients by the input (Cramer and Rao).

    Parameters
    ----------
    model : nn.Module
        In the mode the client used; left untouched.
    loss : Loss or str
        The client's.
    inputs : Tensor, (B, \*input_shape)
        The batch.
    targets : Tensor
        Its labels or targets.
    noise : float or mapping of str to float or Tensor
        Standard deviations: a number relative to each gradient's root mean square, or by parameter name.
    known_scale : bool
        False where an unknown factor multiplies the gradients, as after clipping.

    Returns
    -------
    Bound
        With the ReLUs' sides held, which is the bound for noise that does not flip many of them.

    Raises
    ------
    ArgumentError
        If the noise is negative, or has another shape than its gradient.
    """
    problem, x = problem_of(model, loss, inputs, targets, noise)
    if x.numel() <= DENSE_UP_TO:
        variance = Information.create(_information(problem, x, known_scale), x.shape).variance
        exact = True
    else:
        variance, exact = _sampled_variance(problem.at(x), x), False
    mse = float(variance.mean())
    psnr = -10 * math.log10(mse) if 0 < mse < math.inf else -math.copysign(math.inf, mse - 1)
    return Bound(variance.sqrt(), mse, psnr, exact)


def fisher_matrix(
    model: nn.Module,
    loss: Loss | str,
    inputs: Tensor,
    targets: Tensor,
    noise: float | Noise,
    *,
    known_scale: bool = True,
) -> Tensor:
    """The information ``F = J^T S^-1 J`` (n, n) that gradients with this noise hold of the n input values.

    Parameters
    ----------
    model, loss, inputs, targets, noise, known_scale
        As in `cramer_rao`.

    Returns
    -------
    Tensor, (n, n)
        float64, symmetric, not negative definite.

    Raises
    ------
    ArgumentError
        If the inputs have more values than `DENSE_UP_TO`.
    """
    few = inputs.numel() <= DENSE_UP_TO
    require(few, "fisher_matrix", "inputs", f"have at most {DENSE_UP_TO} values", inputs.numel())
    problem, x = problem_of(model, loss, inputs, targets, noise)
    return _information(problem, x, known_scale)


def _information(problem: GradientMap, x: Tensor, known_scale: bool) -> Tensor:
    fisher = dense_fisher(problem, x)
    return fisher if known_scale else without_scale(fisher, problem.at(x))


def without_scale(fisher: Tensor, at: Linearisation) -> Tensor:
    """The information that is left of x when the common factor is unknown too: ``F - b b^T / t^T t``, ``b = J^T t``."""
    b = at.adjoint(at.scaled).flatten()
    return fisher - torch.outer(b, b) * at.per_scale


def problem_of(
    model: nn.Module, loss: Loss | str, inputs: Tensor, targets: Tensor, noise: float | Noise
) -> tuple[GradientMap, Tensor]:
    """The gradients of the true inputs and their noise, in float64."""
    loss = loss if isinstance(loss, Loss) else Loss(loss)
    work, x = working_copy(model, torch.float64), inputs.detach().double()
    unit = {name: torch.zeros_like(p) for name, p in work.named_parameters()}
    plain = GradientMap(work, loss, targets, unit, {name: torch.ones((), dtype=x.dtype) for name in unit})
    seen = dict(zip(plain.parameters, (g.detach() for g in plain.gradients(x)), strict=True))
    sigma, _ = noise_of(seen, noise, arithmetic=torch.float64)
    return GradientMap.read(work, loss, targets, seen, sigma, x.shape), x


def _sampled_variance(at: Linearisation, x: Tensor) -> Tensor:
    """``diag F^-1`` from perturbed solves: ``u = F^-1 J^T e``, e white, has the covariance ``F^-1``."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return at.adjoint([_normal(part, generator) for part in at.residual])

    diagonal, total = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(SAMPLES):
        diagonal += draw().square() / SAMPLES
    diagonal += 0.05 * diagonal.mean()
    for _ in range(SAMPLES):
        u, _ = solve_normal(at, draw(), lambda v: v / diagonal, TOLERANCE, ITERATIONS)
        total += u.square()
    return total / SAMPLES


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


__all__ = ["Bound", "cramer_rao", "fisher_matrix", "has_structure", "problem_of"]

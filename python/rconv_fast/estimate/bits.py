"""The bits that the noise leaves in doubt: freed, solved for together with the input, and rounded one after the other.

To second order in bits t and input x, with ``J = [J_x J_t]`` and ``F = J_x^T J_x``, eliminating x leaves

    ``chi^2(t) / 2 = t^T S t / 2 - b^T t``,   ``S = J_t^T J_t - J_t^T J_x F^-1 J_x^T J_t``,
    ``b = -(J_t^T r - J_t^T J_x F^-1 J_x^T r)``

for the few bits whose side the estimate and its error bars do not tell. An unknown scale c is eliminated before all: J
and r are taken without their part along ``t = dr/dlog c``, in F too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.estimate.gradient_map import GradientMap, Linearisation, Parts, dot, pushed
from rconv_fast.estimate.information import Information
from rconv_fast.estimate.pieces import Bits, kinked_steps

# Bits whose probability is nearer to 0 and 1 than this are settled; of the others the most doubtful so many are freed.
SETTLED, MOST = 1e-4, 300
# Errors drawn to see how far the input of each activation may be off.
DRAWS = 64
# Products with one bit, or one drawn error, each that are done at once.
TOGETHER = 32
# Least variance of a bit's prior, and how near to 0 or 1 a relaxed bit must come to be fixed at once.
LEAST_VARIANCE, NEAR = 0.04, 0.08


@dataclass(frozen=True)
class Doubt:
    """The bits in doubt: their places among all bits one after the other, and the probability of each to be 1."""

    places: Tensor
    probability: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def put(self, bits: Bits, values: Tensor) -> dict[str, Tensor]:
        """`bits` with these values at the places in doubt."""
        flat = _flat(bits).clone()
        flat[self.places] = values.to(flat)
        parts = flat.split([d.numel() for d in bits.values()])
        return {name: part.reshape(d.shape) for (name, d), part in zip(bits.items(), parts, strict=True)}


def input_deviations(problem: GradientMap, x: Tensor, errors: Tensor) -> dict[str, Tensor]:
    """Standard deviation of each kinked activation's input when x is off by errors like these, (count, *x.shape)."""
    sources = _inputs_of_kinks(problem)
    if not sources:
        return {}

    x = x.detach().requires_grad_()
    with torch.enable_grad():
        values = problem.values(x)
        moved = [pushed([values[source] for source in sources.values()], [x], [e]) for e in errors.split(TOGETHER)]
    tiny = torch.finfo(x.dtype).tiny
    together = [torch.cat(parts) for parts in zip(*moved, strict=True)]
    return {n: z.square().mean(0).sqrt().clamp_min(tiny) for n, z in zip(sources, together, strict=True)}


def contradiction(inputs: Bits, deviations: Bits, bits: Bits) -> tuple[float, int]:
    """How far the bits contradict the signs of their inputs, in squared deviations, and how many do."""
    penalty, count = 0.0, 0
    for name, d in bits.items():
        wrong = (inputs[name] > 0) != (d > 0.5)
        penalty += float((inputs[name] / deviations[name])[wrong].square().sum())
        count += int(wrong.sum())
    return penalty, count


def find_doubt(inputs: Bits, deviations: Bits, bits: Bits, inflate: float, most: int = MOST) -> Doubt:
    """The bits whose sign the deviations (times `inflate`) leave in doubt, and those that contradict it; `most`."""
    if not bits:
        return Doubt(torch.zeros(0, dtype=torch.long), torch.zeros(0))
    score = _flat(inputs) / (_flat(deviations) * inflate)
    probability = torch.special.ndtr(score)
    wrong = (score > 0) != (_flat(bits) > 0.5)
    doubtful = ((probability > SETTLED) & (probability < 1 - SETTLED)) | wrong
    places = doubtful.nonzero().flatten()
    order = torch.argsort(torch.where(wrong, -score.abs(), score.abs())[places])
    places = places[order[:most]]
    return Doubt(places, probability[places])


def settle(
    problem: GradientMap,
    x: Tensor,
    bits: Bits,
    doubt: Doubt,
    information: Information,
    *,
    free_scale: bool = False,
    levels: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bits in doubt set to their most likely values, and x moved along; F is without the scale if that is free.

    The values are multiples of ``1 / levels``.
    """
    start = _flat(bits)[doubt.places].to(x)
    free = {name: d.requires_grad_() for name, d in doubt.put(bits, start).items()}
    at = Linearisation(problem.held(free), x, list(free.values()))
    across, among = _second_derivatives(at, x, free, doubt)
    slope_x, slope = _gradient(at, at.residual, doubt)
    if free_scale:
        along_x, along = _gradient(at, at.scaled, doubt)
        across = across - torch.outer(along, along_x.flatten()) * at.per_scale
        among = among - torch.outer(along, along) * at.per_scale
        share = dot(at.scaled, at.residual) * at.per_scale
        slope_x, slope = slope_x - share * along_x, slope - share * along
    pulled = information.inverse @ across.mT
    quadratic = among - across @ pulled
    offset = across @ information.solve(slope_x).flatten() - slope
    t = _round(quadratic, offset, start, doubt.probability, levels)
    moved = x - information.solve(slope_x) - (pulled @ (t - start)).reshape(x.shape)
    settled = doubt.put(bits, t)
    held = problem.held(settled)
    return (moved if held.chi2(moved) < held.chi2(x) else x), settled


def _gradient(at: Linearisation, u: Parts, doubt: Doubt) -> tuple[Tensor, Tensor]:
    """``J_x^T u`` and ``J_t^T u``."""
    by_x, *by_bits = at.adjoints(u)
    return by_x, torch.cat([part.flatten() for part in by_bits])[doubt.places]


def _second_derivatives(at: Linearisation, x: Tensor, free: Bits, doubt: Doubt) -> tuple[Tensor, Tensor]:
    """``J_t^T J_x`` (k, n) and ``J_t^T J_t`` (k, k)."""
    across, among = [], []
    sizes = [d.numel() for d in free.values()]
    for places in doubt.places.split(TOGETHER):
        units = x.new_zeros(len(places), sum(sizes))
        units[torch.arange(len(places)), places] = 1.0
        parts = [u.reshape(-1, *d.shape) for u, d in zip(units.split(sizes, 1), free.values(), strict=True)]
        by_x, *by_bits = at.adjoints(at.push([x.new_zeros(len(places), *x.shape), *parts]))
        across.append(by_x.flatten(1))
        among.append(torch.cat([part.flatten(1) for part in by_bits], 1)[:, doubt.places])
    square = torch.cat(among)
    return torch.cat(across), (square + square.mT) / 2


def _round(quadratic: Tensor, offset: Tensor, start: Tensor, probability: Tensor, levels: int) -> Tensor:
    """Multiples of ``1 / levels`` with a small ``(t - start)^T S (t - start) / 2 - b^T (t - start)`` and prior.

    Relaxed with a Gaussian prior, the half nearest to such values fixed, solved again; at the end single moves with the
    prior of the bits themselves.
    """
    mean, precision = probability / 2 + 0.25, 1 / (probability * (1 - probability)).clamp_min(LEAST_VARIANCE)
    a = quadratic + torch.diag(precision)
    b = offset + quadratic @ start + precision * mean
    t, is_free = start.clone(), torch.ones_like(start, dtype=torch.bool)
    while bool(is_free.any()):
        fixed, f = ~is_free, is_free.nonzero().flatten()
        relaxed = torch.linalg.solve(a[f][:, f], b[f] - a[f][:, fixed] @ t[fixed])
        rounded = ((relaxed * levels).round() / levels).clamp(0, 1)
        distance = (relaxed - rounded).abs()
        chosen = distance <= max(NEAR / levels, float(distance.median()))
        t[f[chosen]] = rounded[chosen]
        is_free[f[chosen]] = False
    return _flip(quadratic, offset, start, t, probability, levels)


def _flip(quadratic: Tensor, offset: Tensor, start: Tensor, t: Tensor, probability: Tensor, levels: int) -> Tensor:
    """Single moves by ``1 / levels`` while one lowers chi^2 - 2 log prior."""
    p = probability.clamp(1e-6, 1 - 1e-6)
    gain = 2 * (torch.log(p) - torch.log1p(-p))
    moves = torch.tensor([[1.0], [-1.0]]).to(t) / levels
    for _ in range(4 * len(t)):
        slope = 2 * (quadratic @ (t - start) - offset) - gain
        change = slope * moves + quadratic.diagonal() * moves.square()
        outside = (t + moves < -0.5 / levels) | (t + moves > 1 + 0.5 / levels)
        best = divmod(int(change.masked_fill(outside, math.inf).argmin()), len(t))
        if not float(change[best]) < 0:
            break
        t[best[1]] += moves[best[0], 0]
    return t


def _inputs_of_kinks(problem: GradientMap) -> dict[str, str]:
    return {step.name: step.inputs[0] for step in kinked_steps(problem.graph)}


def _flat(parts: Bits) -> Tensor:
    return torch.cat([part.flatten() for part in parts.values()])

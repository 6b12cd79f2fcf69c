"""The joint estimate of an input too large for an information matrix: the same steps, by products alone.

The weights are bounded (`joint.CAPS`): solves then take hundreds of iterations and not many thousands. What the noise
does to the answer, to its misfit and to the sides of its kinks is seen in errors that are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.estimate import bits as bit
from rconv_fast.estimate.gauss_newton import Fit, gauss_newton
from rconv_fast.estimate.gradient_map import GradientMap, Parts
from rconv_fast.estimate.joint import (
    CAPS,
    Estimate,
    entry_count,
    first_bits,
    inflation,
    settled_by,
    under,
)
from rconv_fast.estimate.noise_model import arithmetic_variance, entry_noise
from rconv_fast.estimate.pieces import Bits, same
from rconv_fast.estimate.relaxed import settle
from rconv_fast.estimate.sampled import SampledInformation, rounded
from rconv_fast.observation import Observation
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.solve.solution import Evidence
from rconv_fast.wrappers import working_copy

# Rounds of Gauss-Newton and settling bits, and steps of Gauss-Newton in each.
ROUNDS, STEPS = 30, 4
# A misfit above this many times the noise's own that a round did not halve: the start is not near any answer.
HOPELESS = 1e4
# Errors drawn for the bits, and for the error bars; a value's variance is the mean of its own and of what its
# neighbours of the same channel have.
BIT_DRAWS, DRAWS = 6, 12
# Share of all bits that may be in doubt at once.
DOUBTED = 0.1


@dataclass(frozen=True)
class _Candidate:
    """One pattern, the best input for it, and what noise does there."""

    fit: Fit
    bits: Bits
    penalty: float
    contradicting: int
    information: SampledInformation
    doubt: bit.Doubt

    @property
    def score(self) -> float:
        """Misfit of the gradients and of the bits."""
        return self.fit.chi2 + self.penalty


def estimate_by_products(
    model: nn.Module,
    observation: Observation,
    start_inputs: Tensor,
    targets: Tensor,
    *,
    pattern: Pattern | None = None,
    free_scale: bool = False,
    client: nn.Module | None = None,
    budget: Budget | None = None,
) -> Estimate:
    """As `joint.estimate`, for any number of values."""
    budget, x = budget or Budget(), start_inputs.detach()
    sigma = {name: entry_noise(observation, name) for name in observation.gradients}
    whole = GradientMap.read(
        model, observation.loss, targets, observation.gradients, sigma, x.shape, observation.factor
    )
    problem = under(whole, CAPS[0])
    coarse = rounded(problem, working_copy(model, torch.float32), x.shape, torch.float32)
    deviations = _deviations(whole, problem, x)
    setting = _Setting(problem, coarse, deviations, free_scale, budget)
    x, bits = _settled(setting, x, first_bits(whole, x, pattern))
    best, iterations = _fit(setting, x, bits), 0
    for _ in range(ROUNDS):
        iterations += best.fit.iterations
        setting = setting.with_scale(best.fit.scale)
        if budget.spent or not len(best.doubt):
            break
        x, bits = setting.settle(best.fit.x, best.bits, best.doubt)
        if same(bits, best.bits):
            break
        found = _fit(setting, x, bits)
        hopeless = found.fit.chi2 > HOPELESS * entry_count(problem) and not found.score < best.score / 2
        if hopeless or not found.score < best.score:
            break
        best = found
    return _finished(best, setting, observation, client, iterations)


@dataclass(frozen=True)
class _Setting:
    """What stays the same while x and the bits move: the problem, twice; how its noise goes with its weights."""

    problem: GradientMap
    coarse: GradientMap
    deviations: Parts
    free_scale: bool
    budget: Budget

    def with_scale(self, scale: float) -> _Setting:
        """With another factor of the gradients."""
        return replace(self, problem=self.problem.with_scale(scale), coarse=self.coarse.with_scale(scale))

    def information(self, x: Tensor, bits: Bits) -> SampledInformation:
        """At x, with these bits."""
        held, coarse = self.problem.held(bits), self.coarse.held(_in_float32(bits))
        return SampledInformation.create(held, coarse, x, self.deviations, self.free_scale)

    def settle(self, x: Tensor, bits: Bits, doubt: bit.Doubt) -> tuple[Tensor, Bits]:
        """The bits in doubt settled, and the input moved along where that lowers the misfit."""
        moved, found = settle(self.coarse, x.float(), _in_float32(bits), doubt, free_scale=self.free_scale)
        settled = {name: d.to(x) for name, d in found.items()}
        return min((moved.to(x), x), key=self.problem.held(settled).chi2), settled


def _in_float32(bits: Bits) -> Bits:
    return {name: d.float() for name, d in bits.items()}


def _settled(setting: _Setting, x: Tensor, bits: Bits) -> tuple[Tensor, Bits]:
    """The bits that the start leaves in doubt settled, before wrong ones move it."""
    if not bits:
        return x, bits
    errors, _ = setting.information(x, bits).draw(BIT_DRAWS, torch.Generator().manual_seed(2))
    most = _most(bits)
    return settled_by(lambda doubt: setting.settle(x, bits, doubt), setting.problem, x, bits, errors, most=most)


def _most(bits: Bits) -> int:
    return math.ceil(DOUBTED * sum(d.numel() for d in bits.values()))


def _fit(setting: _Setting, x: Tensor, bits: Bits) -> _Candidate:
    """The best input for one pattern, and the bits in doubt there."""
    held, free_scale = setting.problem.held(bits), setting.free_scale
    solve = setting.information(x, bits).solve
    fit = gauss_newton(held, x, solve, budget=setting.budget, most=STEPS, free_scale=free_scale)
    information = setting.with_scale(fit.scale).information(fit.x, bits)
    if not bits:
        return _Candidate(fit, bits, 0.0, 0, information, bit.Doubt(torch.zeros(0), torch.zeros(0)))
    errors, _ = information.draw(BIT_DRAWS, torch.Generator().manual_seed(2))
    inputs, spread = held.kink_inputs(fit.x), bit.input_deviations(held, fit.x, errors)
    penalty, wrong = bit.contradiction(inputs, spread, bits)
    doubt = bit.find_doubt(inputs, spread, bits, inflation(held, fit, x.numel()), _most(bits))
    return _Candidate(fit, bits, penalty, wrong, information, doubt)


def _deviations(whole: GradientMap, problem: GradientMap, x: Tensor) -> Parts:
    """Of each entry's noise, in units of its weight's; 1 for statistics that were sent."""
    names = list(problem.parameters)
    found = [(whole.sigma[name] / problem.sigma[name]).nan_to_num(1.0) for name in names]
    parts = [d.expand(whole.seen[name].shape) for d, name in zip(found, names, strict=True)]
    return [*parts, *(torch.ones_like(part) for part in problem.residual(x)[len(names) :])]


def _finished(
    found: _Candidate, setting: _Setting, observation: Observation, client: nn.Module | None, iterations: int
) -> Estimate:
    """Error bars, and the law of the misfit.

    With weights that are not the noise's own the misfit of a true answer has the mean ``sum S^2 - E[e^T J u]`` and
    about the variance ``2 sum S^4`` of its free share: so many times a chi-square (Welch and Satterthwaite).
    """
    x, held, information = found.fit.x, setting.problem.held(found.bits), found.information
    errors, explained = information.draw(DRAWS, torch.Generator().manual_seed(0))
    variance = _shared(errors.square().mean(0))
    if client is not None:
        at_scale = replace(observation, scale=found.fit.scale)
        variance = variance + arithmetic_variance(held, client, x, information.solve, at_scale)
    is_open = information.open_values()
    alive = [((g != 0) | (seen != 0)) for g, seen in zip(held.gradients(x), held.seen.values(), strict=True)]
    squares = [d[live].square() for d, live in zip(setting.deviations, alive, strict=False)]
    total = sum(float(s.sum()) for s in squares)
    mean = max(total - explained - float(setting.free_scale), 1.0)
    spread = 2 * sum(float(s.square().sum()) for s in squares) * mean / max(total, 1.0)
    dof = 2 * mean**2 / spread
    with torch.no_grad():
        at_bits = held.values(x) if found.bits else {}
    entries, fixed = sum(int(live.sum()) for live in alive), int((~is_open).sum())
    return Estimate(
        inputs=x,
        uncertainty=variance.masked_fill(is_open, math.inf).sqrt(),
        chi2=found.fit.chi2 * dof / mean + found.penalty,
        dof=round(dof),
        pattern=Pattern({name: at_bits[name] for name in found.bits}, origin="joint estimate"),
        contradicting=found.contradicting,
        iterations=iterations,
        scale=found.fit.scale,
        evidence=Evidence(
            rank=fixed,
            unknowns=x.numel(),
            rows=entries,
            residual=math.sqrt(found.fit.chi2 / max(entries, 1)),
            condition=math.nan,
            solver="gauss-newton by products",
            proof="probe" if fixed else "none",
            converged=not setting.budget.spent,
            iterations=iterations,
        ),
        notes=[f"error bars from {DRAWS} drawn errors, true to about a fifth"]
        + (["the time limit ended the joint estimate"] if setting.budget.spent else []),
    )


def _shared(variance: Tensor) -> Tensor:
    """The mean of a value's variance and of its neighbours' where the input has axes of space."""
    axes = variance.ndim - 2
    if not 1 <= axes <= 3:
        return (variance + variance.mean()) / 2
    pool = (nn.functional.avg_pool1d, nn.functional.avg_pool2d, nn.functional.avg_pool3d)[axes - 1]
    return (variance + pool(variance, 3, 1, 1, count_include_pad=False)) / 2

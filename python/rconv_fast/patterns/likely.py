"""The picture to be expected where equations and hidden maxima determine none: by beliefs, with what pictures are like.

The equations are those of `beliefs`: positions are believed in, and how much is left open by them is known. To these
come what each window says of all its outputs, the maxima m and what lies below, the range of the picture, and
`Roughness`. What is no equation enters with the mean and variance that it leaves (`moments`). The picture is the mean
of what is then possible, not its most likely member, so it misses the equations a little; its error bars say how much
of it the prior has chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.patterns.beliefs import (
    INFLATION,
    SURE,
    UNLIKELY,
    Estimate,
    Marginal,
    error_of_values,
    position_and_gradient_belief,
    precision_of,
    zero_or_positive,
)
from rconv_fast.patterns.information import Equations
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.moments import Moments, Site
from rconv_fast.patterns.problem import Front, Problem, Reading
from rconv_fast.patterns.robust import SHARP, RobustSteps
from rconv_fast.patterns.roughness import Roughness

# The range of a picture.
LOW, HIGH = 0.0, 1.0
# Rounds: half of the pictures are there after eight, the last change by a tenth of their error bars.
ROUNDS = 20
# Error bars in a search are this many times as large as the information says.
WIDER = 1.2


@dataclass(frozen=True)
class Likely:
    r"""The picture (B, C, \*in), the standard deviation of its values, and the rounds it took."""

    x: Tensor
    deviation: Tensor
    rounds: int


def likely_picture(problem: Problem, budget: Budget) -> Likely:
    """The mean of the pictures that fit, from a relaxed start."""
    start = RobustSteps.create(problem, SHARP).next(None)
    state, rounds = Expected.of_start(problem, Roughness.of_pictures(start.shape), start), 0
    while rounds < ROUNDS and not (rounds and budget.spent):
        state, rounds = state.next(), rounds + 1
    x = state.known.x
    return Likely(x.mean.clamp(LOW, HIGH), INFLATION * x.deviation, rounds)


@dataclass(frozen=True)
class Expected:
    """An estimate, what the windows say of the outputs and its range of the input, and how alike neighbours are."""

    problem: Problem
    roughness: Roughness
    known: Estimate
    windows: Site | None
    range: Site | None
    alike: Tensor

    @classmethod
    def of_start(cls, problem: Problem, roughness: Roughness, x: Tensor) -> Expected:
        """From a relaxed start x."""
        return cls(problem, roughness, Estimate.of_start(problem, x), None, None, roughness.even().to(x))

    def next(self) -> Expected:
        """The estimate from all equations, weighed by the beliefs that follow from the last one."""
        convolution, maxima, known = self.problem.front.last, self.problem.hidden, self.known
        assert isinstance(maxima, Maxima)
        cavity = known.o if self.windows is None else known.o.without_own(self.windows.target)
        error = error_of_values(cavity)
        belief = position_and_gradient_belief(convolution, maxima, known, cavity)
        windows = self._half(_said_by_windows(maxima, cavity, belief, error), self.windows)
        x = known.x if self.range is None else known.x.without_own(self.range.target)
        range_ = self._half(_said_by_range(x, self.problem.front, SURE * known.size), self.range)
        reading = Reading(maxima.gradient(belief), windows.target, windows.weight)
        precision = precision_of(convolution, maxima, known, belief, reading.g, error)
        solved = Equations(convolution, reading, range_, precision, self.roughness.prior(self.alike)).solved()
        of_x, of_o = solved.variances(convolution)
        scale = WIDER * solved.misfit
        found = Estimate(
            Marginal.create(solved.x, scale * of_x.sqrt(), range_.weight * of_x),
            Marginal.create(convolution.output(solved.x), scale * of_o.sqrt(), windows.weight * of_o),
        )
        alike = self.roughness.weights(solved.x, solved.draws(convolution))
        return replace(self, known=found, windows=windows, range=range_, alike=alike)

    @staticmethod
    def _half(site: Site, last: Site | None) -> Site:
        return site if last is None else site.halfway(last)


def _said_by_windows(maxima: Maxima, o: Marginal, belief: Tensor, error: float) -> Site:
    """Each output is its window's maximum with the probability that is believed, else below it."""
    before = Moments(o.mean, o.deviation.square())
    p = maxima.windows.largest(torch.where(belief > UNLIKELY, belief, 0.0))
    return before.below(maxima.limit).or_at(maxima.target, p).site(before, error)


def _said_by_range(x: Marginal, front: Front, error: float) -> Site:
    """No value is outside of its range; behind a ReLU many are zero."""
    before = Moments(x.mean, x.deviation.square())
    if front.image:
        return before.below(HIGH).above(LOW).site(before)
    if front.low != 0:
        return before.below(front.high).above(front.low).site(before)
    p, positive = zero_or_positive(x)
    return positive.above(0.0).or_at(torch.zeros_like(p), p).site(before, error)

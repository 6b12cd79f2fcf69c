"""The search of a pattern: from an input its pattern, from the pattern an input, until one is certified.

How an input is made from the last one is a schedule of robust steps or beliefs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.errors import LinAlgError
from rconv_fast.patterns.beliefs import Estimate, updated
from rconv_fast.patterns.certificate import Fit, certify, misfit_of, unproven
from rconv_fast.patterns.likely import Expected
from rconv_fast.patterns.problem import Problem
from rconv_fast.patterns.robust import SHARP, RobustSteps, Schedule
from rconv_fast.patterns.roughness import Roughness

# Misfit from which the pattern is worth a tight solve.
GATE = 1e-3
# A certified pattern that misses more than this share of the tolerance may yet have a position wrong whose value is
# nearly the maximum: the search goes on until its pattern stays.
CLEAR = 0.03
# A search gives up after its patience of iterations that do not gain a tenth.
GAIN = 0.9
# How often a step is halved that makes the misfit grow by more than this factor, where equations are linear only near
# the iterate. Positions jump, so a good step may lose a little.
HALVINGS, WORSE = 4, 1.5
# Weighted solves behind a certificate, at most.
REWEIGHTED = 3
# Sizes of kicks, in units of the spread of the input, one after the other; their number; how many may lead back, and
# the relative change of the misfit up to which they do.
KICK_SIZES = (0.01, 0.03, 0.1, 0.3)
KICKS, BACK, SAME = 12, 3, 0.01


@dataclass(frozen=True)
class Attempt:
    """Where a search ended, certified or not (None: nowhere), and what it took."""

    fit: Fit | None
    steps: str

    @property
    def certified(self) -> bool:
        """Whether it found the pattern."""
        return self.fit is not None and self.fit.certified


class Steps(Protocol):
    """How the next input is made, from the last one or (None) from nothing."""

    def next(self, x: Tensor | None) -> Tensor:
        """The next input."""


@dataclass
class BeliefSteps:
    """The inputs that beliefs make one from the other, after a relaxed start."""

    problem: Problem
    known: Estimate | None = None

    def next(self, x: Tensor | None) -> Tensor:
        """The input of the next estimate; the same where the equations are too singular for one."""
        if x is None:
            return RobustSteps.create(self.problem, SHARP).next(None)
        with suppress(LinAlgError):
            self.known = updated(self.problem, self.known or Estimate.of_start(self.problem, x))
        return x if self.known is None else self.known.x.mean


@dataclass(frozen=True)
class Believing:
    """A search by beliefs.

    Attributes
    ----------
    name : str
        For the report.
    patience, iterations : int
        Iterations that gain nothing, and at all, at most.
    """

    name: str = "beliefs"
    patience: int = 24
    iterations: int = 80

    def steps(self, problem: Problem, _: Tensor | None) -> Steps:
        """From a relaxed start, or from any other."""
        return BeliefSteps(problem)


BELIEFS = Believing()


@dataclass
class GuidedSteps:
    """The inputs to be expected, one from the other, after a relaxed start."""

    problem: Problem
    roughness: Roughness
    known: Expected | None = None

    def next(self, x: Tensor | None) -> Tensor:
        """The input of the next estimate; the same where the equations are too singular for one."""
        if x is None:
            return RobustSteps.create(self.problem, SHARP).next(None)
        with suppress(LinAlgError):
            self.known = (self.known or Expected.of_start(self.problem, self.roughness, x)).next()
        return x if self.known is None else self.known.known.x.mean.clamp(self.problem.front.low)


@dataclass(frozen=True)
class Guided:
    """A search by beliefs and by how alike neighbours are.

    Attributes
    ----------
    roughness : Roughness
        Of the input.
    name : str
        For the report.
    patience, iterations : int
        Iterations that gain nothing, and at all, at most.
    """

    roughness: Roughness
    name: str = "beliefs with a prior"
    patience: int = 16
    iterations: int = 40

    def steps(self, problem: Problem, _: Tensor | None) -> Steps:
        """From a relaxed start, or from any other."""
        return GuidedSteps(problem, self.roughness)


def alternate(problem: Problem, schedule: Schedule | Believing | Guided, budget: Budget) -> Attempt:
    """Search from a relaxed start until a pattern is certified or nothing is gained."""
    fit, iterations = _alternated(problem, schedule, budget, None)
    return Attempt(fit, f"{iterations} iterations")


def _alternated(
    problem: Problem, schedule: Schedule | Believing | Guided, budget: Budget, x: Tensor | None
) -> tuple[Fit, int]:
    """Where it ends, and the iterations it takes."""
    steps, history = schedule.steps(problem, x), list[float]()
    tried: Tensor | None = None
    certified: Fit | None = None
    for _ in range(schedule.iterations):
        look = _Look.at(problem, steps.next(x))
        if problem.front.bends and x is not None and history:
            look = _back_from(problem, x, look, history[-1])
        x = look.x
        history.append(look.last)
        again = tried is not None and torch.equal(look.pattern, tried)
        exact = certified is None and look.worst <= problem.tolerance  # which may have been all that a pattern lacked
        if look.worst < max(GATE, problem.tolerance) and (exact or not again):
            certified = _nearer(certify(problem, look.pattern, look.x), certified)
            tried = look.pattern
        settled = certified is not None and (again or certified.misfit <= CLEAR * problem.tolerance)
        if settled or budget.spent or _stalled(history, schedule.patience):
            break
    fit = unproven(problem, look.x) if certified is None else _weighted(problem, certified)
    return fit, len(history)


def _nearer(fit: Fit | None, other: Fit | None) -> Fit | None:
    """The one that misses less."""
    return other if fit is None or (other is not None and other.misfit <= fit.misfit) else fit


def kicked(problem: Problem, schedule: Schedule, budget: Budget, stuck: Fit) -> Attempt:
    """Alternate from an input knocked out of where a search got stuck: a few wrong positions hold each other.

    Where kicks lead back again and again something else is wrong.
    """
    generator, back, kicks, iterations = torch.Generator().manual_seed(0), 0, 0, 0
    while kicks < KICKS and back < BACK and not budget.spent:
        size = KICK_SIZES[kicks % len(KICK_SIZES)] * stuck.x.std()
        noise = torch.randn(stuck.x.shape, generator=generator, dtype=torch.float64).to(stuck.x)
        fit, more = _alternated(problem, schedule, budget, stuck.x + size * noise)
        kicks, iterations = kicks + 1, iterations + more
        back += abs(fit.misfit - stuck.misfit) < SAME * stuck.misfit
        stuck = fit if fit.misfit < stuck.misfit else stuck
        if fit.certified:
            break
    return Attempt(stuck, f"{kicks} kicks, {iterations} iterations")


@dataclass(frozen=True)
class _Look:
    """A forward run: the input, the pattern, by how much anything is missed, and by how much the last layer's is."""

    x: Tensor
    pattern: Tensor
    worst: float
    last: float

    @classmethod
    def at(cls, problem: Problem, x: Tensor) -> _Look:
        o = problem.front.output(x)
        pattern, behind = problem.hidden.choose(o), problem.hidden.misfit(o)
        gradients = [miss.relative for miss in problem.front.misses(x, problem.hidden.tight(pattern).g)]
        return cls(x, pattern, max(behind, *gradients), behind + gradients[0])


def _back_from(problem: Problem, x: Tensor, look: _Look, so_far: float) -> _Look:
    """Half of a step, and half of that, while it loses in the last layer; those before it follow by jumps."""
    for _ in range(HALVINGS):
        if look.last < WORSE * so_far:
            break
        look = _Look.at(problem, (x + look.x) / 2)
    return look


def _weighted(problem: Problem, fit: Fit) -> Fit:
    """The certified input with every equation weighed by its own misfit, as long as that brings it nearer.

    Equations from rounded gradients differ by orders of magnitude in how well they hold.
    """
    for _ in range(REWEIGHTED):
        x = replace(RobustSteps.create(problem, SHARP), ridge=0.0).next(fit.x)
        misfit = misfit_of(problem, x)
        if not misfit < fit.misfit / 2:
            break
        fit = replace(fit, x=x, misfit=misfit)
    return fit


def _stalled(history: list[float], patience: int) -> bool:
    return len(history) > 2 * patience and min(history[-patience:]) > GAIN * min(history[:-patience])

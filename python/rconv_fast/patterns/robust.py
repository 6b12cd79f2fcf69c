"""Robust steps: a weighted solve under the pattern of the last input; what contradicts is believed less.

Plain alternation stalls. Here every equation is weighed by how clear its piece is and how well it fits; a few filters
become entirely right, take over the weights and pull the others in. Convergence is then superlinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.patterns.merged import Solver, solver_of
from rconv_fast.patterns.problem import Convolution, Problem, Reading

# Weight of the gradient rows in the relaxed start, when one row of either kind counts the same.
START_GRADIENT = 0.3
# Regularisation of the start in units of the mean diagonal: roughness of a picture, size of features.
SMOOTH, SMALL = 0.1, 1e-3
# What is left of it for a start that is near.
NEARLY_NONE = 1e-5
# A filter's rows weigh ``s^2 / (v_f + 0.05 median v)``, v_f their mean square misfit.
FLOOR = 0.05
# and at most this many times what makes both kinds of rows count the same: fewer rows than unknowns fit any input.
MOST = 30.0
SMALLEST_SIGMA = 1e-15
# Values are met no better than this share of what the gradients are missed by, both relative: where few values hold a
# part of x, wrong positions can meet them to rounding, and would be trusted more than all the gradients.
TIED = 0.1


@dataclass(frozen=True)
class Schedule:
    """How trust grows.

    Attributes
    ----------
    name : str
        For the report.
    clear, trust : float
        Lead of a maximum and misfit, in units of sigma, at which a known output counts about half.
    decay : float
        Factor of the regularisation an iteration.
    quantile : float
        sigma is 1.5 times this quantile of the misfits,
    floor : float
        but falls at most by this factor an iteration.
    descent : bool
        Whether positions are found by coordinate descent.
    patience, iterations : int
        Iterations that gain nothing, and at all, at most.
    """

    name: str
    clear: float = 3.0
    trust: float = 1.0
    decay: float = 0.3
    quantile: float = 0.5
    floor: float = 0.3
    descent: bool = False
    patience: int = 8
    iterations: int = 60

    def steps(self, problem: Problem, start: Tensor | None) -> RobustSteps:
        """From a relaxed start, or from `start`, which is near."""
        return RobustSteps.create(problem, self, near=start is not None)


SHARP = Schedule("sharp")
SOFT = Schedule("soft", decay=0.5, quantile=0.7)
DESCENT = Schedule("descent", descent=True)
GENTLE = Schedule("gentle", clear=5.0, trust=5.0, decay=0.8, patience=16, iterations=80)
MERGED = Schedule("merged", clear=1.0, iterations=45)


@dataclass
class RobustSteps:
    """The inputs that a schedule makes one from the other; sigma and the regularisation fall on the way."""

    problem: Problem
    schedule: Schedule
    solver: Solver
    ridge: float
    sigma: float = 0.0
    count: int = 0

    @classmethod
    def create(cls, problem: Problem, schedule: Schedule, near: bool = False) -> RobustSteps:
        """`near`: the input that they start at is near already."""
        ridge = (SMOOTH if problem.front.image else SMALL) * (NEARLY_NONE if near else 1.0)
        return cls(problem, schedule, solver_of(problem.front), ridge)

    def next(self, x: Tensor | None) -> Tensor:
        """One weighted solve, clamped to the range of x; from nothing, a relaxed start."""
        front, hidden, ridge = self.problem.front, self.problem.hidden, self.ridge
        self.ridge *= self.schedule.decay
        self.count += 1
        if x is None:
            reading = hidden.relaxed()
            weights = [START_GRADIENT * _balance(front.last, reading)]
        else:
            o = front.output(x)
            pattern = hidden.choose(o)
            size = 1.5 * float(torch.quantile(hidden.residual(o, pattern).abs(), self.schedule.quantile))
            least = TIED * _gradient_miss(self.problem, x, pattern) * float(o.std())
            self.sigma = max(size, least, self.schedule.floor * self.sigma, SMALLEST_SIGMA)
            if self.schedule.descent and self.count > 2:
                pattern = hidden.refined(front.last, front.before_last(x), pattern, self.sigma)
            reading = hidden.robust(o, pattern, self.sigma, self.schedule)
            weights = _filter_weights(self.problem, x, reading, self.sigma)
        return self.solver.solve(reading, weights, ridge, x).clamp(front.low, front.high)


def _balance(c: Convolution, reading: Reading) -> Tensor:
    """Weight (F,) that makes the gradient rows' mean diagonal that of the value rows."""
    values = float(c.back(reading.weight, c.weight.square()).mean())
    gradients = float(c.back(reading.g.square(), torch.ones_like(c.weight)).mean())
    return c.weight.new_full((len(c.weight),), values / gradients)


def _gradient_miss(problem: Problem, x: Tensor, pattern: Tensor) -> float:
    """The median over the last layer's filters of ``||B x - dW|| / ||dW||``."""
    last = problem.front.misses(x, problem.hidden.tight(pattern).g)[0]
    relative = last.miss.flatten(1).norm(dim=1) / last.seen.flatten(1).norm(dim=1)
    return float(relative[last.alive].median()) if bool(last.alive.any()) else 0.0


def _filter_weights(problem: Problem, x: Tensor, reading: Reading, sigma: float) -> list[Tensor]:
    """``s^2 / (v_f + 0.05 median v)`` (F,) of each layer, 0 for filters without gradient; bounded in the last."""
    weights = []
    for missed in problem.front.misses(x, reading.g):
        miss = missed.miss.square().flatten(1).mean(1)
        weight = sigma**2 / (miss + FLOOR * miss.median() + torch.finfo(miss.dtype).tiny)
        weights.append(torch.where(missed.alive, weight, 0.0))
    return [torch.minimum(weights[0], MOST * _balance(problem.front.last, reading)), *weights[1:]]

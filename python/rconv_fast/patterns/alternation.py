"""Robust alternation: solve under the pattern, run forward, read the pattern off; what contradicts is believed less.

Plain alternation stalls. Here every equation is weighed by how clear its piece is and how well it fits; a few filters
become entirely right, take over the weights and pull the others in. Convergence is then superlinear.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.patterns.certificate import Fit, certify, misfit_of, unproven
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
# Misfit from which the pattern is worth a tight solve.
GATE = 1e-3
# A certified pattern that misses more than this share of the tolerance may yet have a position wrong whose value is
# nearly the maximum: the alternation goes on until its pattern stays.
CLEAR = 0.03
# The alternation gives up after a schedule's patience of iterations that do not gain a tenth.
GAIN = 0.9
SMALLEST_SIGMA = 1e-15
# Values are met no better than this share of what the gradients are missed by, both relative: where few values hold a
# part of x, wrong positions can meet them to rounding, and would be trusted more than all the gradients.
TIED = 0.1
# How often a step is halved that makes the misfit grow by more than this factor, where equations are linear only near
# the iterate. Positions jump, so a good step may lose a little.
HALVINGS, WORSE = 4, 1.5
# Weighted solves behind a certificate, at most.
REWEIGHTED = 3


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


SHARP = Schedule("sharp")
SOFT = Schedule("soft", decay=0.5, quantile=0.7)
DESCENT = Schedule("descent", descent=True)
GENTLE = Schedule("gentle", clear=5.0, trust=5.0, decay=0.8, patience=16, iterations=80)
MERGED = Schedule("merged", clear=1.0, iterations=45)
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


@dataclass
class _State:
    """What is carried from one iteration to the next."""

    x: Tensor | None
    ridge: float
    sigma: float = 0.0
    history: list[float] = field(default_factory=list)


def alternate(problem: Problem, schedule: Schedule, budget: Budget) -> Attempt:
    """Alternate from a relaxed start until a pattern is certified or nothing is gained."""
    fit, iterations = _alternated(problem, schedule, budget, None)
    return Attempt(fit, f"{iterations} iterations")


def _alternated(problem: Problem, schedule: Schedule, budget: Budget, start: Tensor | None) -> tuple[Fit, int]:
    """Where it ends, and the iterations it takes."""
    solver, ridge = solver_of(problem.front), SMOOTH if problem.front.image else SMALL
    state = _State(start, ridge if start is None else NEARLY_NONE * ridge)
    tried: Tensor | None = None
    certified: Fit | None = None
    for _ in range(schedule.iterations):
        look = _Look.at(problem, _step(problem, solver, schedule, state))
        state.ridge *= schedule.decay
        if solver.bends and state.x is not None and state.history:
            look = _back_from(problem, state.x, look, state.history[-1])
        state.x = look.x
        state.history.append(look.last)
        again = tried is not None and torch.equal(look.pattern, tried)
        if look.worst < max(GATE, problem.tolerance) and not again:
            certified = _nearer(certify(problem, look.pattern, look.x), certified)
            tried = look.pattern
        settled = certified is not None and (again or certified.misfit <= CLEAR * problem.tolerance)
        if settled or budget.spent or _stalled(state.history, schedule.patience):
            break
    fit = unproven(problem, look.x) if certified is None else _weighted(problem, solver, schedule, certified)
    return fit, len(state.history)


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


def _weighted(problem: Problem, solver: Solver, schedule: Schedule, fit: Fit) -> Fit:
    """The certified input with every equation weighed by its own misfit, as long as that brings it nearer.

    Equations from rounded gradients differ by orders of magnitude in how well they hold.
    """
    for _ in range(REWEIGHTED):
        x = _step(problem, solver, schedule, _State(fit.x, ridge=0.0))
        misfit = misfit_of(problem, x)
        if not misfit < fit.misfit / 2:
            break
        fit = replace(fit, x=x, misfit=misfit)
    return fit


def _step(problem: Problem, solver: Solver, schedule: Schedule, state: _State) -> Tensor:
    """One weighted solve, clamped to the range of x."""
    front, hidden = problem.front, problem.hidden
    if state.x is None:
        reading = hidden.relaxed()
        weights = [START_GRADIENT * _balance(front.last, reading)]
    else:
        o = front.output(state.x)
        pattern = hidden.choose(o)
        size = 1.5 * float(torch.quantile(hidden.residual(o, pattern).abs(), schedule.quantile))
        least = TIED * _gradient_miss(problem, state.x, pattern) * float(o.std())
        state.sigma = max(size, least, schedule.floor * state.sigma, SMALLEST_SIGMA)
        if schedule.descent and len(state.history) > 1:
            pattern = hidden.refined(front.last, front.before_last(state.x), pattern, state.sigma)
        reading = hidden.robust(o, pattern, state.sigma, schedule)
        weights = _filter_weights(problem, state.x, reading, state.sigma)
    return solver.solve(reading, weights, state.ridge, state.x).clamp(front.low, front.high)


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


def _stalled(history: list[float], patience: int) -> bool:
    return len(history) > 2 * patience and min(history[-patience:]) > GAIN * min(history[:-patience])

"""The hidden pattern in front of which a pass stopped: searched, and handed back."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.patterns.alternation import BELIEFS, Attempt, Believing, Guided, alternate, kicked
from rconv_fast.patterns.averages import Averages, pack, rank_of_products
from rconv_fast.patterns.beliefs import can_believe
from rconv_fast.patterns.certificate import Fit, certify, unproven
from rconv_fast.patterns.least_squares import WeightedSolver
from rconv_fast.patterns.likely import likely_picture
from rconv_fast.patterns.problem import Problem
from rconv_fast.patterns.robust import DESCENT, GENTLE, MERGED, SHARP, SOFT, Schedule
from rconv_fast.patterns.roughness import Roughness, random_pictures
from rconv_fast.progress import Event
from rconv_fast.solve import Evidence
from rconv_fast.walk.chain import LEAST_TOLERANCE, Chain, merge, read_chain, read_problem
from rconv_fast.walk.found import Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport

# Outputs this near, in units of the largest miss of a known maximum, are equal; at least in units of the tolerance.
TIE, LEAST_TIE = 2.0, 0.1
# Longest search of one pattern where nobody set a limit.
SEARCH_SECONDS = 60.0
# Misfit up to which the nearest input so far is worth a kick, and handed on where all fail: a forward run of it may
# correct the layers behind.
NEAR = 0.2
# Gradient rows for each unknown of a channel from which the first robust schedule mostly suffices.
PLENTY = 4.0
# Random pictures that show what features are like.
SAMPLES = 64
SCHEDULES, MERGED_SCHEDULES = (SHARP, SOFT, DESCENT, GENTLE), (MERGED,)


@dataclass(frozen=True)
class Outcome:
    """What a search ended with.

    Attributes
    ----------
    pieces : dict of str to Tensor
        Of the hidden layer, by step name; empty where none were found.
    known : Known
        What another pass then need not solve for.
    reason : str
        Why none were found, half a sentence; with pieces that are not certified, of an input that comes near.
    """

    pieces: dict[str, Tensor] = field(default_factory=dict)
    known: Known = field(default_factory=Known)
    reason: str = ""


def find_pattern(graph: Graph, passed: Pass, options: Options) -> Outcome:
    """Search the pattern that stopped a pass: by one convolution, by the one before merged with it, then by kicks.

    Parameters
    ----------
    graph : Graph
        The model.
    passed : Pass
        A pass that stopped in front of a hidden layer.
    options : Options
        Noise of the gradients, time, who is told.
    """
    assert passed.stop is not None
    rule = graph.steps[passed.stop.step].rule
    chain = read_chain(graph, passed.stop.step)
    problem = None if chain is None else read_problem(graph, passed, chain, options)
    if chain is None or problem is None:
        other = f"{rule.kind}, behind something else than one convolution with what rises between"
        return Outcome(reason=other if rule.hidden else passed.stop.reason)
    limited = options.budget.is_limited
    options = options if limited else replace(options, budget=options.budget.at_most(SEARCH_SECONDS))
    start = time.perf_counter()
    merged = merge(graph, chain, problem)
    alone = searched = _search(graph, _Searched(chain, problem, alone=merged is None), options)
    unfinished = searched.goes_on(options.budget) or searched.leaves_open
    if merged is not None and unfinished:
        by_both = _search(graph, _Searched(*merged), options)
        better = by_both.certified if searched.certified else by_both.misfit <= searched.misfit
        searched = by_both if better and not by_both.reason else searched
    if searched.goes_on(options.budget) and searched.misfit <= NEAR:
        searched = _kicked(searched, options)
    if _is_expected(graph, alone, options) and not searched.certified:
        return _expected(alone, start, options)
    return _outcome(graph, searched, start, options)


@dataclass(frozen=True)
class _Searched:
    """What stands in front of a hidden layer, the nearest input so far and how it was found, or why not.

    `alone`: no other convolution can be merged with it, so that more work on this one is worth its time.
    """

    chain: Chain
    problem: Problem
    alone: bool = False
    nearest: Fit | None = None
    how: str = ""
    reason: str = ""

    @property
    def misfit(self) -> float:
        """Of the nearest input."""
        return math.inf if self.nearest is None else self.nearest.misfit

    @property
    def certified(self) -> bool:
        """Whether the pattern was found."""
        return self.nearest is not None and self.nearest.certified

    @property
    def leaves_open(self) -> bool:
        """Whether values are open under the pattern that was found."""
        return self.nearest is not None and self.certified and not bool(self.nearest.determined.all())

    def goes_on(self, budget: Budget) -> bool:
        """Whether there is time left and nothing certified."""
        return not budget.spent and not self.certified

    def after(self, name: str, attempt: Attempt) -> _Searched:
        """The same after an attempt."""
        if attempt.fit is None or attempt.fit.misfit >= self.misfit:
            return self
        return replace(self, nearest=attempt.fit, how=f"{name}, {attempt.steps}")


def _search(graph: Graph, searched: _Searched, options: Options) -> _Searched:
    """Try the proposals one after the other, until a pattern is certified."""
    chain, problem = searched.chain, searched.problem
    zero = torch.zeros(problem.front.shape).to(problem.front.last.weight)
    system = problem.system(problem.hidden.tight(problem.hidden.choose(problem.front.output(zero))), zero)
    if system.count <= system.unknowns:
        return replace(searched, reason=f"{system.count} equations for {system.unknowns} unknowns prove no pattern")
    if isinstance(averages := problem.hidden, Averages):
        rank = rank_of_products(problem.front.last, averages)
        if rank < averages.positions:
            return replace(searched, reason=f"gradients of rank {rank} leave {averages.positions} patches open")
    if (least := WeightedSolver(problem.front.last).seconds) > options.budget.left:
        return replace(searched, reason=f"one step of a search takes {least:.0f} s: time_limit= allows it")
    for name, propose in _proposals(graph, searched):
        options.progress(Event(chain.conv.label, f"pattern of {chain.hidden.label} ({name})"))
        searched = searched.after(name, propose(options.budget))
        if not searched.goes_on(options.budget):
            break
    return searched


def _kicked(searched: _Searched, options: Options) -> _Searched:
    """Kicks of the nearest input."""
    chain, stuck = searched.chain, searched.nearest
    assert stuck is not None
    options.progress(Event(chain.conv.label, f"pattern of {chain.hidden.label} (kicks)"))
    schedule = _schedules(chain)[-1]
    return searched.after(schedule.name, kicked(searched.problem, schedule, options.budget, stuck))


def _is_expected(graph: Graph, searched: _Searched, options: Options) -> bool:
    """Whether a picture was asked for where nothing proves one."""
    picture = searched.chain.first.inputs[0] == graph.input
    return options.prior == "tv" and picture and can_believe(searched.problem) and not options.budget.spent


def _expected(searched: _Searched, start: float, options: Options) -> Outcome:
    """The picture to be expected under the prior, with its error bars; nothing of it is proven."""
    chain, problem = searched.chain, searched.problem
    name = chain.first.inputs[0]
    options.progress(Event(chain.conv.label, f"picture to be expected ({options.prior})"))
    likely = likely_picture(problem, options.budget)
    fit = unproven(problem, likely.x)
    evidence = replace(fit.evidence, rank=min(fit.evidence.rows, fit.evidence.unknowns), iterations=likely.rounds)
    report = _report(chain, evidence, f"beliefs and prior {options.prior}, {likely.rounds} rounds", start)
    values = _run(chain, likely.x)
    del values[chain.hidden.name]  # which is known better
    known = Known(values, {name: fit.determined}, {name: report}, frozenset({name}), {name: likely.deviation})
    return Outcome(_pieces(searched, fit), known, _reason(searched, start, options))


Proposal = Callable[[Budget], Attempt]


def _proposals(graph: Graph, searched: _Searched) -> Iterator[tuple[str, Proposal]]:
    """Ways to search by name, those first that are the likely and the cheap ones."""
    problem, chain = searched.problem, searched.chain
    if isinstance(problem.hidden, Averages):
        yield "packing", lambda budget: _packed(problem, chain, budget)
        return
    schedules: list[Schedule | Believing | Guided] = [*_schedules(chain)]
    if searched.alone and can_believe(problem):
        roughness = _of_features(graph, searched)
        by_belief = (BELIEFS,) if roughness is None else (BELIEFS, Guided(roughness))
        at = int(problem.front.last.rows_per_unknown >= PLENTY)
        schedules[at:at] = by_belief
    for schedule in schedules:
        yield schedule.name, functools.partial(alternate, problem, schedule)


def _of_features(graph: Graph, searched: _Searched) -> Roughness | None:
    """How alike neighbours are in a layer's input where the network's is a random picture."""
    name, like = searched.chain.first.inputs[0], searched.problem.front.last.weight
    shape, features = graph.steps[graph.input].shape, graph.steps[name].shape
    if name == graph.input or graph.in_training or len(shape) < 3 or len(features) != len(shape):
        return None
    generator = torch.Generator().manual_seed(0)
    runs = [graph.forward(random_pictures(shape, generator).to(like))[name] for _ in range(SAMPLES)]
    return Roughness.of_features(features, torch.cat(runs))


def _schedules(chain: Chain) -> tuple[Schedule, ...]:
    return SCHEDULES if chain.before is None else MERGED_SCHEDULES


def _packed(problem: Problem, chain: Chain, budget: Budget) -> Attempt:
    """The pattern of a global average, whose row sums are the gradients of the biases."""
    assert isinstance(problem.hidden, Averages)
    made_by = chain.before_hidden.rule
    grad_bias = made_by.grad_bias if isinstance(made_by, ConvRule | AffineRule) else None
    if grad_bias is None:
        return Attempt(None, "")
    pattern, programs = pack(problem.front.last, problem.hidden, grad_bias, budget)
    fit = None if pattern is None else certify(problem, pattern, torch.zeros(problem.front.shape).to(grad_bias))
    return Attempt(fit, f"{programs} linear programs")


def _outcome(graph: Graph, searched: _Searched, start: float, options: Options) -> Outcome:
    """Pieces and values as a pass takes them; without a certificate only the network's input, where that is near."""
    chain, found = searched.chain, searched.nearest
    name = chain.first.inputs[0]
    reason = _reason(searched, start, options)
    if found is None or not (found.certified or (found.misfit <= NEAR and name == graph.input)):
        return Outcome(reason=reason)
    pieces = _pieces(searched, found)
    if searched.leaves_open:  # a pass may know more of these values, such as that they are not negative
        return Outcome(pieces)
    values = _run(chain, found.x.reshape(graph.steps[name].shape))
    report = _report(chain, found.evidence, searched.how, start)
    known = Known(values, {name: found.determined.reshape(values[name].shape)}, {name: report})
    return Outcome(pieces, known, "" if found.certified else reason)


def _reason(searched: _Searched, start: float, options: Options) -> str:
    """Why no pattern was found."""
    why = f"where {searched.reason}" if searched.reason else "of which no pattern was found"
    late = f" in {time.perf_counter() - start:.0f} s: time_limit= allows more" if options.budget.spent else ""
    return f"{searched.chain.hidden.rule.kind}, {why}{late}"


def _run(chain: Chain, x: Tensor) -> dict[str, Tensor]:
    """All values of the chain by a forward run of its input."""
    values = {chain.first.inputs[0]: x}
    with torch.no_grad():
        for step in chain.steps:
            values[step.name] = x = step.forward(x)
    return values


def _pieces(searched: _Searched, found: Fit) -> dict[str, Tensor]:
    """The hidden layer's pieces by a forward run."""
    hidden, step = searched.problem.hidden, searched.chain.hidden
    o = searched.problem.front.output(found.x)
    miss = float(hidden.residual(o, found.pattern).abs().max() / o.abs().max())
    return {step.name: hidden.pieces(o, max(TIE * miss, LEAST_TIE * LEAST_TOLERANCE)).reshape(step.shape)}


def _report(chain: Chain, evidence: Evidence, how: str, start: float) -> LayerReport:
    seconds = time.perf_counter() - start
    label = " + ".join(step.label for step in chain.steps if isinstance(step.rule, ConvRule))
    how = f"{how}, {seconds:.1f} s{'' if evidence.proof == 'pattern' else ', not certified'}"
    return LayerReport(label, chain.conv.rule.kind, evidence, seconds, how)

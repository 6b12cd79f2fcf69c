"""The hidden pattern in front of which a pass stopped: searched, and handed back."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.patterns.alternation import DESCENT, GENTLE, MERGED, SHARP, SOFT, Attempt, alternate
from rconv_fast.patterns.averages import Averages, pack
from rconv_fast.patterns.certificate import Fit, certify
from rconv_fast.patterns.least_squares import WeightedSolver
from rconv_fast.patterns.problem import Problem
from rconv_fast.progress import Event
from rconv_fast.walk.chain import LEAST_TOLERANCE, Chain, merge, read_chain, read_problem
from rconv_fast.walk.found import Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport

# Outputs this near, in units of the largest miss of a known maximum, are equal; at least in units of the tolerance.
TIE, LEAST_TIE = 2.0, 0.1
# Longest search of one pattern where nobody set a limit.
SEARCH_SECONDS = 60.0
# Misfit up to which the input that a failed search came nearest to is handed on: a forward run of it may correct the
# layers behind.
NEAR = 0.2
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
    """Search the pattern that stopped a pass: by one convolution, then by the one before merged with it.

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
    found = _search(graph, chain, problem, options)
    merged = merge(graph, chain, problem) if found.reason and not options.budget.spent else None
    if merged is None:
        return found
    by_both = _search(graph, *merged, options)
    return by_both if by_both.pieces else found


def _search(graph: Graph, chain: Chain, problem: Problem, options: Options) -> Outcome:
    """Try the proposals one after the other; the nearest input counts where none is certified."""
    kind, budget = chain.hidden.rule.kind, options.budget
    nothing = problem.front.output(torch.zeros(problem.front.shape).to(problem.front.last.weight))
    system = problem.system(
        problem.hidden.tight(problem.hidden.choose(nothing)), torch.zeros(problem.front.shape).to(nothing)
    )
    if system.count <= system.unknowns:
        few = f"{system.count} equations for {system.unknowns} unknowns"
        return Outcome(reason=f"{kind}, where {few} prove no pattern")
    start = time.perf_counter()
    if (least := WeightedSolver(problem.front.last).seconds) > budget.left:
        return Outcome(reason=f"{kind}, where one step of a search takes {least:.0f} s: time_limit= allows it")
    nearest: Fit | None = None
    nearest_by = ""
    for name, propose in _proposals(problem, chain):
        options.progress(Event(chain.conv.label, f"pattern of {chain.hidden.label} ({name})"))
        attempt = propose(budget)
        seconds = time.perf_counter() - start
        how = f"{name}, {attempt.steps}, {seconds:.1f} s"
        if attempt.fit is not None and attempt.fit.certified:
            return _outcome(graph, chain, problem, attempt.fit, how, seconds)
        if attempt.fit is not None and (nearest is None or attempt.fit.misfit < nearest.misfit):
            nearest, nearest_by = attempt.fit, how
        if budget.spent:
            break
    within = f" in {seconds:.0f} s: time_limit= allows more" if budget.spent else ""
    reason = f"{kind}, of which no pattern was found{within}"
    if nearest is None or nearest.misfit > NEAR or chain.first.inputs[0] != graph.input:
        return Outcome(reason=reason)
    return replace(_outcome(graph, chain, problem, nearest, f"{nearest_by}, not certified", seconds), reason=reason)


Proposal = Callable[[Budget], Attempt]


def _proposals(problem: Problem, chain: Chain) -> Iterator[tuple[str, Proposal]]:
    """Ways to search, cheapest first, by name."""
    if isinstance(problem.hidden, Averages):
        yield "packing", lambda budget: _packed(problem, chain, budget)
        return
    schedules = SCHEDULES if chain.before is None else MERGED_SCHEDULES
    for schedule in schedules:
        yield schedule.name, functools.partial(alternate, problem, schedule)


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


def _outcome(graph: Graph, chain: Chain, problem: Problem, found: Fit, how: str, seconds: float) -> Outcome:
    """Pieces and values as a pass takes them."""
    name, label = chain.first.inputs[0], " + ".join(s.label for s in chain.steps if isinstance(s.rule, ConvRule))
    x = found.x.reshape(graph.steps[name].shape)
    values = {name: x}
    with torch.no_grad():
        for step in chain.steps:
            values[step.name] = x = step.forward(x)
    o = problem.front.output(found.x)
    miss = float(problem.hidden.residual(o, found.pattern).abs().max() / o.abs().max())
    pieces = problem.hidden.pieces(o, max(TIE * miss, LEAST_TIE * LEAST_TOLERANCE))
    report = LayerReport(label, chain.conv.rule.kind, found.evidence, seconds, how)
    determined = torch.full_like(values[name], found.certified, dtype=torch.bool)
    return Outcome(
        {chain.hidden.name: pieces.reshape(chain.hidden.shape)},
        Known(values, {name: determined}, {name: report}),
    )

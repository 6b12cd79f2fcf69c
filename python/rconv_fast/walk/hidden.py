"""The hidden pattern in front of which a pass stopped: read as a problem of one convolution, searched, handed back.

Between the convolution and the hidden layer may stand activations that rise and affine maps: a maximum commutes with
what rises, and an affine map beside the convolution is part of it, ``s (W x + b) + t = (s W) x + (s b + t)``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.valley import ValleyRule
from rconv_fast.patterns.alternation import DESCENT, GENTLE, SHARP, SOFT, Attempt, alternate
from rconv_fast.patterns.averages import Averages, pack
from rconv_fast.patterns.branches import Branches
from rconv_fast.patterns.certificate import Fit, certify
from rconv_fast.patterns.least_squares import WeightedSolver
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.problem import Convolution, Hidden, Problem
from rconv_fast.patterns.threshold import snap
from rconv_fast.progress import Event
from rconv_fast.walk.found import Known, Options, Pass
from rconv_fast.walk.graph import Graph, Step
from rconv_fast.walk.report import LayerReport

# Relative misfit up to which a pattern counts as met, in roundings of the gradients, and its least.
TOLERANCE, LEAST_TOLERANCE = 1e3, 1e-10
# Outputs this near, in units of the largest miss of a known maximum, are equal; at least in units of the tolerance.
TIE, LEAST_TIE = 2.0, 0.1
# Gradients behind an average over all positions are this even.
EVEN = 1e-6
# Longest search of one pattern where nobody set a limit.
SEARCH_SECONDS = 60.0
# Misfit up to which the input that a failed search came nearest to is handed on: a forward run of it may correct the
# layers behind.
NEAR = 0.2
SCHEDULES = (SHARP, SOFT, DESCENT, GENTLE)


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


@dataclass(frozen=True)
class _Chain:
    """A convolution, what stands between, and the hidden layer, first to last."""

    conv: Step
    between: tuple[Step, ...]
    hidden: Step

    @property
    def before_hidden(self) -> Step:
        """What the hidden layer takes."""
        return self.between[-1] if self.between else self.conv


def find_pattern(graph: Graph, passed: Pass, options: Options) -> Outcome:
    """Search the pattern that stopped a pass.

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
    chain = _chain(graph, passed.stop.step)
    problem = None if chain is None else _problem(graph, passed, chain, options)
    if chain is None or problem is None:
        other = f"{rule.kind}, behind something else than one convolution with what rises between"
        return Outcome(reason=other if rule.hidden else passed.stop.reason)
    system = problem.system(
        problem.hidden.tight(problem.hidden.choose(torch.ones_like(problem.hidden.relaxed().target)))
    )
    if system.count <= system.unknowns:
        few = f"{system.count} equations for {system.unknowns} unknowns"
        return Outcome(reason=f"{rule.kind}, where {few} prove no pattern")
    start = time.perf_counter()
    budget = options.budget if options.budget.is_limited else options.budget.at_most(SEARCH_SECONDS)
    if (least := WeightedSolver(problem.convolution).seconds) > budget.left:
        return Outcome(reason=f"{rule.kind}, where one step of a search takes {least:.0f} s: time_limit= allows it")
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
    reason = f"{rule.kind}, of which no pattern was found{within}"
    if nearest is None or nearest.misfit > NEAR or chain.conv.inputs[0] != graph.input:
        return Outcome(reason=reason)
    return replace(_outcome(graph, chain, problem, nearest, f"{nearest_by}, not certified", seconds), reason=reason)


Proposal = Callable[[Budget], Attempt]


def _proposals(problem: Problem, chain: _Chain) -> Iterator[tuple[str, Proposal]]:
    """Ways to search, cheapest first, by name."""
    if isinstance(problem.hidden, Averages):
        yield "packing", lambda budget: _packed(problem, chain, budget)
        return
    for schedule in SCHEDULES:
        yield schedule.name, functools.partial(alternate, problem, schedule)


def _packed(problem: Problem, chain: _Chain, budget: Budget) -> Attempt:
    """The pattern of a global average, whose row sums are the gradients of the biases."""
    assert isinstance(problem.hidden, Averages)
    made_by = chain.before_hidden.rule
    grad_bias = made_by.grad_bias if isinstance(made_by, ConvRule | AffineRule) else None
    if grad_bias is None:
        return Attempt(None, "")
    pattern, programs = pack(problem.convolution, problem.hidden, grad_bias, budget)
    certified = None if pattern is None else certify(problem, pattern)
    return Attempt(certified, f"{programs} linear programs")


def _outcome(graph: Graph, chain: _Chain, problem: Problem, found: Fit, how: str, seconds: float) -> Outcome:
    """Pieces and values as a pass takes them."""
    name = chain.conv.inputs[0]
    x = found.x.reshape(graph.steps[name].shape)
    values = {name: x}
    with torch.no_grad():
        for step in (chain.conv, *chain.between, chain.hidden):
            values[step.name] = x = step.forward(x)
    o = problem.convolution.output(found.x)
    miss = float(problem.hidden.residual(o, found.pattern).abs().max() / o.abs().max())
    pieces = problem.hidden.pieces(o, max(TIE * miss, LEAST_TIE * LEAST_TOLERANCE))
    report = LayerReport(chain.conv.label, chain.conv.rule.kind, found.evidence, seconds, how)
    determined = torch.full_like(values[name], found.certified, dtype=torch.bool)
    return Outcome(
        {chain.hidden.name: pieces.reshape(chain.hidden.shape)},
        Known(values, {name: determined}, {name: report}),
    )


def _chain(graph: Graph, name: str) -> _Chain | None:
    """The steps from a convolution to the hidden layer, where each feeds the next one only."""
    hidden = graph.steps[name]
    between: list[Step] = []
    step = graph.steps[hidden.inputs[0]]
    while isinstance(step.rule, ActivationRule | AffineRule) and len(graph.consumers[step.name]) == 1:
        between.insert(0, step)
        step = graph.steps[step.inputs[0]]
    alone = len(graph.consumers[step.name]) == 1
    usable = isinstance(step.rule, ConvRule) and step.rule.grad_weight is not None and alone
    return _Chain(step, tuple(between), hidden) if usable else None


def _problem(graph: Graph, passed: Pass, chain: _Chain, options: Options) -> Problem | None:
    """The hidden layer as a problem of its convolution, or None where it is of another kind."""
    folded, rest = _fold(graph, chain)
    if folded is None:
        return None
    tolerance = max(LEAST_TOLERANCE, TOLERANCE * options.precision)
    if isinstance(chain.hidden.rule, ActivationRule):
        averages = None if rest else _averages(graph, passed, chain.hidden)
        return None if averages is None else Problem(folded, averages, tolerance)
    behind = _knowledge_behind(graph, passed, chain.hidden)
    if behind is None:
        return None
    grad = passed.grads[chain.hidden.name]
    hidden: Hidden | None = None
    match chain.hidden.rule:
        case MaxPoolRule():
            hidden = _maxima(graph, chain, rest, behind, grad, tolerance, options)
        case ValleyRule() if not rest and behind.is_full:
            planes = [t.reshape(*t.shape[:2], -1) for t in (behind.value, grad)]
            hidden = Branches(chain.hidden.rule.valley, *planes)
    return None if hidden is None else Problem(folded, hidden, tolerance)


def _fold(graph: Graph, chain: _Chain) -> tuple[Convolution | None, tuple[Step, ...]]:
    """The convolution with the affine maps right behind it in its parameters, and what then stands between."""
    rule = chain.conv.rule
    assert isinstance(rule, ConvRule)
    weight, grad_weight = rule.weight, rule.grad_weight
    assert grad_weight is not None
    bias = weight.new_zeros(len(weight)) if rule.bias is None else rule.bias
    rest = list(chain.between)
    while rest and isinstance(affine := rest[0].rule, AffineRule):
        step = rest.pop(0)
        scale, shift = (_per_channel(t, step) for t in (affine.scale, affine.shift))
        if scale is None or shift is None or not bool(scale.all()):
            return None, ()
        per_filter = scale.reshape(-1, *(1,) * (weight.ndim - 1))
        weight, bias, grad_weight = weight * per_filter, bias * scale + shift, grad_weight / per_filter
    x = graph.steps[chain.conv.inputs[0]]
    low, high = _range(graph, x)
    batch = x.shape[0]
    image = x.name == graph.input
    return Convolution(rule.geometry, weight, bias, grad_weight, batch, low, high, image), tuple(rest)


def _per_channel(values: Tensor, step: Step) -> Tensor | None:
    """One number a channel (F,), or None where it varies within channels."""
    planes = values.detach().expand(step.shape)[0].flatten(1)
    return planes[:, 0] if bool((planes == planes[:, :1]).all()) else None


def _range(graph: Graph, x: Step) -> tuple[float, float]:
    """Between which numbers a step's values lie."""
    activations = graph.activations(x.name)
    if activations is None:
        return -math.inf, math.inf
    return min(a.low for a in activations), max(a.high for a in activations)


def _knowledge_behind(graph: Graph, passed: Pass, step: Step) -> Knowledge | None:
    """What the layers behind say of a step's values one by one."""
    if step.name in passed.values:
        return Knowledge.full(passed.values[step.name])
    consumers = graph.consumers[step.name]
    if len(consumers) != 1:
        return None
    consumer = graph.steps[consumers[0][0]]
    if isinstance(consumer.rule, ConvRule) or len(consumer.inputs) != 1:
        return None
    behind = _knowledge_behind(graph, passed, consumer)
    return None if behind is None else consumer.rule.pull_value(behind, 0, [None])


def _averages(graph: Graph, passed: Pass, step: Step) -> Averages | None:
    """One sample's rectified outputs in front of an average over all positions, else None."""
    rule, grad, consumers = step.rule, passed.grads[step.name].flatten(2), graph.consumers[step.name]
    assert isinstance(rule, ActivationRule)
    a = rule.activation
    behind = _knowledge_behind(graph, passed, graph.steps[consumers[0][0]]) if len(consumers) == 1 else None
    if behind is None or not behind.is_full or behind.value.numel() != grad.shape[1]:
        return None
    even = bool(torch.isclose(grad, grad.mean(-1, keepdim=True), rtol=EVEN, atol=0).all())
    rectifies = (a.low, a.high, a.flats) == (0.0, math.inf, (0.0,))
    usable = even and rectifies and grad.ndim == 3
    return Averages(behind.value.reshape(1, -1), grad.sum(-1), grad.shape[-1]) if usable else None


def _maxima(
    graph: Graph,
    chain: _Chain,
    rest: tuple[Step, ...],
    behind: Knowledge,
    grad: Tensor,
    tolerance: float,
    options: Options,
) -> Maxima | None:
    """The maxima pulled in front of everything that rises between the convolution and the pool."""
    rule = chain.hidden.rule
    assert isinstance(rule, MaxPoolRule)
    activations = [step.rule.activation for step in rest if isinstance(step.rule, ActivationRule)]
    known = behind
    for step in reversed(rest):
        if isinstance(step.rule, ActivationRule):
            made_by = graph.steps[step.inputs[0]].rule
            grad_bias = made_by.grad_bias if isinstance(made_by, ConvRule | AffineRule) else None
            clean = snap(step.rule.activation, known.value, grad, grad_bias, precision=options.precision)
            grad = step.rule.pull_gradient(grad, clean.value, 0, grad.shape)
            known = step.rule.pull_value(replace(known, value=clean.value), 0, [None])
        elif isinstance(step.rule, AffineRule):
            scale, shift = (_per_channel(t, step) for t in (step.rule.scale, step.rule.shift))
            if scale is None or shift is None or not bool((scale > 0).all()):
                return None
            per_channel = (1, -1, *(1,) * (grad.ndim - 2))
            rises = AffineRule(step.rule.kind, scale.reshape(per_channel), shift.reshape(per_channel))
            grad = rises.pull_gradient(grad, None, 0, grad.shape)
            known = rises.pull_value(known, 0, [None])
    consumer = graph.steps[graph.consumers[chain.hidden.name][0][0]]
    if isinstance(consumer.rule, ActivationRule):
        activations.append(consumer.rule.activation)
    floor = max(map(_floor, activations), default=math.inf)
    value, grad, alive = (t.flatten(2) for t in (known.value, grad, known.weight > 0))
    return Maxima.create(rule.windows, value, grad, alive, floor, LEAST_TIE * tolerance)


def _floor(activation: Activation) -> float:
    """What the inputs of the outputs that an activation hides do not exceed."""
    if activation.low in activation.flats and activation.high not in activation.flats:
        return float(activation.inverse(torch.tensor(activation.low, dtype=torch.float64)))
    return math.inf

"""What stands in front of a hidden layer, read as a problem of one convolution or of two.

Between the convolution and the hidden layer may stand activations that rise and affine maps: a maximum commutes with
what rises, and an affine map beside the convolution is part of it, ``s (W x + b) + t = (s W) x + (s b + t)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.valley import ValleyRule
from rconv_fast.patterns.averages import Averages
from rconv_fast.patterns.branches import Branches
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.merged import Merged
from rconv_fast.patterns.problem import Convolution, Hidden, Problem
from rconv_fast.patterns.threshold import snap
from rconv_fast.walk.found import Options, Pass
from rconv_fast.walk.graph import Graph, Step

# Relative misfit up to which a pattern counts as met, in roundings of the gradients, and its least.
TOLERANCE, LEAST_TOLERANCE = 1e3, 1e-10
# The same in units of a stated noise: the right pattern misses by about one, of the layer's gradients or those behind.
NOISY = 5.0
# Maxima this near, in units of that tolerance, are equal.
EQUAL = 0.1
# Gradients behind an average over all positions are this even.
EVEN = 1e-6


@dataclass(frozen=True)
class Chain:
    """A convolution, what stands between, and the hidden layer, first to last; where two are merged, `before` it."""

    conv: Step
    between: tuple[Step, ...]
    hidden: Step
    before: Chain | None = None

    @property
    def before_hidden(self) -> Step:
        """What the hidden layer takes."""
        return self.between[-1] if self.between else self.conv

    @property
    def first(self) -> Step:
        """The convolution whose input is unknown."""
        return self.conv if self.before is None else self.before.first

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them."""
        return (*(() if self.before is None else self.before.steps), self.conv, *self.between, self.hidden)


def read_chain(graph: Graph, name: str) -> Chain | None:
    """The steps from a convolution to the hidden layer, where each feeds the next one only."""
    hidden = graph.steps[name]
    between: list[Step] = []
    step = graph.steps[hidden.inputs[0]]
    while isinstance(step.rule, ActivationRule | AffineRule) and len(graph.consumers[step.name]) == 1:
        between.insert(0, step)
        step = graph.steps[step.inputs[0]]
    alone = len(graph.consumers[step.name]) == 1
    usable = isinstance(step.rule, ConvRule) and step.rule.grad_weight is not None and alone
    return Chain(step, tuple(between), hidden) if usable else None


def merge(graph: Graph, chain: Chain, problem: Problem) -> tuple[Chain, Problem] | None:
    """The same with the convolution before, where one activation that is linear on both sides of 0 stands between."""
    between = graph.steps[chain.first.inputs[0]]
    rule, last = between.rule, problem.front
    if not isinstance(rule, ActivationRule) or not isinstance(last, Convolution):
        return None
    before = read_chain(graph, between.name)
    if before is None or len(graph.consumers[between.name]) != 1 or not _is_bent_at_zero(between):
        return None
    first, rest = _fold(graph, before)
    if first is None or rest:
        return None
    front = Merged(first, last, rule.activation, lambda o: between.forward(o.view(between.shape)))
    return replace(chain, before=before), replace(problem, front=front)


def _is_bent_at_zero(step: Step) -> bool:
    """Whether an activation is ``A(o) = A'(o) o``."""
    assert isinstance(step.rule, ActivationRule)
    o = torch.linspace(-3, 3, step.shape.numel(), dtype=torch.float64).view(step.shape)
    with torch.no_grad():
        a = step.forward(o)
    return bool(torch.allclose(a, step.rule.activation.derivative(a) * o, rtol=1e-12, atol=0))


def read_problem(graph: Graph, passed: Pass, chain: Chain, options: Options) -> Problem | None:
    """The hidden layer as a problem of its convolution, or None where it is of another kind."""
    folded, rest = _fold(graph, chain)
    if folded is None:
        return None
    tolerance = max(LEAST_TOLERANCE, TOLERANCE * options.precision, NOISY * _noise_of(chain.conv, options))
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
            determined = passed.determined.get(chain.hidden.name, torch.ones_like(grad, dtype=torch.bool))
            hidden = _maxima(graph, chain, rest, behind, determined, grad, tolerance, options)
        case ValleyRule() if not rest and behind.is_full:
            planes = [t.reshape(*t.shape[:2], -1) for t in (behind.value, grad)]
            hidden = Branches(chain.hidden.rule.valley, *planes)
    return None if hidden is None else Problem(folded, hidden, tolerance)


def _noise_of(step: Step, options: Options) -> float:
    """Of a convolution's gradients, relative."""
    rule = step.rule
    if not isinstance(rule, ConvRule) or rule.grad_weight is None or not bool(rule.grad_weight.any()):
        return 0.0
    return options.relative_noise(rule.stored.weight_name, rule.grad_weight)


def _fold(graph: Graph, chain: Chain) -> tuple[Convolution | None, tuple[Step, ...]]:
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
    chain: Chain,
    rest: tuple[Step, ...],
    behind: Knowledge,
    determined: Tensor,
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
    fixed = determined | (grad != 0)  # an open value passes no gradient on
    value, grad, alive, fixed = (t.flatten(2) for t in (known.value, grad, known.weight > 0, fixed))
    bound = torch.where(fixed, floor, math.inf).to(value)
    return Maxima.create(rule.windows, value, grad, alive & fixed, bound, EQUAL * tolerance)


def _floor(activation: Activation) -> float:
    """What the inputs of the outputs that an activation hides do not exceed."""
    if activation.low in activation.flats and activation.high not in activation.flats:
        return float(activation.inverse(torch.tensor(activation.low, dtype=torch.float64)))
    return math.inf

"""A start for the joint estimate under noise: the recursion with rows weighted by the noise that reaches them.

Where the exact recursion asks on which side of its kink an activation is, this one asks how likely: a recovered value a
with the error s is active with probability p, its gradient is ``p dL/da`` with the variance ``p (1 - p) (dL/da)^2``;
one that is all but sure is taken for sure, since a small chance to be wrong by much is no noise in every row of its
filter: the few filters that are wrong show it by what their rows miss, and are weighed down (`solve_robustly`).
Gradient rows weigh ``1 / (sigma^2 + R^2 sum var g)``, R the size of the layer's input; of the weight rows only those
with ``p > 0.99`` are kept, for one wrong among them does more harm than many that miss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.budget import Budget
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.layer_start import WeightedRows, solve_robustly
from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.walk.graph import Graph, Step

# Weight rows below this probability to be active are dropped.
SURE = 0.99
# Errors drawn for the error of dL/da.
DRAWS = 4


@dataclass(frozen=True)
class Uncertain:
    """Values with their standard deviations."""

    value: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class _Output:
    """What is known at a convolution's output: value and its weight, gradient and its variance.

    `sides` are positive where an activation on the way is above its kink, by its name.
    """

    z: Tensor
    weight: Tensor
    g: Tensor
    variance: Tensor
    sides: Mapping[str, Tensor]


def noisy_start(problem: GradientMap, known: Mapping[str, Tensor], budget: Budget) -> tuple[Tensor, Pattern] | None:
    """The network's input, roughly, from the tensors `known` in front of its last layer; and the sides of its kinks.

    A run on the input would not say them: it may be far less exact than the layers behind it.

    Parameters
    ----------
    problem : GradientMap
        Gradients, noise, and the model's steps.
    known : mapping of str to Tensor
        Recovered inputs of the last layers, by step name.
    budget : Budget
        When to give up.

    Returns
    -------
    Tensor and Pattern, or None
        None where the network is no chain of convolutions, activations and rearrangements.
    """
    graph = problem.graph
    if graph is None:
        return None
    layers = _chain(graph)
    if layers is None or graph.steps[graph.output].inputs[0] not in known:
        return None
    sizes = _sizes(problem, graph)
    name = graph.steps[graph.output].inputs[0]
    found, sides = _head_input(problem, graph.steps[graph.output], known[name]), dict[str, Tensor]()
    for layer in layers:
        if budget.spent:
            return None
        output = _at_output(problem, graph, layer, name, found, sizes)
        sides |= output.sides
        name = layer.inputs[0]
        found = _solve(problem, graph, layer, output, sizes[name])
        if graph.never_negative(name):
            found = _rectified(found)
    return (found.value, Pattern(sides, origin="noisy recursion")) if name == graph.input else None


def _chain(graph: Graph) -> list[Step] | None:
    """The layers in front of the last one, last first; None if the network is no chain of what is handled here."""
    steps = list(graph.steps.values())
    single = all(len(step.inputs) == 1 and len(graph.consumers[step.inputs[0]]) == 1 for step in steps[1:])
    kinds = ConvRule | ActivationRule | AffineRule | RearrangeRule
    if not single or not all(isinstance(step.rule, kinds) for step in steps[1:]):
        return None
    layers = [step for step in reversed(steps) if isinstance(step.rule, ConvRule)]
    return layers[1:] if layers and layers[0].name == graph.output else None


def _sizes(problem: GradientMap, graph: Graph) -> dict[str, float]:
    """Root mean square of each step's tensor when the network is run on noise in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    like = next(iter(problem.seen.values()))
    x = torch.rand(graph.steps[graph.input].shape, generator=generator, dtype=like.dtype).to(like.device)
    return {name: float(v.square().mean().sqrt()) for name, v in graph.forward(x).items()}


def _head_input(problem: GradientMap, head: Step, value: Tensor) -> Uncertain:
    """The last layer's input from its own gradient: ``dW = d^T h`` solved for h with d taken at the last h."""
    assert isinstance(head.rule, ConvRule)
    weight = problem.name_of(head.rule.stored.weight)
    if weight is None:
        return Uncertain(value, torch.full_like(value, 1e-6 * float(value.abs().max())))
    w = problem.weight(weight).expand(problem.seen[weight].shape)
    h = value
    for _ in range(3):
        d = _loss_gradient(problem, head.inputs[0], h)[1]
        normal = torch.einsum("bf,fc,ef->cbe", d, w.square(), d)
        right = torch.einsum("bf,fc->cb", d, w.square() * problem.seen[weight])
        h = torch.linalg.solve(normal, right).mT
    inverse = torch.linalg.inv(normal).diagonal(dim1=1, dim2=2)
    return Uncertain(h, inverse.clamp_min(0).sqrt().mT.contiguous())


def _loss_gradient(problem: GradientMap, start: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """``c dL/d(step)`` at a value of the step, and by the logits."""
    assert problem.graph is not None
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        logits = problem.values(value, start)[problem.graph.output]
        loss = problem.scale * problem.loss(logits, problem.targets)
        by_value, by_logits = torch.autograd.grad(loss, [value, logits])
    return by_value, by_logits


def _at_output(
    problem: GradientMap, graph: Graph, layer: Step, name: str, found: Uncertain, sizes: Mapping[str, float]
) -> _Output:
    """From the tensor `name` back to the output of the layer in front of it."""
    gradient, _ = _loss_gradient(problem, name, found.value)
    generator = torch.Generator().manual_seed(0)
    errors = [_normal(found.value, generator) * found.deviation for _ in range(DRAWS)]
    moved = torch.stack([_loss_gradient(problem, name, found.value + e)[0] - gradient for e in errors])
    variance = moved.square().mean(0)
    a, s = found.value, found.deviation
    step, weight, sides = graph.steps[name], None, dict[str, Tensor]()
    while step.name != layer.name:
        rule, shape = step.rule, graph.steps[step.inputs[0]].shape
        if isinstance(rule, RearrangeRule):
            a, s, gradient, variance = (_moved_back(rule, t) for t in (a, s, gradient, variance))
            weight = None if weight is None else _moved_back(rule, weight)
        elif isinstance(rule, AffineRule):
            weight = 1 / s.square() if weight is None else weight
            a, weight = (a - rule.shift) / rule.scale, weight * rule.scale.square()
            gradient, variance = gradient * rule.scale, variance * rule.scale.square()
        else:
            assert isinstance(rule, ActivationRule)
            a, weight, slope, doubt, sides[step.name] = _through(rule, a, s, sizes[step.name])
            variance = gradient.square() * doubt + variance * slope.square()
            gradient = gradient * slope
        step = graph.steps[step.inputs[0]]
        assert a.shape == shape
    return _Output(a, 1 / s.square() if weight is None else weight, gradient, variance, sides)


def _moved_back(rule: RearrangeRule, values: Tensor) -> Tensor:
    return rule.pull_value(Knowledge.full(values), 0, ()).value


def _through(rule: ActivationRule, a: Tensor, s: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input of an activation, weight of it, the slope there, the slope's variance and the side, from its output."""
    activation = rule.activation
    if activation.name == "ReLU":
        p = active_probability(a, s, size)
        p = torch.where((p - 0.5).abs() < SURE - 0.5, p, (p > 0.5).to(p))
        return a, torch.where(p > SURE, 1 / s.square(), 0.0), p, p * (1 - p), p - 0.5
    low, high = activation.low, activation.high
    margin = 1e-4 * (high - low) if math.isfinite(high - low) else 1e-6 * size
    inside = a.clamp(low + margin if math.isfinite(low) else low, high - margin if math.isfinite(high) else high)
    slope = activation.derivative(inside)
    z = activation.inverse(inside)
    step = s.clamp_max(size)
    left, right = (activation.derivative((inside + e).clamp(low, high)) for e in (-step, step))
    doubt = ((right - left) / 2).square()
    return z, (slope / s).square(), slope, doubt, z


def active_probability(a: Tensor, s: Tensor, size: float) -> Tensor:
    """Probability that a rectified value is not 0, seen as a with the error s; half normal of this size before."""
    total = (s.square() + size**2).sqrt()
    slab = math.log(2) - torch.log(total) - (a / total).square() / 2 + torch.special.log_ndtr(a * size / (s * total))
    spike = -torch.log(s) - (a / s).square() / 2
    return torch.sigmoid(slab - spike)


def _rectified(found: Uncertain) -> Uncertain:
    """Behind a ReLU no true value is negative: the negative ones are the error, seen."""
    below = -found.value[found.value < 0]
    least = max(float(below.median()) / 0.6745, float(below.max()) / 2) if len(below) > 8 else 0.0
    return Uncertain(found.value.clamp_min(0), found.deviation.clamp_min(least))


def _solve(problem: GradientMap, graph: Graph, layer: Step, output: _Output, size: float) -> Uncertain:
    """The layer's input from its gradient and its outputs."""
    assert isinstance(layer.rule, ConvRule)
    rule, geometry = layer.rule, layer.rule.geometry
    shape = torch.Size((layer.shape[0], geometry.out_channels, *geometry.out_size))
    z, v, g = output.z.reshape(shape), output.weight.reshape(shape), output.g.reshape(shape)
    if rule.bias is not None:
        z = z - rule.bias.reshape(1, -1, *(1,) * geometry.ndim)
    name = problem.name_of(rule.stored.weight)
    weight = rule.weight
    if name is None:
        w, seen = torch.zeros_like(weight), torch.zeros_like(weight)
    else:
        spread = output.variance.reshape(shape).transpose(0, 1).flatten(1).sum(1).reshape(-1, *(1,) * (weight.ndim - 1))
        sigma2 = problem.weight(name).square().reciprocal().expand(problem.seen[name].shape).reshape(weight.shape)
        w, seen = 1 / (sigma2 + size**2 * spread), problem.seen[name].reshape(weight.shape)
    x, deviation = solve_robustly(WeightedRows(rule, g, w, seen, v, z, prior=1 / (2 * size) ** 2))
    step = graph.steps[layer.inputs[0]]
    return Uncertain(x.reshape(step.shape), deviation.reshape(step.shape))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

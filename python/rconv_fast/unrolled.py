"""One sample behind several local steps (experimental): started at the weights half way, matched step by step.

The mean gradient is nearly that of the weights half way: the recursion there, told how nearly, gives a start. What the
steps at the start's own weights differ from one step half way corrects the mean, and the recursion is run again. Where
that stays far, the mean is half way's gradient under noise, of which the most likely input is nearer. From the best
start Gauss-Newton steps through the unrolled training follow; each flipped side of an activation is a jump that no
derivative shows, so the sides nearest to their kinks are unknowns beside the input: relaxed from far away, then settled
one after the other, those of an activation in all steps together and those of single steps.
Exact is only what reproduces the whole update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rconv_fast.errors import LinAlgError
from rconv_fast.estimate import entry_noise, joint_answer
from rconv_fast.estimate.bits import Doubt, settle
from rconv_fast.estimate.bounds import DENSE_UP_TO
from rconv_fast.estimate.fisher import fisher_from_products
from rconv_fast.estimate.gauss_newton import gauss_newton
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.information import Information
from rconv_fast.estimate.pieces import Bits
from rconv_fast.estimate.unrolled import TiedMap, UnrolledMap
from rconv_fast.heads.candidates import HeadCandidate
from rconv_fast.layers.conv import ConvRule
from rconv_fast.observation import Match
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.polish import freed_step, gauss_newton_step, nearest, polish, sides, sides_of, size_of
from rconv_fast.progress import Event
from rconv_fast.request import Request
from rconv_fast.verdict import Answer, match_bar, same_answer
from rconv_fast.walk.found import Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.reader import build_graph
from rconv_fast.walk.search import forward_pieces, passes

# How far the mean may be from a gradient half way: what the recursion is told to expect, one after the other.
ROUGHNESS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
# Corrections of the mean; each must lower the mismatch by a twentieth.
STARTS, GAIN = 3, 0.95
# A start that misses more is estimated under noise: relative to a gradient, that of the last layer and of the others.
NEAR, NOISE = 0.01, (0.01, 0.1)
# Rounds, so many without a better one; most Gauss-Newton steps in one.
ROUNDS, PATIENCE, STEPS = 60, 15, 4
# The share of the activations whose sides are relaxed: so many times the relative mismatch, within these bounds.
# At 40 dB wrong sides were among the nearest fiftieth, not all among the nearest hundredth.
SHARE, LEAST, MOST = 1.5, 0.03, 0.3
# Relative mismatch below which sides are settled where the information fits; and below which no side is wrong any more.
RELAXED, SETTLED = 0.03, 1e-7
# Shares of the activations whose sides are settled, tied over the steps; then of the sides of single steps.
TIED, SINGLE = (0.01, 0.05, 0.2), (0.002, 0.01)
# Relaxed sides that miss no more than this are tried as they are when rounded, too: they tell those that x does not.
ROUNDED = 0.05
# Iterations and ridge of a step with relaxed sides; and what ends its iterations beside its mismatch.
ITERATIONS, RIDGE, FALL = 250, 1e-6, 1e-2


@dataclass(frozen=True)
class _Problem:
    """What one reading of the head is matched with."""

    request: Request
    report: Callable[[Event], None]
    whole: UnrolledMap

    @property
    def bar(self) -> float:
        """The mismatch that the arithmetic explains."""
        return match_bar(self.request.observation.precision)

    def mismatch(self, x: Tensor) -> float:
        """Of the unrolled steps, in root mean squares of each gradient; infinite where they diverge."""
        return self.relative(self.whole, x)

    def relative(self, steps: UnrolledMap, x: Tensor) -> float:
        """Of steps with sides that are held."""
        found = self.request.observation.rounding * size_of(steps.residual(x))
        return found if math.isfinite(found) else math.inf


def not_unrolled(request: Request, graph: Graph) -> str:
    """Why several steps on such a model are not matched with one sample; empty where they are."""
    rule = graph.steps[graph.output].rule
    if graph.in_training:
        return "norms or dropout in training mode, whose statistics or masks each step has of its own, are not unrolled"
    if graph.unread or graph.wrappers or not request.loss.takes_labels or request.scale != 1.0:
        return "only a model that is read whole, a loss of labels and a known scale are unrolled"
    if not isinstance(rule, ConvRule) or rule.grad_weight is None or rule.grad_bias is None:
        return "the start needs the weight and the bias of the last layer"
    return ""


def one_sample(request: Request, graph: Graph) -> HeadCandidate | None:
    """The head's reading where all steps saw one sample: ``delta = db``, ``input = db dW / db^2``, nearly.

    None where that is not covered.
    """
    step = graph.steps[graph.output]
    rule = step.rule
    if request.gradients.training is None or not_unrolled(request, graph) or not isinstance(rule, ConvRule):
        return None
    if rule.grad_weight is None or rule.grad_bias is None or not bool(rule.grad_bias.any()):
        return None
    d = rule.grad_bias
    value = (d @ rule.grad_weight.flatten(1)) / d.square().sum()
    label = d.argmin()[None]
    ones = torch.ones(1, dtype=torch.int64, device=d.device)
    values = {step.inputs[0]: value[None]}
    return HeadCandidate(d[None], label, values, torch.zeros_like(d[:1]), ones, complete=True, spare=len(d) - 1)


def answer_of_steps(
    request: Request, single: Graph, head: HeadCandidate, before: nn.Module, report: Callable[[Event], None]
) -> Answer:
    """The input behind several steps, good only if it reproduces the whole update; determined only if that is proven.

    Parameters
    ----------
    request : Request
        Its model at the weights half way.
    single : Graph
        Of that model.
    head : HeadCandidate
        One sample.
    before : nn.Module
        A working copy at the weights before the first step.
    report : callable
        Is told what happens.
    """
    observation, training = request.observation, request.gradients.training
    assert training is not None
    sizes = {name: observation.rounding * g.square().mean().sqrt() for name, g in observation.gradients.items()}
    sigma = {name: torch.where(size > 0, size, math.inf) for name, size in sizes.items()}
    shape = torch.Size((1, *request.shape))
    read = GradientMap.read(before, observation.loss, head.labels, observation.gradients, sigma, shape)
    whole = UnrolledMap(**vars(read), training=training)
    problem = _Problem(request, report, whole)
    found = _start(problem, head)
    start = _estimated(problem, single, head, found.values.get(single.input))
    if start is None:
        return Answer(head, single, found, None, good=False)
    x = _refined(problem, start)
    match = _match(problem, x)
    good = match.relative <= problem.bar
    shown = found.with_value(single.input, x)
    proof = _proof(problem, head, x) if good else None
    if proof is None:
        nothing = torch.zeros_like(x, dtype=torch.bool)
        shown = replace(shown, determined={**shown.determined, single.input: nothing})
        return Answer(head, single, shown, match, good)
    return Answer(head, single, proof.with_value(single.input, x), match, good)


def _start(problem: _Problem, head: HeadCandidate) -> Pass:
    """The best of the recursions half way, the mean gradient corrected by the best before."""
    request = problem.request
    mean, gradients = request.observation.gradients, request.observation.gradients
    best, least = Pass({}, {}), math.inf
    for _ in range(STARTS):
        found, size = best, math.inf
        graph = build_graph(request.model, gradients, request.shape, 1, request.dtype)
        corrected = one_sample(request, graph)
        if corrected is None:
            break
        for roughness in ROUGHNESS:
            if request.budget.spent:
                break
            options = Options(roughness, None, request.budget, problem.report)
            passed, _ = passes(graph, corrected.grad_logits, Known(corrected.values), Pattern(), options)
            x = passed.values.get(graph.input)
            miss = math.inf if x is None or not bool(x.isfinite().all()) else problem.mismatch(x)
            if miss < size or not found.values:
                found, size = passed, miss
        if not size < GAIN * least:
            break
        best, least = found, size
        shift = _correction(problem, head, best.values[graph.input])
        gradients = {name: mean[name] + shift[name] for name in mean}
    return best


def _estimated(problem: _Problem, single: Graph, head: HeadCandidate, start: Tensor | None) -> Tensor | None:
    """The start, or the most likely input where the mean is half way's gradient under noise: the one that misses less.

    What the correction of the mean at an estimate moves is how far the next is taken to be off.
    """
    request, whole = problem.request, problem.whole
    observation, names = request.observation, list(whole.parameters)
    shape = torch.Size((1, *request.shape))
    best, least = start, math.inf if start is None else problem.mismatch(start)
    mean = gradients = {name: observation.gradients[name] for name in names}
    last = _names_of_head(single)
    noise = {name: NOISE[name not in last] * size_of([g]) for name, g in mean.items()}
    for _ in range(2):
        if least < NEAR or request.budget.spent or shape.numel() > DENSE_UP_TO:
            break
        seen = replace(observation, gradients=gradients, noise=noise)
        found = joint_answer(request.working_model, seen, head.labels, head.values, shape, best, request.budget)
        if found is not None and problem.mismatch(found.inputs) < least:
            best, least = found.inputs, problem.mismatch(found.inputs)
        if best is None:
            break
        shift = _correction(problem, head, best)
        gradients = {name: mean[name] + part for name, part in shift.items()}
        noise = {name: size_of([part]) / 2 for name, part in shift.items()}
    return best


def _names_of_head(graph: Graph) -> tuple[str, str]:
    """Of the last layer's parameters."""
    rule = graph.steps[graph.output].rule
    assert isinstance(rule, ConvRule)
    return rule.stored.weight_name, rule.stored.bias_name


def _correction(problem: _Problem, head: HeadCandidate, x: Tensor) -> dict[str, Tensor]:
    """What one step half way differs from the mean of the steps, at x."""
    steps = [g.detach() for g in problem.whole.gradients(x)]
    half = problem.request.observation.gradients_at(problem.request.working_model, x, head.labels)
    return {name: half[name] - g for name, g in zip(problem.whole.parameters, steps, strict=True)}


def _refined(problem: _Problem, x: Tensor) -> Tensor:
    """Gauss-Newton through the steps with the sides nearest to their kinks free; the best input on the way."""
    budget = problem.request.budget
    best, least = x, problem.mismatch(x)
    size, better = least, 0  # of the last round, and the round that was best
    for number in range(ROUNDS):
        if least <= problem.bar / 30 or budget.spent or number - better > PATIENCE:
            break
        last = size
        x = _round(problem, x, size)
        size = problem.mismatch(x)
        problem.report(Event("input", "several steps", number, None, size))
        if not math.isfinite(size) or size == last:
            break
        if size < least:
            best, least, better = x, size, number
    return best


def _round(problem: _Problem, x: Tensor, size: float) -> Tensor:
    """From far away a few steps with relaxed sides; nearer all sides held, after those in doubt are settled."""
    inputs = problem.whole.kink_inputs(x)
    if not inputs:
        return polish(problem.whole, x, 0.0, problem.request.budget)
    if size < RELAXED and x.numel() <= DENSE_UP_TO:
        try:
            return _settled(problem, x, inputs)
        except LinAlgError:  # the information has no factors in float64
            return x
    return _relaxed(problem, x, inputs, 0.0 if size < SETTLED else min(max(SHARE * size, LEAST), MOST))


def _relaxed(problem: _Problem, x: Tensor, inputs: Bits, share: float) -> Tensor:
    """A few steps with one choice of free sides, which stay relaxed from one to the next."""
    whole = problem.whole
    bits, doubt = sides(inputs), nearest(inputs, share)
    last = math.inf
    for _ in range(STEPS):
        size = problem.relative(whole.held(bits), x)
        if problem.request.budget.spent or not size < 0.5 * last:
            break
        last = size
        fall = min(FALL, size) * 1e-2
        ridge = RIDGE * min(1.0, size**2)
        x, bits = freed_step(whole, x, bits, doubt, ridge=ridge, fall=fall, most=ITERATIONS)
        bits = {name: d.clamp(-0.5, 1.5) for name, d in bits.items()}
    if not last < ROUNDED:
        return x
    rounded = whole.held({name: sides_of(d) for name, d in bits.items()})
    return min(x, x + gauss_newton_step(rounded.at(x), ITERATIONS), key=problem.mismatch)


def _settled(problem: _Problem, x: Tensor, inputs: Bits) -> Tensor:
    """The input that fits the best of several choices of sides in doubt, settled by the information there."""
    whole, tied, budget = problem.whole, problem.whole.tied(inputs), problem.request.budget
    information = Information.create(fisher_from_products(whole.held(sides(inputs)), x), x.shape)
    best, least, kept, steps = x, math.inf, whole, whole.training.steps
    choices: list[tuple[UnrolledMap, Bits, Doubt, int]] = [
        *((tied, _shares(tied), _nearest(tied, share), steps) for share in TIED),
        *((whole, sides(inputs), nearest(inputs, share), 1) for share in SINGLE),
    ]
    for of_bits, bits, doubt, levels in choices:
        if budget.spent:
            break
        moved, settled = settle(of_bits.held(bits), x, bits, doubt, information, levels=levels)
        held = of_bits.held(settled)
        found = gauss_newton(held, moved, information.solve, budget=budget, most=1).x
        size = problem.relative(held, found)
        if size < least:
            best, least, kept = found, size, held
    return gauss_newton(kept, best, information.solve, budget=budget, most=STEPS).x


def _shares(tied: TiedMap) -> dict[str, Tensor]:
    """Of the steps in which each activation is on its right side, on the run."""
    return {name: (z > 0).to(z).mean(0) for name, z in tied.of_each().items()}


def _nearest(tied: TiedMap, share: float) -> Doubt:
    """The activations that are nearest to their kink in one of the steps."""
    return nearest({name: z.abs().amin(0) for name, z in tied.of_each().items()}, share)


def _match(problem: _Problem, x: Tensor) -> Match:
    """Of all steps with the update."""
    observation, found = problem.request.observation, problem.whole.gradients(x)
    miss = seen = chi2 = 0.0
    for (name, g), other in zip(observation.gradients.items(), found, strict=True):
        difference = (other.detach() - g).square()
        miss, seen = miss + float(difference.sum()), seen + float(g.square().sum())
        chi2 += float((difference / entry_noise(observation, name).square()).sum())
    entries = sum(g.numel() for g in found)
    return Match(math.sqrt(miss / seen), math.sqrt(chi2 / entries), chi2, entries)


def _proof(problem: _Problem, head: HeadCandidate, x: Tensor) -> Pass | None:
    """The recursion on the gradients that x has half way: whether they fix it; None if it finds something else."""
    request, observation = problem.request, problem.request.observation
    exact = observation.gradients_at(request.working_model, x, head.labels)
    graph = build_graph(request.model, exact, request.shape, 1, request.dtype)
    of_x = one_sample(request, graph)
    if of_x is None:
        return None
    options = Options(observation.precision, None, request.budget, problem.report)
    pattern = Pattern(origin="forward run").with_pieces(forward_pieces(graph, x, 0.0))
    found, _ = passes(graph, of_x.grad_logits, Known(of_x.values), pattern, options)
    again = found.values.get(graph.input)
    return found if again is not None and same_answer(again, x) else None

"""One sample behind several local steps (experimental): started at the weights half way, matched step by step.

The mean gradient is nearly that of the weights half way: the recursion there, told how nearly, gives a start. What the
steps at the start's own weights differ from one step half way corrects the mean, and the recursion is run again. From
the best start Gauss-Newton steps through the unrolled training follow; each flipped side of an activation is a jump
that no derivative shows, so the sides nearest to their kinks are unknowns beside the input. Exact is only what
reproduces the whole update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rconv_fast.estimate import entry_noise
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.unrolled import UnrolledMap
from rconv_fast.heads.candidates import HeadCandidate
from rconv_fast.layers.conv import ConvRule
from rconv_fast.observation import Match
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.polish import freed_step, nearest, polish, sides, size_of
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
# Rounds of Gauss-Newton with free sides, steps in each, and the share that is free at first and at most.
ROUNDS, STEPS, SHARE, MOST = 30, 4, 0.15, 0.3
# Iterations and ridge of a step.
ITERATIONS, RIDGE = 250, 1e-6
# Relative mismatch below which no side is wrong any more; and what ends a step's iterations beside its mismatch.
SETTLED, FALL = 1e-7, 1e-2


@dataclass(frozen=True)
class _Problem:
    """What one reading of the head is matched with."""

    request: Request
    report: Callable[[Event], None]
    whole: UnrolledMap

    def mismatch(self, x: Tensor) -> float:
        """Of the unrolled steps, in root mean squares of each gradient; infinite where they diverge."""
        found = size_of(self.whole.residual(x))
        return found if math.isfinite(found) else math.inf


def one_sample(request: Request, graph: Graph) -> HeadCandidate | None:
    """The head's reading where all steps saw one sample: ``delta = db``, ``input = db dW / db^2``, nearly.

    None where that is not covered: several samples, a head without a bias, layers in training mode, other losses.
    """
    step = graph.steps[graph.output]
    rule, training = step.rule, request.gradients.training
    plain = training is not None and not graph.in_training and not graph.unread and not graph.wrappers
    if not plain or not isinstance(rule, ConvRule) or not request.loss.takes_labels or request.scale != 1.0:
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
    sizes = {name: g.square().mean().sqrt() for name, g in observation.gradients.items()}
    sigma = {name: torch.where(size > 0, size, math.inf) for name, size in sizes.items()}
    shape = torch.Size((1, *request.shape))
    read = GradientMap.read(before, observation.loss, head.labels, observation.gradients, sigma, shape)
    whole = UnrolledMap(**vars(read), training=training)
    problem = _Problem(request, report, whole)
    found = _start(problem, head)
    if single.input not in found.values:
        return Answer(head, single, found, None, good=False)
    x = _refined(problem, found.values[single.input])
    match = _match(problem, x)
    good = match.relative <= match_bar(observation.precision)
    shown = found.with_value(single.input, x)
    proof = _proof(problem, head, x) if good else None
    if proof is None:
        nothing = torch.zeros_like(x, dtype=torch.bool)
        shown = replace(shown, determined={**shown.determined, single.input: nothing})
        return Answer(head, single, shown, match, good)
    return Answer(head, single, proof.with_value(single.input, x), match, good)


def _start(problem: _Problem, head: HeadCandidate) -> Pass:
    """The best of the recursions half way, the mean gradient corrected by the best before."""
    request, whole = problem.request, problem.whole
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
        x = best.values[graph.input]
        names = list(whole.parameters)
        steps = dict(zip(names, (g.detach() for g in whole.gradients(x)), strict=True))
        half = request.observation.gradients_at(request.working_model, x, head.labels)
        gradients = {name: mean[name] - steps[name] + half[name] for name in mean}
    return best


def _refined(problem: _Problem, x: Tensor) -> Tensor:
    """Gauss-Newton through the steps with the sides nearest to their kinks free; the best input on the way."""
    budget, bar = problem.request.budget, match_bar(problem.request.observation.precision)
    best, least, last, share = x, problem.mismatch(x), math.inf, SHARE
    for number in range(ROUNDS):
        if least <= bar / 30 or budget.spent:
            break
        x = _round(problem, x, share)
        size = problem.mismatch(x)
        problem.report(Event("input", "several steps", number, None, size))
        if not math.isfinite(size):
            break
        if size < SETTLED and size > 0.3 * last:
            break
        share = _next_share(share, size, last, number)
        last = size
        if size < least:
            best, least = x, size
    return best


def _next_share(share: float, size: float, last: float, number: int) -> float:
    """Fewer free sides while the mismatch falls; else now more, now fewer; none when it is small."""
    if size < SETTLED:
        return 0.0
    share = 0.7 * share if size < 0.9 * last else min(share * (1.3 if number % 2 else 0.5), MOST)
    return share if share > 2e-3 else 0.03


def _round(problem: _Problem, x: Tensor, share: float) -> Tensor:
    """A few steps with one choice of free sides, which stay relaxed from one to the next."""
    whole = problem.whole
    inputs = whole.kink_inputs(x)
    if not inputs:
        return polish(whole, x, 0.0, problem.request.budget)
    bits, doubt = sides(inputs), nearest(inputs, share)
    last = math.inf
    for _ in range(STEPS):
        size = size_of(whole.held(bits).residual(x))
        if problem.request.budget.spent or not size < 0.5 * last:
            break
        last = size
        fall = min(FALL, size) * 1e-2
        ridge = RIDGE * min(1.0, size**2)
        x, bits = freed_step(whole, x, bits, doubt, ridge=ridge, fall=fall, most=ITERATIONS)
        bits = {name: d.clamp(-0.5, 1.5) for name, d in bits.items()}
    return x


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

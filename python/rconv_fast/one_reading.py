"""What one reading of the head leads to: the recursion, polished where it nearly matches, estimated under noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rconv_fast.estimate import entry_noise, joint_answer, snapped, with_arithmetic
from rconv_fast.estimate.answer import JOINT_UP_TO
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.heads.candidates import HeadCandidate
from rconv_fast.losses import Linear
from rconv_fast.observation import Match, Observation
from rconv_fast.polish import polish
from rconv_fast.progress import Event
from rconv_fast.request import Request
from rconv_fast.verdict import Answer, fits, match_bar, statistics_fit, within_noise
from rconv_fast.walk.found import INTERRUPTED, Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport
from rconv_fast.walk.search import Found, only_input_open, recover

# Gradient matching helps an answer that is nearly right; sizes above the limit would take minutes.
POLISH_FROM, POLISH_UP_TO = 0.1, 100_000
# Zeros that stay zeros count in a polish's goal and not in a match: at the goal an answer may miss by so much.
NEARLY = 2.0


def answer_of(
    request: Request, single: Graph, head: HeadCandidate, batch_size: int | None, report: Callable[[Event], None]
) -> Answer:
    """The recursion from one reading of the head, polished where it nearly matches.

    A sample that occurs m times is solved for once, with m times its gradient: the equations are the same.
    """
    observation = replace(request.observation, scale=head.scale)
    ones = torch.ones_like(head.multiplicities)  # in training mode every copy counts in the statistics
    times = ones if single.in_training else head.multiplicities
    first, index = _distinct(times)
    graph = single if len(first) == 1 else request.graph(len(first))
    grad_logits = head.grad_logits[first] * times[first, None]
    known = Known({name: value[first] for name, value in head.values.items()})
    options = Options(observation.precision, request.prior, request.budget, report, observation.noise)
    bar = match_bar(observation.precision)

    seen, by = _certificate(observation, graph, head)

    def compare(passed: Pass) -> Match:
        whole = passed.repeated(index)
        model = request.masked(request.working_model, graph, whole)
        return seen.compare(model, whole.values[graph.input], by)

    whole = batch_size in (None, len(head.labels))  # else no answer can match all gradients
    estimated: Answer | None = None
    if whole and request.is_loud and not request.is_rounding:  # no equation holds exactly: the estimate goes first
        start = Answer(head, graph, Pass(known.values, {}).repeated(index), None, False, request.is_loud)
        estimated = kept(start, lambda: _estimated(request, start, observation, report))
        over = estimated.estimate is not None and request.budget.spent
        if estimated.good or estimated.interrupted or over:
            return estimated
    found = recover(graph, grad_logits, known, options, compare, bar)
    found = replace(found, passed=found.passed.repeated(index))
    try:
        found, interrupted = _polished(request, graph, found, by, seen, report), False
    except KeyboardInterrupt:
        interrupted = True
    match = found.match
    good = match is not None and within_noise(match, observation.precision, noise_known=bool(observation.noise))
    if good and graph.in_training:
        values = graph.with_masks(graph.masks(found.passed.values)).forward(found.passed.values[graph.input])
        good = statistics_fit(graph.statistics_missed(values), observation.precision)
    good = good and request.gradients.steps == 1  # one gradient at other weights than the client's proves nothing
    stop = found.passed.stop
    interrupted = interrupted or (stop is not None and stop.reason == INTERRUPTED)
    answer = Answer(head, graph, found.passed, match, good, request.is_loud, interrupted)
    if estimated is not None and _is_no_nearer(answer, estimated):
        return _with_inputs_of(answer, estimated)
    if not whole or not observation.noise or interrupted:
        return answer
    return kept(answer, lambda: _estimated(request, answer, observation, report))


def _is_no_nearer(answer: Answer, estimated: Answer) -> bool:
    """Whether the recursion's inputs fit no better than an estimate's: nor would an estimate from there."""
    return estimated.estimate is not None and not answer.good and not answer.relative < estimated.relative


def _with_inputs_of(answer: Answer, estimated: Answer) -> Answer:
    """What the recursion found, with the inputs of an estimate."""
    passed, name = estimated.passed, answer.graph.input
    values = {**answer.passed.values, name: passed.values[name]}
    reports = {**answer.passed.reports, name: passed.reports[name]}
    passed = replace(answer.passed, values=values, reports=reports)
    return replace(answer, passed=passed, match=estimated.match, estimate=estimated.estimate)


def _certificate(observation: Observation, graph: Graph, head: HeadCandidate) -> tuple[Observation, Tensor]:
    """What the gradients of a candidate are compared by, and the targets of that.

    A well classified sample's ``softmax - 1`` has lost its digits in the client's arithmetic. All layers saw that very
    delta, and where the gradient of the bias shows it they are compared by it: that it is the softmax's, as far as the
    client's digits go, is what the head's reading is complete for.
    """
    if head.seen and set(graph.wrappers) <= {"log_softmax"}:
        return replace(observation, loss=Linear(), scale=1.0), head.grad_logits
    return observation, head.labels


def _estimated(request: Request, answer: Answer, observation: Observation, report: Callable[[Event], None]) -> Answer:
    """The joint estimate where the gradients are noisy: the most likely inputs with their error bars."""
    graph, head = answer.graph, answer.head
    repeated = bool((head.multiplicities > 1).any())  # only the sum of what moves equal samples shows
    enough = answer.good and not answer.loud and request.grid is None
    covered = not graph.unread and not graph.in_training and request.gradients.steps == 1
    shape = torch.Size((len(head.labels), *request.shape))
    small = shape.numel() <= JOINT_UP_TO  # asked before a copy of the model in working precision is made
    if not covered or repeated or request.budget.spent or enough or not small:
        return answer
    report(Event("input", "joint estimate"))
    start = time.perf_counter()
    found = joint_answer(
        request.working_model,
        observation,
        head.labels,
        head.values,
        shape,
        answer.inputs,
        request.budget,
        good=answer.good,
        free_scale=request.observation.scale is None,
        client=request.client,
        measure=request.is_rounding,
    )
    if found is None or (answer.good and not fits(found.chi2, found.dof)):
        return answer
    good = fits(found.chi2, found.dof)
    if good and request.grid is not None:
        client = request.client or request.working_model
        found = snapped(request.grid, found, observation, request.gradients, client, head.labels)
    match = replace(observation, scale=found.scale).compare(request.working_model, found.inputs, head.labels)
    if not good and answer.match is not None and answer.match.relative <= match.relative:
        return answer
    values = graph.forward(found.inputs) if good else {graph.input: found.inputs}
    label, kind = graph.layer_of(graph.input)
    whole = LayerReport(label, f"{kind}, joint estimate", found.evidence, time.perf_counter() - start)
    reports = {**answer.passed.reports, graph.input: whole}
    passed = replace(answer.passed, values={**answer.passed.values, **values}, reports=reports)
    return replace(answer, passed=passed, match=match, good=good, estimate=found)


def _distinct(multiplicities: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each sample, and for every row the number of its sample; copies of a sample are neighbours."""
    first, row = [], 0
    while row < len(multiplicities):
        first.append(row)
        row += int(multiplicities[row])
    places = torch.tensor(first, device=multiplicities.device)
    return places, torch.arange(len(first), device=places.device).repeat_interleave(multiplicities[places])


def _polished(
    request: Request,
    graph: Graph,
    found: Found,
    targets: Tensor,
    observation: Observation,
    report: Callable[[Event], None],
) -> Found:
    """An answer that nearly matches, after a few steps of gradient matching; its match with the arithmetic's noise."""
    bar = match_bar(observation.precision)
    if not bar < found.mismatch < POLISH_FROM or only_input_open(graph, found.passed) or request.budget.spent:
        return found
    inputs = found.passed.values[graph.input]
    if inputs.numel() > POLISH_UP_TO:
        return found
    report(Event("input", "polish by gradient matching", residual=found.mismatch))
    model = request.masked(request.working_model, graph, found.passed)
    client = None if request.client is None else request.masked(request.client, graph, found.passed)
    observation = with_arithmetic(observation, model, client, inputs, targets)
    sigma = {name: entry_noise(observation, name) for name in observation.gradients}
    seen = request.gradients.replaced(observation.gradients)
    problem = GradientMap.read(
        request.working_model, observation.loss, targets, seen, sigma, inputs.shape, observation.factor
    )
    problem = problem.with_masks(graph.masks(found.passed.values))
    goal = 1.0 if observation.noise else bar / (3 * observation.rounding)
    better = polish(problem, inputs, goal, request.budget)
    before, match = (observation.compare(model, x, targets) for x in (inputs, better))
    if observation.noise and match.ratio < NEARLY and not fits(match.chi2, match.entries):
        better = polish(problem, better, goal / 4, request.budget)
        match = observation.compare(model, better, targets)
    if not match.ratio < before.ratio:
        return replace(found, match=before)
    return replace(found, passed=found.passed.with_value(graph.input, better), match=match)


def kept(answer: Answer, further: Callable[[], Answer]) -> Answer:
    """What goes further than an answer; after Ctrl-C the answer itself."""
    try:
        return further()
    except KeyboardInterrupt:
        return replace(answer, interrupted=True)

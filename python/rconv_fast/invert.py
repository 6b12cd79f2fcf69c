"""Recover the batch behind a gradient: observation, readings of the head, passes, estimate, verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.containers import read_tensor
from rconv_fast.errors import InterruptedInversionError, LinAlgError, require
from rconv_fast.estimate import Grid, Quantum, entry_noise, joint_answer, snapped, with_arithmetic
from rconv_fast.estimate.bounds import DENSE_UP_TO
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.heads.candidates import HeadCandidate, HeadOutcome, head_candidates
from rconv_fast.heads.tokens import token_ids
from rconv_fast.local_steps import to_middle_weights, what_steps_mean
from rconv_fast.losses import Linear, Loss
from rconv_fast.observation import Match, Noise, Observation
from rconv_fast.polish import polish
from rconv_fast.progress import Event, progress_callback
from rconv_fast.received import read_gradients
from rconv_fast.request import Request, check_arguments, dtype_of
from rconv_fast.unrolled import answer_of_steps, one_sample
from rconv_fast.verdict import COARSE, Answer, Inversion, conclude, fits, match_bar, statistics_fit, within_noise
from rconv_fast.walk.canonical import LOSS_OF_LOGITS
from rconv_fast.walk.found import INTERRUPTED, Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport
from rconv_fast.walk.search import Found, only_input_open, recover
from rconv_fast.wrappers import reading_copy, working_copy

# Gradient matching helps an answer that is nearly right; sizes above the limit would take minutes.
POLISH_FROM, POLISH_UP_TO = 0.1, 100_000
# Readings of one head that are tried; a head that allows more says nothing.
MAX_READINGS = 8
METHODS = ("auto", "analytic", "optimise")


def invert(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    loss: str = "cross_entropy",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weights: Tensor | Sequence[float] | None = None,
    scale: float | None = 1.0,
    noise: float | Noise | None = None,
    quantum: Quantum | None = None,
    dtype: torch.dtype = torch.float64,
    prior: str | None = None,
    method: str = "auto",
    time_limit: float | None = None,
    progress: bool | Callable[[Event], None] = False,
) -> Inversion:
    """Recover the batch whose gradients these are.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with, parameters and mode as they were then. It is left untouched.
    gradients : mapping from parameter name to Tensor, or sequence in ``model.parameters()`` order
        Gradients of the loss; None where a parameter's was not seen.
    input_shape : sequence of int
        Shape of one sample, without the batch.
    batch_size : int, optional
        Number of samples; found if not given.
    labels : sequence of int or Tensor, optional
        Labels in any order (targets for regression); found if not given.
    loss : {"cross_entropy", "nll", "binary_cross_entropy_with_logits", "binary_cross_entropy", "mse"}
        The client's loss, of the model's outputs.
    reduction : {"mean", "sum"}
        Over the batch.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    class_weights : Tensor or sequence of float, optional
        One weight a class.
    scale : float or None
        The factor by which the gradients are multiplied (clipping, a client's weight); None: find it.
    noise : float, mapping of str to float or Tensor, or None
        Standard deviation of each entry: a number relative to each tensor's root mean square, or by parameter name;
        None: what the gradients record of themselves, else the arithmetic's own.
    quantum : float or (float, float or sequence of float, float or sequence of float), optional
        The inputs lie on a grid: a step, or (step, mean, std) of a normalisation a channel. Noisy gradients' inputs
        are snapped to it where their error bars single out a level each, and checked by a run of the client.
    dtype : torch.dtype
        Working precision.
    prior : {None, "box", "nonnegative", "tv"}
        What to prefer among the solutions where the equations leave the input open (None: minimum norm).
    method : {"auto", "analytic", "optimise"}
        "optimise" goes on by gradient matching where nothing is verified, from what the equations say; the others
        never do.
    time_limit : float, optional
        Seconds; what is known by then is returned.
    progress : bool or callable
        Show a progress bar, or call this with each `Event`.

    Returns
    -------
    Inversion
        Whatever the gradients give away, `verdict` first; where the recursion stops, `stops_at` and `reason`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A gradient has a wrong name, shape or type, is not finite, or all are zero; an option is unknown; the model
        refuses the input shape.
    InterruptedInversionError
        On Ctrl-C; what was found by then is its ``inversion``.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), sections 3 and 4; R-CONV++ (Computing 107:156, 2025).
    """
    shape = check_arguments(model, input_shape, prior, batch_size, dtype)
    known_method = isinstance(method, str) and method in METHODS
    require(known_method, "invert", "method", f"be one of {', '.join(METHODS)}", repr(method))
    weights = None if class_weights is None else read_tensor("invert", "class_weights", class_weights)
    client_loss = Loss(loss, reduction, label_smoothing, weights)
    shared = read_gradients("invert", model, gradients)
    work = reading_copy(model, dtype_of(model))
    before = working_copy(model, dtype) if shared.steps > 1 else None
    to_middle_weights(work, shared)
    request = Request(
        work,
        shared,
        shape,
        client_loss,
        scale,
        noise,
        None if quantum is None else Grid.create(quantum, torch.Size((1, *shape))),
        dtype,
        prior,
        Budget.seconds(time_limit),
        before,
    )
    with progress_callback(progress) as report:
        report(Event("head", "separate"))
        inversion, interrupted = _inversion(request, batch_size, labels, report)
    if interrupted:
        raise InterruptedInversionError(inversion)
    if method != "optimise" or inversion.verified:
        return inversion
    from rconv_fast.baselines.continued import continued  # a room that most users never enter

    return continued(
        inversion,
        model,
        gradients,
        input_shape,
        batch_size=batch_size,
        labels=labels,
        loss=loss,
        reduction=reduction,
        label_smoothing=label_smoothing,
        class_weights=weights,
        scale=inversion.scale,
        noise=noise,
        dtype=dtype,
        time_limit=None if time_limit is None else request.budget.left,
        progress=progress,
    )


def _inversion(
    request: Request,
    batch_size: int | None,
    labels: Sequence[int] | Tensor | None,
    report: Callable[[Event], None],
) -> tuple[Inversion, bool]:
    """The result, and whether Ctrl-C ended it."""
    single = request.graph(1)
    several = _of_steps(request, single, batch_size, labels, report)
    if several is not None and (several.good or several.interrupted):
        outcome, answers = HeadOutcome((several.head,), 1), [several]
    else:
        outcome, answers = _of_readings(request, single, batch_size, labels, report)
        if several is not None and several.relative < COARSE:  # the steps nearly fit one sample, which proves nothing
            answers.append(replace(several, head=replace(several.head, complete=False)))
    inversion = conclude(single, outcome, answers, _tokens(request), request.prior)
    if request.gradients.steps > 1:
        reproduced = several is not None and several.good
        note = what_steps_mean(request.gradients, reproduced=reproduced, proven=inversion.verified)
        inversion = replace(inversion, notes=[*inversion.notes, note])
    interrupted = outcome.reason == INTERRUPTED or any(answer.interrupted for answer in answers)
    return inversion, interrupted


def _of_steps(
    request: Request,
    graph: Graph,
    batch_size: int | None,
    labels: Sequence[int] | Tensor | None,
    report: Callable[[Event], None],
) -> Answer | None:
    """What several local steps on one sample say, unrolled; None where that is not covered."""
    if request.before is None or batch_size not in (None, 1):
        return None
    head = one_sample(request, graph)
    told = None if labels is None else read_tensor("invert", "labels", labels).flatten().tolist()
    if head is None or told not in (None, head.labels.tolist()):
        return None
    start = Answer(head, graph, Pass(head.values, {}), None, good=False)
    before = request.before
    return _kept(start, lambda: answer_of_steps(request, graph, head, before, report))


def _of_readings(
    request: Request,
    graph: Graph,
    batch_size: int | None,
    labels: Sequence[int] | Tensor | None,
    report: Callable[[Event], None],
) -> tuple[HeadOutcome, list[Answer]]:
    """Every reading of the head, and what each leads to."""
    try:
        outcome = _read_head(request, graph, batch_size, labels)
    except KeyboardInterrupt:
        return HeadOutcome((), batch_size, None, graph.steps[graph.output].label, INTERRUPTED), []
    answers: list[Answer] = []
    for head in outcome.candidates[:MAX_READINGS]:
        answers.append(_answer(request, graph, head, outcome.batch_size, report))
        if answers[-1].interrupted:
            break
    return outcome, answers


def _kept(answer: Answer, further: Callable[[], Answer]) -> Answer:
    """What goes further than an answer; after Ctrl-C the answer itself."""
    try:
        return further()
    except KeyboardInterrupt:
        return replace(answer, interrupted=True)


def _tokens(request: Request) -> Tensor | None:
    """The ids that the gradients of embeddings list."""
    names = [
        f"{name}.weight".lstrip(".")
        for name, module in request.model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    found = [token_ids(request.gradients[name]) for name in names if name in request.gradients]
    return torch.cat(found).unique() if found else None


def _read_head(
    request: Request, graph: Graph, batch_size: int | None, labels: Sequence[int] | Tensor | None
) -> HeadOutcome:
    """Every reading of the last layer that its gradient allows, by the loss as one of the logits."""
    loss, observation = request.loss, request.observation
    wrapper = graph.wrappers[-1] if graph.wrappers else ""
    name = LOSS_OF_LOGITS.get((wrapper, loss.name), loss.name)
    of_logits = replace(observation, loss=replace(loss, name=name))
    try:
        return head_candidates(graph, of_logits, batch_size, labels, request.budget)
    except LinAlgError:  # squares of the gradients, or of their ratio to the noise, may leave float64
        label = graph.steps[graph.output].label
        return HeadOutcome(stops_at=label, reason="a last layer whose equations have no factors in float64")


def _answer(
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
    if whole and request.is_loud and not request.is_rounding:  # no equation holds exactly: the estimate goes first
        start = Answer(head, graph, Pass(known.values, {}).repeated(index), None, False, request.is_loud)
        estimated = _kept(start, lambda: _estimated(request, start, observation, report))
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
    noisy = whole and bool(observation.noise) and not interrupted
    return _kept(answer, lambda: _estimated(request, answer, observation, report)) if noisy else answer


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
    small = shape.numel() <= DENSE_UP_TO  # asked before a copy of the model in working precision is made
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
    if not match.ratio < before.ratio:
        return replace(found, match=before)
    return replace(found, passed=found.passed.with_value(graph.input, better), match=match)

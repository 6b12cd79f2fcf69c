"""Recover the batch behind a gradient: observation, readings of the head, passes, estimate, verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.containers import read_tensor
from rconv_fast.errors import InterruptedInversionError, LinAlgError, require
from rconv_fast.estimate import Grid, Quantum
from rconv_fast.heads.candidates import HeadOutcome, head_candidates
from rconv_fast.heads.tokens import token_ids
from rconv_fast.local_steps import SEVERAL, to_middle_weights, what_steps_mean
from rconv_fast.losses import Loss
from rconv_fast.memory import keep_freed_pages
from rconv_fast.observation import Noise
from rconv_fast.one_reading import answer_of, kept
from rconv_fast.progress import Event, progress_callback
from rconv_fast.received import read_gradients
from rconv_fast.request import Request, check_arguments, dtype_of
from rconv_fast.result import Inversion
from rconv_fast.unrolled import answer_of_steps, not_unrolled, one_sample
from rconv_fast.verdict import COARSE, Answer, conclude
from rconv_fast.walk.canonical import LOSS_OF_LOGITS
from rconv_fast.walk.found import INTERRUPTED, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.wrappers import reading_copy, working_copy

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
        What to prefer among the solutions where the equations leave the input open (None: minimum norm). "tv" also
        shows the picture to be expected, with error bars, where a hidden max pooling leaves it open.
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
    keep_freed_pages()
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
        uncovered = SEVERAL if batch_size not in (None, 1) else not_unrolled(request, single)
        proven = inversion.verified
        note = what_steps_mean(request.gradients, reproduced=reproduced, proven=proven, uncovered=uncovered)
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
    return kept(start, lambda: answer_of_steps(request, graph, head, before, report))


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
        answers.append(answer_of(request, graph, head, outcome.batch_size, report))
        if answers[-1].interrupted:
            break
    return outcome, answers


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

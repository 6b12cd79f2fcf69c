"""Recover the batch behind a gradient: the head, then the recursion, then the check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rconv_fast.errors import RconvError, UnsupportedModelError, require, require_type
from rconv_fast.graph import Graph, build_graph
from rconv_fast.heads import HeadCandidate, head_candidates
from rconv_fast.heads.separation import rounding_of
from rconv_fast.layers.rules import ActivationRule
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.polish import polish
from rconv_fast.progress import Event, progress_callback
from rconv_fast.received import read_gradients
from rconv_fast.solve import PRIORS, norm
from rconv_fast.walk import LayerReport, Walk
from rconv_fast.wrappers import working_copy

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}

# A gradient match below this many units of the gradients' own rounding certifies a reconstruction: 1e-6 with
# float32 gradients. Float64 gradients leave the room that an ill-conditioned layer needs: 1e-10.
VERIFIED_ROUNDINGS = {"float32": 8.0, "float64": 4.5e5}


@dataclass(frozen=True)
class Inversion:
    r"""What the gradients give away.

    Attributes
    ----------
    inputs : Tensor
        Recovered inputs (B, \*input_shape).
    labels : Tensor
        Their labels (targets for regression), (B, ...).
    layers : list of LayerReport
        One entry a solved layer, in the order they were solved (last layer first).
    gradient_residual : float
        Relative mismatch of all gradients when the model is run on `inputs` and `labels`.
    verified : bool
        The gradients match to their own precision and the equations determine every value.
    determined : Tensor
        Bool (B, \*input_shape): is this value fixed by the equations.
    certificates : Tensor
        Per sample, the residual of its label certificate in the head, (B,).
    notes : list of str
        What a reader of the result must know: priors used, layers that were not determined.
    """

    inputs: Tensor
    labels: Tensor
    layers: list[LayerReport]
    gradient_residual: float
    verified: bool
    determined: Tensor
    certificates: Tensor
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The result and one line a layer, as text."""
        share = float(self.determined.double().mean())
        verdict = "verified" if self.verified else "NOT verified"
        lines = [
            f"{len(self.inputs)} sample(s), labels {self.labels.tolist()}: {verdict}, "
            f"gradient residual {self.gradient_residual:.1e}, {share:.1%} of the values determined",
            f"{'layer':24} {'kind':12} {'rows':>9} {'unknowns':>9} {'rank':>9} {'cond':>8} {'residual':>9} "
            f"{'seconds':>8}  solver",
        ]
        lines += [
            f"{r.name[:24]:24} {r.kind[:12]:12} {r.rows:9d} {r.unknowns:9d} {r.rank:9d} {r.condition:8.1e} "
            f"{r.residual:9.1e} {r.seconds:8.3f}  {r.solver}"
            for r in self.layers
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def invert(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Sequence[Tensor],
    input_shape: Sequence[int],
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    loss: str = "cross_entropy",
    dtype: torch.dtype = torch.float64,
    prior: str | None = None,
    progress: bool | Callable[[Event], None] = False,
) -> Inversion:
    """Recover the batch whose gradients these are.

    Parameters
    ----------
    model : nn.Module
        What the gradients were computed with, parameters and mode as they were then. It is left untouched.
    gradients : mapping from parameter name to Tensor, or sequence in ``model.parameters()`` order
        Gradients of the loss, averaged over the batch.
    input_shape : sequence of int
        Shape of one sample, without the batch.
    batch_size : int, optional
        Number of samples; found if not given.
    labels : sequence of int or Tensor, optional
        Labels in any order (targets for regression); found if not given.
    loss : {"cross_entropy", "binary_cross_entropy_with_logits", "mse"}
        All with mean reduction.
    dtype : torch.dtype
        Working precision.
    prior : {None, "box", "nonnegative", "tv"}
        What to prefer among the solutions where the equations leave the input open (None: minimum norm).
    progress : bool or callable
        Show a progress bar, or call this with each `Event`.

    Returns
    -------
    Inversion

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A gradient has a wrong name, shape or type, is not finite, or all are zero; an option is unknown.
    UnsupportedModelError
        A layer stops the recursion; what was recovered up to there is in its ``features``.

    References
    ----------
    R-CONV (Eltaras et al., WISE 2024), sections 3 and 4; R-CONV++ (Computing 107:156, 2025).
    """
    shape = _check_arguments(model, input_shape, loss, prior, batch_size, dtype)
    seen = read_gradients("invert", model, gradients)
    precision = rounding_of(*seen.values())
    work = working_copy(model, dtype)
    device = next(work.parameters()).device
    named = {name: g.to(device=device, dtype=dtype) for name, g in seen.items()}
    with progress_callback(progress) as report:
        report(Event("head", "separate"))
        single = build_graph(work, named, shape, 1)
        outcome = head_candidates(single, Observation(named, Loss(loss), rounding=precision / 2), batch_size, labels)
        if not outcome.candidates:
            raise UnsupportedModelError(outcome.stops_at, outcome.reason)
        candidates = outcome.candidates
        results = []
        for head in candidates:
            size = len(head.grad_logits)
            graph = single if size == 1 else build_graph(work, named, shape, size)
            results.append(_attempt(work, named, graph, head, loss, precision, prior, report))
            if results[-1].verified:
                break
    return min(results, key=lambda result: result.gradient_residual)


def _attempt(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    graph: Graph,
    head: HeadCandidate,
    loss: str,
    precision: float,
    prior: str | None,
    report: Callable[[Event], None],
) -> Inversion:
    """The recursion from one reading of the head; further passes where the forward run corrects the first."""
    walk = Walk(graph, precision, report, prior)
    inputs = walk.run(head.grad_logits, head.values)
    residual = gradient_residual(model, gradients, inputs, head.labels, loss)
    bar = tolerance(precision)
    for _ in range(MAX_PASSES):
        if residual <= bar or residual > HOPELESS or _only_input_open(walk):
            break
        report(Event("input", "second pass with the activations of the forward run", residual=residual))
        again = Walk(graph, precision, report, prior, patterns=forward_activations(graph, inputs))
        inputs_again = again.run(head.grad_logits, head.values)
        residual_again = gradient_residual(model, gradients, inputs_again, head.labels, loss)
        if not residual_again < residual:
            break
        stalled = residual_again > residual / 2
        walk, inputs, residual = again, inputs_again, residual_again
        if stalled:
            break
    small = inputs.numel() <= POLISH_UP_TO
    if bar < residual < POLISH_FROM and small and not _only_input_open(walk):
        report(Event("input", "polish by gradient matching", residual=residual))
        polished = polish(model, gradients, inputs, head.labels, LOSSES[loss], bar / 3)
        residual_polished = gradient_residual(model, gradients, polished, head.labels, loss)
        if residual_polished < residual:
            inputs, residual = polished, residual_polished
    return _conclude(walk, inputs, head, residual, bar)


# Gradient matching helps an answer that is nearly right; sizes above the limit would take minutes.
POLISH_FROM, POLISH_UP_TO = 0.1, 100_000
# Equations that fit worse than this were built from a wrong gradient or activation.
CONTRADICTION = 1e-3
# Each pass either halves the mismatch or is the last one.
MAX_PASSES = 6
# An answer this far off shows activations of something else.
HOPELESS = 0.5


def _only_input_open(walk: Walk) -> bool:
    """Everything but the network's input is determined: a forward run of it teaches nothing new."""
    fixed = {name: bool(determined.all()) for name, determined in walk.determined.items()}
    consistent = all(report.residual <= CONTRADICTION for report in walk.reports.values())
    return not fixed.pop(walk.graph.input, True) and all(fixed.values()) and consistent


def _conclude(walk: Walk, inputs: Tensor, head: HeadCandidate, residual: float, bar: float) -> Inversion:
    determined = walk.determined.get(walk.graph.input, torch.ones_like(inputs, dtype=torch.bool))
    open_layers = [report.name for name, report in _open_reports(walk) if name != walk.graph.input]
    matched = residual <= bar
    notes = list(head.notes)
    if open_layers and not matched:
        determined = torch.zeros_like(determined)
        notes.append(f"the inputs of {', '.join(open_layers)} are not determined, so nothing before them is proven")
    contradicted = [r for r in walk.reports.values() if r.residual > CONTRADICTION]
    if contradicted and not matched:
        determined = torch.zeros_like(determined)
        worst = max(contradicted, key=lambda r: r.residual)
        notes.append(f"the equations of {worst.name} contradict each other (residual {worst.residual:.1e})")
    notes += [_what_misses(report, walk.determined[name]) for name, report in _open_reports(walk)]
    completed = [
        report.name
        for name, report in walk.reports.items()
        if name != walk.graph.input and report.proof == "nonnegative"
    ]
    if completed:
        notes.append(f"the inputs of {', '.join(completed)} follow from their equations and x >= 0 behind a ReLU")
    if not bool(determined.all()):
        choice = "minimum-norm choice" if walk.prior is None else f"choice of the prior {walk.prior!r}"
        notes.append(f"values that are not determined are the {choice}")
    return Inversion(
        inputs=inputs,
        labels=head.labels,
        layers=list(walk.reports.values()),
        gradient_residual=residual,
        verified=matched and head.complete and bool(determined.all()),
        determined=determined,
        certificates=head.certificates,
        notes=notes,
    )


def _open_reports(walk: Walk) -> list[tuple[str, LayerReport]]:
    """The layers whose equations leave values open, last layer first."""
    return [(name, r) for name, r in walk.reports.items() if not bool(walk.determined[name].all())]


def _what_misses(report: LayerReport, determined: Tensor) -> str:
    """By how many equations a layer falls short, as far as that is known; one short is a bound, not a count."""
    short = report.unknowns - min(report.rows, report.rank)
    rank = "" if report.rank >= min(report.rows, report.unknowns - 1) else f" of rank {report.rank}"
    missing = f"{short} too few" if short > 1 else "not shown to have full rank"
    counted = f"{report.rows} equations{rank} for {report.unknowns} values, {missing}"
    return f"{report.name}: {counted}; {int((~determined).sum())} values are open"


def tolerance(precision: float) -> float:
    """The gradient mismatch that certifies a reconstruction from gradients of this relative rounding."""
    kind = "float64" if precision < 1e-12 else "float32"
    return VERIFIED_ROUNDINGS[kind] * precision


def gradient_residual(
    model: nn.Module, gradients: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, loss: str
) -> float:
    """``||grad(inputs, labels) - gradients|| / ||gradients||`` over all parameters, in float64."""
    parameters = {name: p for name, p in model.named_parameters() if name in gradients}
    with torch.enable_grad():
        for p in parameters.values():
            p.requires_grad_(True)
        outputs = model(inputs)
        value = LOSSES[loss](outputs, labels if loss == "cross_entropy" else labels.to(outputs).reshape(outputs.shape))
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    given = [gradients[name].double() for name in parameters]
    miss = norm(a if b is None else a - b.double() for a, b in zip(given, found, strict=True))
    return miss / norm(given) if math.isfinite(miss) else math.inf


def forward_activations(graph: Graph, inputs: Tensor) -> dict[str, Tensor]:
    """The output of every activation when the model is run on `inputs`."""
    values = {graph.input: inputs}
    with torch.no_grad():
        for name, step in list(graph.steps.items())[1:]:
            values[name] = step.forward(*(values[o] for o in step.inputs))
    return {name: v for name, v in values.items() if isinstance(graph.steps[name].rule, ActivationRule)}


def _check_arguments(
    model: nn.Module,
    input_shape: Sequence[int],
    loss: str,
    prior: str | None,
    batch_size: int | None,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    require_type(isinstance(model, nn.Module), "invert", "model", "be a torch.nn.Module", type(model).__name__)
    require(any(True for _ in model.parameters()), "invert", "model", "have parameters", "none")
    sized = isinstance(input_shape, Sequence) and all(isinstance(size, int) for size in input_shape)
    require_type(sized, "invert", "input_shape", "be a sequence of int", repr(input_shape))
    shape = tuple(input_shape)
    require(len(shape) >= 1 and min(shape) >= 1, "invert", "input_shape", "be one sample's shape", shape)
    require(loss in LOSSES, "invert", "loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    require(prior in PRIORS, "invert", "prior", f"be one of {PRIORS}", repr(prior))
    if batch_size is not None:
        require_type(isinstance(batch_size, int), "invert", "batch_size", "be an int", repr(batch_size))
        require(batch_size >= 1, "invert", "batch_size", "be at least 1", batch_size)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require_type(floating, "invert", "dtype", "be a real floating type", repr(dtype))
    return shape


__all__ = ["Inversion", "RconvError", "UnsupportedModelError", "invert"]

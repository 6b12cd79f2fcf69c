"""What is proven and how sure: evidence in, verdict out. Every threshold that decides stands here, with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rconv_fast.estimate.answer import JOINT_UP_TO
from rconv_fast.estimate.joint import Estimate
from rconv_fast.heads.candidates import HeadCandidate, HeadOutcome
from rconv_fast.observation import Match
from rconv_fast.result import Inversion, Sample
from rconv_fast.walk.found import INTERRUPTED, OUT_OF_TIME, Pass, features_of
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.report import LayerReport
from rconv_fast.walk.search import only_input_open

# Relative rounding up to which gradients count as float64's own; above, up to float32's, the arithmetic of a
# backward pass is the noise; above that, the rounding of the values themselves.
DOUBLE, SINGLE = 1e-12, 2.0**-22
# A mismatch below this many units of rounding is a match. A backward pass in float32 loses a few units.
# Float64 leaves room for what ill-conditioned layers amplify: 1e-10, far below what any wrong picture reaches.
SINGLE_ROUNDINGS, DOUBLE_ROUNDINGS = 8.0, 4.5e5
# Where the noise is known, the mismatch in its units is 1 up to chance: this many standard deviations of chi-square.
DEVIATIONS = 4.0
# Equations that fit worse than this contradict each other: they were built from a wrong gradient or activation.
CONTRADICTION = 1e-3
# Two answers this far apart (relative) are two answers.
DIFFERENT = 1e-3
# Predicted error (relative to the input's size) above which a match is coarse: it no longer shows what the input was.
COARSE = 0.05
# Equations an unknown that a joint estimate must leave over: chi-square then notices a wrong reading.
SPARE = 0.5


def match_bar(rounding: float) -> float:
    """The relative gradient mismatch that arithmetic of this relative rounding explains; 0 where it explains none."""
    if rounding <= DOUBLE:
        return DOUBLE_ROUNDINGS * rounding
    return SINGLE_ROUNDINGS * min(rounding, SINGLE)


def within_noise(match: Match, rounding: float, *, noise_known: bool) -> bool:
    """Whether a mismatch is no larger than the noise explains.

    By the arithmetic's own rounding, or, where the noise of the entries is known, by the law of chi-square:
    ``chi2 <= dof + DEVIATIONS sqrt(2 dof)``.
    """
    return match.relative <= match_bar(rounding) or (noise_known and fits(match.chi2, match.entries))


def statistics_fit(missed: Sequence[Tensor], rounding: float) -> bool:
    """Whether an answer has the statistics that the client sent, up to as many roundings as its gradients may miss."""
    if not missed:
        return True
    size = float(torch.cat([part.flatten() for part in missed]).square().mean().sqrt())
    return size <= (DOUBLE_ROUNDINGS if rounding <= DOUBLE else SINGLE_ROUNDINGS)


def fits(chi2: float, dof: int) -> bool:
    """Whether a misfit in units of the noise is what the law of chi-square lets one expect."""
    return dof > 0 and math.isfinite(chi2) and chi2 <= dof + DEVIATIONS * math.sqrt(2 * dof)


def unproven(passed: Pass) -> list[str]:
    """The layers whose claim has no proof; a probe alone is none without more rows than values it calls determined."""
    return [
        report.name
        for name, report in passed.reports.items()
        if report.proof == "none" or (report.proof == "probe" and report.rows <= int(passed.determined[name].sum()))
    ]


def same_answer(first: Tensor, second: Tensor) -> bool:
    """Whether two recovered inputs are one answer, samples in any order."""
    if first.shape != second.shape:
        return False
    a, b = first.flatten(1), second.flatten(1)
    gaps = torch.cdist(a, b)
    nearest, places = gaps.min(dim=1)
    distinct = len(torch.unique(places)) == len(places)
    return distinct and bool((nearest <= DIFFERENT * a.norm(dim=1).clamp_min(1e-30)).all())


def what_misses(report: LayerReport, open_values: int) -> str:
    """By how many equations a layer falls short, as far as that is known; one short is a bound, not a count."""
    if report.hidden and report.rank == report.unknowns - report.hidden:
        constants = f"exact up to {report.hidden} constants that the norm behind it takes off"
        return f"{report.name}: {constants} ({open_values} values): the running statistics would place them"
    short = report.unknowns - min(report.rows, report.rank)
    rank = "" if report.rank >= min(report.rows, report.unknowns - 1) else f" of rank {report.rank}"
    missing = f"{short} too few" if short > 1 else "not shown to have full rank"
    counted = f"{report.rows} equations{rank} for {report.unknowns} values, {missing}"
    return f"{report.name}: {counted}; {open_values} values are open"


def label_of(labels: Tensor | None, index: int) -> Any:
    """One sample's label as a Python value."""
    return None if labels is None or index >= len(labels) else labels[index].tolist()


@dataclass(frozen=True)
class Answer:
    """What one reading of the head led to.

    Attributes
    ----------
    head : HeadCandidate
        The reading.
    graph : Graph
        The model, for its batch size.
    passed : Pass
        What the recursion found.
    match : Match or None
        Of its inputs, if it found any.
    good : bool
        Whether the mismatch is within the noise.
    loud : bool
        Whether the noise is above what rounding leaves: only an estimate with error bars is then proven.
    interrupted : bool
        Whether Ctrl-C ended it.
    estimate : Estimate or None
        The joint estimate that `passed` holds the inputs of, where the gradients are noisy.
    """

    head: HeadCandidate
    graph: Graph
    passed: Pass
    match: Match | None
    good: bool
    loud: bool = False
    interrupted: bool = False
    estimate: Estimate | None = None

    @property
    def inputs(self) -> Tensor | None:
        """The recovered inputs."""
        return self.passed.values.get(self.graph.input)

    @property
    def error_bars(self) -> Tensor | None:
        """Of its inputs: under the noise, or, where they are what a prior lets one expect, under that."""
        if self.estimate is not None:
            return self.estimate.uncertainty
        return self.passed.deviations.get(self.graph.input)

    @property
    def certified(self) -> bool:
        """Whether its inputs are samples that the head certified one by one, right whatever else the batch holds."""
        nothing_solved = not self.passed.reports and self.estimate is None and not self.loud
        return self.inputs is not None and nothing_solved and self.head.spare > 0

    @property
    def decided(self) -> bool:
        """Whether it says that this reading leads to an answer or that it leads to none."""
        stop = self.passed.stop
        return self.match is not None or stop is None or stop.reason not in (INTERRUPTED, OUT_OF_TIME)

    @property
    def relative(self) -> float:
        """The relative mismatch, infinite where there are no inputs."""
        return math.inf if self.match is None else self.match.relative

    @property
    def noise_ratio(self) -> float:
        """The mismatch in units of the noise; of a joint estimate with its pattern held."""
        if self.estimate is not None:
            return self.estimate.ratio
        return math.inf if self.match is None else self.match.ratio


def conclude(
    graph: Graph, outcome: HeadOutcome, answers: Sequence[Answer], tokens: Tensor | None, prior: str | None
) -> Inversion:
    """The verdict on all readings of a head.

    ``verified`` needs all of: a match within the noise; every value determined, each layer with a proof; a head that
    left nothing open; no second reading that matches with other inputs.
    """
    if not answers:
        counts = outcome.label_counts
        known = counts is not None or tokens is not None
        return Inversion(
            "features" if known else "nothing",
            batch_size=outcome.batch_size,
            label_counts=counts,
            stops_at=outcome.stops_at or None,
            reason=outcome.reason,
            tokens=tokens,
            notes=[graph.unread] if graph.unread else [],
        )
    best = min(answers, key=lambda answer: answer.relative)
    rivals = [other for other in answers if other.good and other is not best and not _same(best, other)]
    untried = len(outcome.candidates) - sum(answer.decided for answer in answers)
    return _of_answer(best, rivals if best.good else [], untried, outcome, tokens, prior)


def _same(first: Answer, second: Answer) -> bool:
    if first.inputs is None or second.inputs is None:
        return False
    return same_answer(first.inputs, second.inputs)


def _of_answer(
    best: Answer,
    rivals: Sequence[Answer],
    untried: int,
    outcome: HeadOutcome,
    tokens: Tensor | None,
    prior: str | None,
) -> Inversion:
    inputs, passed, head = best.inputs, best.passed, best.head
    reports = list(passed.reports.values())
    notes = [*([best.graph.unread] if best.graph.unread else []), *head.notes]
    if outcome.reason and outcome.reason not in notes:
        notes.append(f"{outcome.stops_at}: {outcome.reason}")
    determined = None if inputs is None else _determined(best, notes, prior)
    closed = determined is not None and bool(determined.all())
    if best.estimate is not None:
        closed = closed and _sharp(best.estimate)
    else:
        proven = not best.loud and passed.open <= {best.graph.input}
        closed = closed and proven and not unproven(passed) and _consistent(reports)
    verified = best.good and closed and head.complete and not rivals and not untried
    if rivals:
        others = "; ".join(f"labels {r.head.labels.tolist()}" for r in rivals)
        notes.append(f"another reading of the head reproduces the gradients too ({others}): give labels= to decide")
    if untried and best.good:
        notes.append(
            f"{untried} reading(s) of the head were not followed to their end: allow more time, or give labels="
        )
    if inputs is not None and not verified:
        notes += _why_not(best, reports)
    verdict = _verdict(best, determined, verified)
    if verdict == "features" and inputs is not None:
        inputs = determined = None
        notes.append("no picture is shown: the one found neither matches the gradients nor has a proven value")
    status = "exact" if best.certified else {"exact": "exact", "approximate": "approximate"}.get(verdict, "features")
    stop = passed.stop
    return Inversion(
        verdict=verdict,
        verified=verified,
        inputs=inputs,
        labels=head.labels,
        layers=reports,
        gradient_residual=best.relative,
        noise_ratio=best.noise_ratio,
        determined=determined,
        uncertainty=best.error_bars,
        samples=_samples(best, status),
        batch_size=len(head.grad_logits) if head.complete else outcome.batch_size if head.spare else None,
        label_counts=outcome.label_counts if outcome.label_counts is not None else _counts(best),
        features=features_of(best.graph, passed.values),
        stops_at=None if stop is None else stop.label,
        reason="" if stop is None else stop.reason,
        tokens=tokens,
        scale=head.scale if best.estimate is None else best.estimate.scale,
        notes=notes,
    )


def _determined(best: Answer, notes: list[str], prior: str | None) -> Tensor:
    """Which input values are proven; a note for each thing that leaves some open."""
    passed, graph = best.passed, best.graph
    if best.estimate is not None and best.good:
        notes += best.estimate.notes
        fixed = best.estimate.uncertainty.isfinite()
        if not bool(fixed.all()):
            notes.append(f"{int((~fixed).sum())} values have no finite error bar: the gradients leave them open")
        return fixed
    inputs = passed.values[graph.input]
    determined = passed.determined.get(graph.input, torch.ones_like(inputs, dtype=torch.bool))
    open_reports = [(n, r) for n, r in passed.reports.items() if n in passed.open]
    open_layers = [report.name for name, report in open_reports if name != graph.input]
    if open_layers and not best.good:
        determined = torch.zeros_like(determined)
        notes.append(f"the inputs of {', '.join(open_layers)} are not determined, so nothing before them is proven")
    contradicted = [r for n, r in passed.reports.items() if r.residual > CONTRADICTION and n not in passed.deviations]
    if contradicted and not best.good:
        determined = torch.zeros_like(determined)
        worst = max(contradicted, key=lambda r: r.residual)
        notes.append(f"the equations of {worst.name} contradict each other (residual {worst.residual:.1e})")
    notes += [what_misses(report, int((~passed.determined[name]).sum())) for name, report in open_reports]
    unplaced = sorted(graph.layer_of(n)[0] for n in passed.open - passed.reports.keys())
    if unplaced:
        notes.append(f"lowest values in front of {', '.join(unplaced)} may be no zeros: the bias does not tell")
    completed = [r.name for name, r in passed.reports.items() if name != graph.input and r.proof == "nonnegative"]
    if completed:
        notes.append(f"the inputs of {', '.join(completed)} follow from their equations and x >= 0 behind a ReLU")
    if not bool(determined.all()):
        choice = "minimum-norm choice" if prior is None else f"choice of the prior {prior!r}"
        notes.append(f"values that are not determined are the {choice}")
    return determined


def _why_not(best: Answer, reports: Sequence[LayerReport]) -> list[str]:
    """What kept a right answer from being verified, and what to do."""
    if best.certified and not best.good:
        return ["each sample that is shown has a certificate of its own; the rest of the batch is not known"]
    if not best.good and only_input_open(best.graph, best.passed):
        return []  # what is open was chosen, and said to be: it need not match
    if not best.good:
        times = f", {best.noise_ratio:.1f} times the noise" if math.isfinite(best.noise_ratio) else ""
        miss = f"the inputs miss the gradients by {best.relative:.1e}{times}"
        return [f"{miss}: say noise= if they are noisier, scale=None after clipping, and check loss, mode and state"]
    if best.estimate is not None:
        return [] if _sharp(best.estimate) else ["the error bars are as large as the picture: less noise is needed"]
    if best.loud:
        needs = f"at most {JOINT_UP_TO} values, samples that differ, a model in evaluation mode"
        return [f"no error bars could be had, so what this noise hides is not known; they need {needs}"]
    if not _consistent(reports):
        return ["the equations of a layer contradict each other, so the match alone proves nothing"]
    claims = unproven(best.passed)
    return [f"nothing proves that {', '.join(claims)} have no other input"] if claims else []


def _sharp(estimate: Estimate) -> bool:
    """Whether error bars are small beside the inputs and equations are left over to notice what is wrong."""
    error = float(estimate.uncertainty.square().mean().sqrt())
    unknowns = estimate.inputs.numel()
    return error < COARSE * float(estimate.inputs.square().mean().sqrt()) and estimate.dof > SPARE * unknowns


def _consistent(reports: Sequence[LayerReport]) -> bool:
    return all(report.residual <= CONTRADICTION for report in reports)


def _verdict(best: Answer, determined: Tensor | None, verified: bool) -> str:
    """The word for it."""
    if determined is None:
        return "features"
    if verified:
        return "exact"
    if best.certified and not best.good:
        return "partial"
    if bool(determined.any()) and not bool(determined.all()):
        return "partial"
    expected = best.graph.input in best.passed.deviations
    close = best.relative < COARSE or expected or (best.estimate is not None and best.good)
    return "approximate" if close else "features"


def _samples(best: Answer, status: str) -> list[Sample]:
    bars, head = best.error_bars, best.head
    errors = [_exact_error(best, index) if status == "exact" else math.inf for index in range(len(head.certificates))]
    if bars is not None:
        errors = bars.flatten(1).square().mean(1).sqrt().tolist()
    rows = zip(head.certificates, head.multiplicities, errors, strict=True)
    return [
        Sample(label_of(head.labels, index), float(certificate), int(times), status, error)
        for index, (certificate, times, error) in enumerate(rows)
    ]


def _exact_error(best: Answer, index: int) -> float:
    """What rounding leaves, to first order: the mismatch times the worst condition of a layer, of the input's size."""
    assert best.inputs is not None
    conditions = [report.condition for report in best.passed.reports.values() if math.isfinite(report.condition)]
    mismatch = best.relative if best.good else float(best.head.certificates[index])
    return mismatch * max([1.0, *conditions]) * float(best.inputs[index].square().mean().sqrt())


def _counts(best: Answer) -> Tensor | None:
    """Labels counted, where the head found all samples of a classification."""
    labels, n = best.head.labels, best.head.grad_logits.shape[1]
    if not best.head.complete or labels.is_floating_point() or labels.ndim != 1:
        return None
    return torch.bincount(labels, minlength=n)

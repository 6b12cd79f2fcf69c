"""Loops around passes: each makes another pattern, runs another pass, and keeps the better of the two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.layers.activation import ActivationRule
from rconv_fast.observation import Match
from rconv_fast.patterns.pattern import Pattern
from rconv_fast.patterns.threshold import OTHER_FACTORS, THRESHOLD_FACTOR
from rconv_fast.progress import Event
from rconv_fast.walk.found import INTERRUPTED, Known, Options, Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.hidden import find_pattern
from rconv_fast.walk.pass_ import run_pass

# Forward runs of the answer: each either halves the mismatch or is the last one.
MAX_FORWARD_RUNS = 6
# Maxima this near, in roundings of the gradients, may be equal.
EQUAL = 4.0
# An answer this far off shows activations of something else.
HOPELESS = 0.5


@dataclass(frozen=True)
class Found:
    """A pass, the pattern it was made with, and how its answer compares with what was seen (None without an answer)."""

    passed: Pass
    pattern: Pattern
    match: Match | None

    @property
    def mismatch(self) -> float:
        """How far the answer is from what was seen, infinite without one."""
        return math.inf if self.match is None else self.match.relative


def passes(graph: Graph, grad_logits: Tensor, known: Known, pattern: Pattern, options: Options) -> tuple[Pass, Pattern]:
    """One pass to its end: hidden patterns in its way are searched; where equations contradict, thresholds anew."""
    passed = run_pass(graph, grad_logits, known, pattern, options)
    while True:
        if passed.stop is not None and passed.stop.hidden:
            try:
                found = find_pattern(graph, passed, options)
            except KeyboardInterrupt:
                return replace(passed, stop=replace(passed.stop, reason=INTERRUPTED)), pattern
            if not found.pieces:
                return replace(passed, stop=replace(passed.stop, reason=found.reason)), pattern
            pattern = pattern.with_pieces(found.pieces, origin=pattern.origin)
            stop = replace(passed.stop, reason=found.reason)
            passed = run_pass(graph, grad_logits, passed.known().and_also(found.known), pattern, options)
            if found.reason:
                return replace(passed, stop=stop), pattern
        elif passed.contradiction is not None and passed.stop is None:
            passed, pattern = _other_thresholds(graph, grad_logits, pattern, options, passed)
            passed = run_pass(graph, grad_logits, passed.known(), pattern, options)
        else:
            return passed, pattern


def _other_thresholds(
    graph: Graph, grad_logits: Tensor, pattern: Pattern, options: Options, passed: Pass
) -> tuple[Pass, Pattern]:
    """Other thresholds at one activation, the steps before it solved again; the smallest residual wins."""
    assert passed.contradiction is not None
    step, chosen = passed.contradiction.step, passed.contradiction.chosen
    names = list(graph.steps)
    behind = passed.known(names[names.index(chosen) :])
    used = passed.contradiction.factor
    best, best_pattern = passed, pattern.with_threshold(chosen, used)
    tried = [passed.values[chosen]]
    for factor in (THRESHOLD_FACTOR, *OTHER_FACTORS):
        if factor == used:
            continue
        options.progress(
            Event(passed.reports[step].name, f"retry with another threshold at {graph.steps[chosen].label}")
        )
        trial = pattern.with_threshold(chosen, factor)
        sides = run_pass(graph, grad_logits, behind, trial, options, until=chosen).values.get(chosen)
        if sides is None or any(torch.equal(sides, other) for other in tried):  # None: out of time before that
            continue
        tried.append(sides)
        other = run_pass(graph, grad_logits, behind, trial, options, until=step)
        reached = other.stop is None and step in other.reports  # a contradiction before it ends a pass as well
        if reached and other.reports[step].residual < best.reports[step].residual / 2:
            best, best_pattern = other, trial
        if best.reports[step].residual <= options.bar:
            break
    return replace(best, contradiction=None), best_pattern


def forward_pieces(graph: Graph, inputs: Tensor, tie: float) -> dict[str, Tensor]:
    """The pieces of a forward run: the output of every activation, positions and sides where those are hidden.

    Values that differ by `tie`, relative, are equal.
    """
    values = graph.forward(inputs)
    pieces = {name: value for name, value in values.items() if isinstance(graph.steps[name].rule, ActivationRule)}
    for step in graph.steps.values():
        if step.rule.hidden:
            pieces[step.name] = step.rule.piece_of(values[step.inputs[0]], tie)
    return pieces


def recover(
    graph: Graph,
    grad_logits: Tensor,
    known: Known,
    options: Options,
    compare: Callable[[Pass], Match],
    bar: float,
) -> Found:
    """The recursion from one reading of the head; further passes where the forward run corrects the last.

    Parameters
    ----------
    compare : callable
        How the input that a pass recovered compares with what was seen.
    bar : float
        The mismatch at which an answer is good.
    """

    def follow(pattern: Pattern) -> Found:
        passed, pattern = passes(graph, grad_logits, known, pattern, options)
        return Found(passed, pattern, _match_of(graph, passed, compare))

    best = follow(Pattern())
    for _ in range(MAX_FORWARD_RUNS):
        open_end = only_input_open(graph, best.passed)
        if _settled(best, bar) or best.mismatch > HOPELESS or options.budget.spent or open_end:
            break
        options.progress(Event("input", "pass with the activations of the forward run", residual=best.mismatch))
        masked = graph.with_masks(graph.masks(best.passed.values))
        runs = forward_runs(masked, best.passed.values[graph.input], options.precision)
        for pieces in runs:
            other = follow(Pattern(origin="forward run").with_pieces(pieces))
            if better := other.mismatch < best.mismatch or _settled(other, bar):
                break
        if not better:
            break
        stalled = other.mismatch > best.mismatch / 2
        best = other
        if stalled:
            break
    return best


def forward_runs(graph: Graph, inputs: Tensor, precision: float) -> list[dict[str, Tensor]]:
    """The pieces of a forward run, also with the maxima taken at their word where others are taken as equal."""
    runs = [forward_pieces(graph, inputs, EQUAL * precision), forward_pieces(graph, inputs, 0.0)]
    same = all(torch.equal(piece, runs[1][name]) for name, piece in runs[0].items())
    return runs[:1] if same else runs


def _settled(found: Found, bar: float) -> bool:
    """Whether an answer is good, and its pass went to its end: an input that a failed search came near to is no end."""
    return found.mismatch <= bar and found.passed.stop is None


def _match_of(graph: Graph, passed: Pass, compare: Callable[[Pass], Match]) -> Match | None:
    return compare(passed) if graph.input in passed.values else None


# Equations that fit worse than this were built from a wrong gradient or activation.
CONTRADICTION = 1e-3


def only_input_open(graph: Graph, passed: Pass) -> bool:
    """Everything but the network's input is determined, or that is a prior's choice: a forward run teaches nothing."""
    if graph.input in passed.deviations:
        return True
    if passed.stop is not None:
        return False
    fixed = {name: bool(determined.all()) for name, determined in passed.determined.items()}
    consistent = all(report.residual <= CONTRADICTION for report in passed.reports.values())
    return not fixed.pop(graph.input, True) and all(fixed.values()) and consistent

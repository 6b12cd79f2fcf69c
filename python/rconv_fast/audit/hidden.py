"""Which hidden patterns the recovery searches for, and how hard they are by the rows there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.average import AverageRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.patterns.beliefs import MOST
from rconv_fast.walk.graph import Graph, Step

# Rows (gradient constraints and windows) per unknown from which the positions of a max pooling were found in every
# trial, in most, in some: by beliefs (benchmarks/pattern_trials.py), and where the unknowns are too many for those or
# two convolutions are merged.
BELIEVED, ALTERNATED = (3.0, 2.1, 1.4), (4.0, 3.0, 2.0)
# The same of two convolutions merged, all rows of both per value of the first one's input.
MERGED_HOPELESS = 7.0


def is_pool(step: Step) -> bool:
    """Whether a step hides which of its inputs it passed on."""
    return (step.rule.hidden and not step.rule.needs_output) or "maxpool" in step.rule.kind.lower().replace("_", "")


def is_searched(graph: Graph, activation: Step, batch: int) -> bool:
    """Whether an activation whose outputs do not follow from behind is no stop: its pattern is searched for.

    In front of a max pooling, or, for one sample, of an average over all positions: its binary pattern M (F, n) has to
    have as many filters as positions.
    """
    consumers = [graph.steps[name] for name, _ in graph.consumers[activation.name]]
    if all(map(is_pool, consumers)):
        return True
    filters, positions = activation.shape[1], math.prod(activation.shape[2:])
    to_one = (
        len(consumers) == 1 and isinstance(consumers[0].rule, AverageRule) and consumers[0].shape.numel() == filters
    )
    rule = activation.rule
    rectifies = isinstance(rule, ActivationRule) and rule.activation.low == 0 and rule.activation.flats == (0.0,)
    return (
        batch == 1 and to_one and rectifies and filters >= positions and _is_behind_one_convolution(graph, activation)
    )


def _is_behind_one_convolution(graph: Graph, step: Step) -> bool:
    """Whether only affine maps stand between a step and its convolution."""
    before = graph.steps[step.inputs[0]]
    if len(graph.consumers[before.name]) != 1:
        return False
    return isinstance(before.rule, ConvRule) or (
        isinstance(before.rule, AffineRule) and _is_behind_one_convolution(graph, before)
    )


def hidden_pattern(graph: Graph, layers: Sequence[str], unknowns: int, rows_a_value: float) -> tuple[str, bool]:
    """The hidden pattern behind some layers and how hard it is (empty: there is none), and whether that is hopeless."""
    for layer in layers:
        hidden = _hidden_behind(graph, layer)
        if hidden is not None and is_pool(hidden):
            believed = unknowns <= MOST and merged_with(graph, layers) is None
            limits = BELIEVED if believed else ALTERNATED
            hard = _hardness(rows_a_value, limits)
            text = f"{hidden.rule.kind} hides its positions: {rows_a_value:.1f} rows per unknown, {hard}"
            return text, rows_a_value < limits[-1]
        if hidden is not None:
            return f"{hidden.rule.kind} in front of a global average hides its pattern: found in most trials", False
    return "", False


def merged_with(graph: Graph, layers: Sequence[str]) -> Step | None:
    """The convolution that is merged with the one in front of a pooling where that alone has too few equations."""
    before = graph.steps[graph.steps[layers[0]].inputs[0]] if len(layers) == 1 else None
    while before is not None and isinstance(before.rule, ActivationRule | AffineRule):
        before = graph.steps[before.inputs[0]] if len(graph.consumers[before.name]) == 1 else None
    hidden = _hidden_behind(graph, layers[0]) if before is not None and isinstance(before.rule, ConvRule) else None
    pooled = hidden is not None and is_pool(hidden) and isinstance(graph.steps[layers[0]].rule, ConvRule)
    return before if pooled and before is not None and len(graph.consumers[before.name]) == 1 else None


def merged_pattern(layer: str, before: str, rows_a_value: float) -> str:
    """How hard the pattern of two merged convolutions is; empty where it was in no trial found."""
    if rows_a_value < MERGED_HOPELESS:
        return ""
    return f"{layer} merged with {before}: {rows_a_value:.1f} rows per unknown, found in most trials"


def _hidden_behind(graph: Graph, name: str) -> Step | None:
    """The max pooling behind a layer, or the activation in front of an average, with what can be passed between."""
    if len(graph.consumers[name]) != 1:
        return None
    behind = graph.steps[graph.consumers[name][0][0]]
    if is_pool(behind):
        return behind
    if isinstance(behind.rule, ActivationRule) and len(graph.consumers[behind.name]) == 1:
        average = graph.steps[graph.consumers[behind.name][0][0]]
        if isinstance(average.rule, AverageRule):
            return behind
    return _hidden_behind(graph, behind.name) if isinstance(behind.rule, ActivationRule | AffineRule) else None


def _hardness(ratio: float, limits: tuple[float, float, float]) -> str:
    """How often the search for a pooling's positions succeeded in this package's own trials."""
    every, most, some = limits
    if ratio >= every:
        return "found in every trial"
    if ratio >= most:
        return "found in most trials"
    return "found in some trials" if ratio >= some else "not found in trials"

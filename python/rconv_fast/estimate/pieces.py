"""Activations replaced by one linear piece a value, so that a network is smooth while its input moves.

A kinked activation with slope s below 0 is ``a = z (s + (1 - s) d)`` with a bit d for each value: 1 above the kink, 0
below it. Held bits make the gradients smooth in the input; bits between 0 and 1 are a relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.layers.base import Rule
from rconv_fast.walk.graph import Graph, Step

Bits = Mapping[str, Tensor]
Piece = Callable[[Tensor], Tensor]

# Activations that are linear between their kinks.
_PIECEWISE_LINEAR = {"Identity", "ReLU", "ReLU6", "Hardtanh", "clamp", "LeakyReLU", "PReLU", "Hardsigmoid"}
# Those with one kink, at 0, where the slope goes from that of the left side to 1.
_ONE_KINK = {"ReLU", "LeakyReLU", "PReLU"}


def is_piecewise_linear(activation: Activation) -> bool:
    """Whether the activation is linear between its kinks."""
    return activation.name in _PIECEWISE_LINEAR


def kinked_steps(graph: Graph | None) -> list[Step]:
    """The activations whose side is a bit: one kink at 0, linear on both sides; none in a model that is not read."""
    if graph is None:
        return []
    return [step for step in graph.steps.values() if _kink(step.rule)]


def _kink(rule: Rule) -> bool:
    return isinstance(rule, ActivationRule) and rule.activation.name in _ONE_KINK


def hold(graph: Graph, bits: Bits) -> dict[str, Piece]:
    """The kinked activations on the pieces that the bits say."""
    return {name: partial(_held, slope=_left_slope(graph.steps[name], d), d=d) for name, d in bits.items()}


def signs(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bits of a run: 1 where the input of a kinked activation is positive."""
    return {step.name: (values[step.inputs[0]] > 0).to(values[step.inputs[0]]) for step in kinked_steps(graph)}


def turned_over(a: Bits, b: Bits) -> int:
    """How many bits differ."""
    return sum(int((a[name] != b[name]).sum()) for name in a)


def same(a: Bits, b: Bits) -> bool:
    """Whether two patterns agree everywhere."""
    return turned_over(a, b) == 0


def _held(z: Tensor, slope: Tensor, d: Tensor) -> Tensor:
    return z * (slope + (1 - slope) * d)


def _left_slope(step: Step, like: Tensor) -> Tensor:
    """The slope below the kink, of the step's shape."""
    assert isinstance(step.rule, ActivationRule)
    slope: Tensor = step.rule.activation.derivative(-torch.ones_like(like))
    return slope

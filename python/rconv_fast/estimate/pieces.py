"""Activations replaced by one linear piece a value, so that a network is smooth while its input moves."""

from __future__ import annotations

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.walk.graph import Graph, Step

# Activations that are linear between their kinks.
_PIECEWISE_LINEAR = {"Identity", "ReLU", "ReLU6", "Hardtanh", "clamp", "LeakyReLU", "PReLU", "Hardsigmoid"}
# Those with one kink, at 0, where the slope goes from that of the left side to 1.
_ONE_KINK = {"ReLU", "LeakyReLU", "PReLU"}


def is_piecewise_linear(activation: Activation) -> bool:
    """Whether the activation is linear between its kinks."""
    return activation.name in _PIECEWISE_LINEAR


def kinked_steps(graph: Graph) -> list[Step]:
    """The activations whose side is a bit: one kink at 0, linear on both sides."""
    return [
        s for s in graph.steps.values() if isinstance(s.rule, ActivationRule) and s.rule.activation.name in _ONE_KINK
    ]


def left_slope(step: Step, like: Tensor) -> Tensor:
    """The slope below the kink, broadcastable to the step's tensor."""
    assert isinstance(step.rule, ActivationRule)
    return step.rule.activation.derivative(-torch.ones(step.shape, dtype=like.dtype, device=like.device))

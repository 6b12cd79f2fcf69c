"""What the flat pieces of activations say: inequalities for the outputs of the convolution in front.

A ReLU output of exactly 0 means ``o <= 0``; a ReLU6 output of 6 means ``o >= 6``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.affine import AffineRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.dropout import DropoutRule
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.solve import WeightRows
from rconv_fast.walk.graph import Graph


def flat_rows(graph: Graph, values: Mapping[str, Tensor], name: str) -> list[WeightRows]:
    """Inequalities ``w A x <= rhs`` for the values x of step `name`, from all convolutions that read it.

    Parameters
    ----------
    graph : Graph
        The model.
    values : mapping
        Recovered tensors by step, activations snapped to their flat pieces.
    name : str
        The step.

    Returns
    -------
    list of WeightRows
        One block a bounded convolution; w is 0 where nothing is known, negative for lower bounds.
    """
    rows = []
    for consumer, _ in graph.consumers[name]:
        rule = graph.steps[consumer].rule
        if not isinstance(rule, ConvRule):
            continue
        for sign, bound in _bounds(graph, values, consumer):
            if rule.bias is not None:
                bound = bound - sign * rule.bias.reshape(1, -1, *(1,) * (bound.ndim - 2))
            shape = (len(bound), rule.geometry.out_channels, *rule.geometry.out_size)
            rhs = torch.where(sign != 0, bound, 0.0).reshape(shape)
            rows.append(WeightRows(rule.geometry, rule.weight, sign.reshape(shape), rhs))
    return rows


def _bounds(graph: Graph, values: Mapping[str, Tensor], name: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs (sign, bound) with ``sign * y <= bound`` for the values y of a step."""
    found = []
    for consumer, _ in graph.consumers[name]:
        rule = graph.steps[consumer].rule
        if isinstance(rule, ActivationRule) and consumer in values and not _may_be_dropped(graph, consumer):
            found += _flat_bounds(rule, values[consumer])
        elif isinstance(rule, AffineRule):
            # sign (scale y + shift) <= bound
            found += [(s * rule.scale, b - s * rule.shift) for s, b in _bounds(graph, values, consumer)]
    return found


def _may_be_dropped(graph: Graph, name: str) -> bool:
    """Whether a dropout stands behind a step: a 0 may then be its doing."""
    for consumer, _ in graph.consumers[name]:
        rule = graph.steps[consumer].rule
        if isinstance(rule, DropoutRule):
            return True
        if isinstance(rule, RearrangeRule) and _may_be_dropped(graph, consumer):
            return True
    return False


def _flat_bounds(rule: ActivationRule, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``o <= A^-1(low)`` where a is at the low end, ``-o <= -A^-1(high)`` where it is at the high end."""
    found = []
    for flat in rule.activation.flats:
        side = 1.0 if flat == rule.activation.low else -1.0
        at_flat = a == flat
        if bool(at_flat.any()):
            sign = side * at_flat.to(a)
            found.append((sign, sign * rule.activation.inverse(torch.full_like(a, flat))))
    return found

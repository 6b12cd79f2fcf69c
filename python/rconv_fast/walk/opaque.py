"""A model that cannot be read: what its last layer says all the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rconv_fast.errors import RconvError, UnsupportedModelError
from rconv_fast.layers.base import UnsupportedRule
from rconv_fast.layers.registry import Call, linear_rule
from rconv_fast.walk.graph import Graph, Step


def opaque_graph(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
    batch_size: int,
    dtype: torch.dtype,
    reason: str,
) -> Graph:
    """A model that cannot be read: one unknown layer, then its last fully connected one, where there is one.

    Raises
    ------
    UnsupportedModelError
        If no fully connected layer has a gradient.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedModelError(type(model).__name__, reason)
    label, head = layers[-1]
    example = head.weight.new_zeros(batch_size, head.in_features, dtype=dtype)
    names = {id(p): name for name, p in model.named_parameters()}

    def name_of(parameter: Tensor | None) -> str:
        return names.get(id(parameter), "")

    call = Call([example], head.forward, lambda p: gradients.get(name_of(p)), dtype, name_of)
    rule = linear_rule("Linear", call, head.weight, head.bias)
    kind = type(model).__name__
    graph = Graph(input="input", output=label, dtype=dtype, unread=f"{kind} cannot be read: {reason}")
    image = example.new_zeros(batch_size, *input_shape)
    graph.add(Step("input", "input", (), UnsupportedRule("input", "the input itself"), lambda: image, image.shape))
    graph.add(Step("body", kind, ("input",), UnsupportedRule(kind, reason), _unknown, example.shape))
    graph.add(Step(label, label, ("body",), rule, _unknown, torch.Size((batch_size, head.out_features))))
    return graph


def _unknown(*_: Tensor) -> Tensor:
    raise RconvError("invert: a model that cannot be read is not run step by step")

"""The model's graph without its numbers: a copy on the meta device, read like the model itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rconv_fast.audit.shapes import UsualShapes
from rconv_fast.errors import require, require_type
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.reader import build_graph
from rconv_fast.wrappers import meta_copy


def checked_shape(function: str, model: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """One sample's shape, after the checks of the arguments that every public function of this room makes."""
    require_type(isinstance(model, nn.Module), function, "model", "be a torch.nn.Module", type(model).__name__)
    require(any(True for _ in model.parameters()), function, "model", "have parameters", "none")
    sized = isinstance(input_shape, Sequence) and all(isinstance(size, int) for size in input_shape)
    require_type(sized, function, "input_shape", "be a sequence of int", repr(input_shape))
    shape = tuple(input_shape)
    require(len(shape) >= 1 and min(shape) >= 1, function, "input_shape", "be one sample's shape", shape)
    return shape


def read_structure(model: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """The graph of one sample, every tensor on the meta device: no products, no memory.

    Raises
    ------
    UnsupportedModelError
        Where the model cannot be traced, or does not accept the input shape.
    """
    with UsualShapes():
        return build_graph(meta_copy(model), {}, input_shape, 1)

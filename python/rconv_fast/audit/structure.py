"""The model's graph without its numbers: a copy on the meta device, read like the model itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rconv_fast.errors import require, require_type
from rconv_fast.walk.graph import Graph, build_graph


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules in the same modes; parameters and buffers have shapes and dtypes only. Hooks are left out."""
    memo: dict[int, object] = {id(t): _without_numbers(t) for t in itertools.chain(model.parameters(), model.buffers())}
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return plain


def _without_numbers(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


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
    return build_graph(meta_copy(model), {}, input_shape, 1)

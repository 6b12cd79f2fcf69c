"""The calls of a traced model: which there are, what each runs, and what it leaves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rconv_fast.layers.dropout import DROPOUT_CALLS, DROPOUTS, keep_all
from rconv_fast.layers.norm import has_own_statistics, norm_function, norm_sets
from rconv_fast.layers.registry import is_registered


@dataclass(frozen=True)
class Live:
    """A tensor that depends on the network's input: the step that makes it, and an example of it."""

    step: str
    example: Tensor


@dataclass(frozen=True)
class Several:
    """A result of several tensors (chunks, a maximum and its places): each is a step once it is taken."""

    name: str
    inputs: list[str]
    operands: list[Tensor]
    forward: Callable[..., Any]
    example: Any


class _Tracer(fx.Tracer):
    """Traces into user modules; torch's layers, subclasses that keep their forward, and registered ones are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or is_registered(m):
            return True
        return any(
            base.__module__.startswith("torch.nn") and type(m).forward is base.forward
            for base in type(m).__mro__[1:-1]
            if issubclass(base, nn.Module) and base not in (nn.Module, nn.Sequential, nn.ModuleList)
        )


def trace(model: nn.Module) -> fx.Graph:
    """The model's calls in the order it makes them, down to torch's own layers."""
    return _Tracer().trace(model)


def in_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    """A constant in the dtype of the tensors it meets."""
    if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
        return value.to(dtype)
    return value


def holds_tensor(value: Any) -> bool:
    """Whether a result has a tensor anywhere."""
    if isinstance(value, Mapping):
        return any(holds_tensor(entry) for entry in value.values())
    if isinstance(value, tuple | list):
        return any(holds_tensor(entry) for entry in value)
    return isinstance(value, Tensor)


def function_of(node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
    """What a node of the trace runs."""
    if module is not None:
        return lambda *args, **kwargs: _call_module(module, *args, **kwargs)
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return keep_all if call_name(node) in DROPOUT_CALLS else node.target


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module in the dtype of what it is given; its own parameters and buffers stay as they are."""
    if has_own_statistics(module) and norm_sets(module, args[0]) is not None:
        return norm_function(module, *args, **kwargs)
    if isinstance(module, DROPOUTS):
        return keep_all(args[0], module.p, module.training)
    dtype = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    own = [*module.named_parameters(), *module.named_buffers()]
    if dtype is None or (not module.training and all(not t.is_floating_point() or t.dtype == dtype for _, t in own)):
        return module(*args, **kwargs)
    converted = {name: in_dtype(tensor, dtype) for name, tensor in own}
    if module.training:  # running statistics are not to move
        converted |= {name: in_dtype(buffer, dtype).clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, converted, args, kwargs)


def call_name(node: fx.Node) -> str:
    """The name under which a function or method call is known."""
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", str(node.target))
    return name if not inspect.isbuiltin(node.target) or name != "_pad" else "pad"


def first_line(error: Exception) -> str:
    """Of an error's message; its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]

"""The model as a list of steps, read with torch.fx: what feeds what, and the rule of each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rconv_fast.errors import UnsupportedModelError
from rconv_fast.layers.activation import Activation
from rconv_fast.layers.build import CONVOLUTIONS, Call, conv_rule, function_rule, module_rule, split_padding
from rconv_fast.layers.rules import ActivationRule, RearrangeRule, Rule, UnsupportedRule


@dataclass(frozen=True)
class Step:
    """One tensor of the network and the layer that makes it."""

    name: str
    label: str
    inputs: tuple[str, ...]
    rule: Rule
    forward: Callable[..., Tensor]
    shape: torch.Size


@dataclass
class Graph:
    """Steps in forward order; the first is the input, the last the output."""

    steps: dict[str, Step] = field(default_factory=dict)
    consumers: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    input: str = ""
    output: str = ""

    def add(self, step: Step) -> None:
        """Append a step and register it with its operands."""
        self.steps[step.name] = step
        self.consumers[step.name] = []
        for operand, name in enumerate(step.inputs):
            self.consumers[name].append((step.name, operand))

    def activations(self, name: str) -> list[Activation] | None:
        """The activations whose outputs, moved about, a step's values are; None if they are something else."""
        rule, found = self.steps[name].rule, []
        if isinstance(rule, ActivationRule):
            return [rule.activation]
        if not isinstance(rule, RearrangeRule):
            return None
        for operand in self.steps[name].inputs:
            behind = self.activations(operand)
            if behind is None:
                return None
            found += behind
        return found


@dataclass(frozen=True)
class _Live:
    """A tensor that depends on the network's input: the step that makes it, and an example of it."""

    step: str
    example: Tensor


class _Tracer(fx.Tracer):
    """Traces into user modules; torch's own layers (and subclasses that keep their forward) are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return any(
            base.__module__.startswith("torch.nn") and type(m).forward is base.forward
            for base in type(m).__mro__[1:-1]
            if issubclass(base, nn.Module) and base not in (nn.Module, nn.Sequential, nn.ModuleList)
        )


def build_graph(
    model: nn.Module, gradients: Mapping[str, Tensor], input_shape: tuple[int, ...], batch_size: int
) -> Graph:
    """Trace `model` and give every step its rule.

    Raises
    ------
    UnsupportedModelError
        Where the model cannot be traced, or does not accept the input shape.
    """
    try:
        traced = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises under tracing
        reason = f"control flow that torch.fx cannot trace ({_first_line(error)})"
        raise UnsupportedModelError(type(model).__name__, reason) from error
    return _Reader(model, gradients, input_shape, batch_size).read(traced)


class _Reader:
    """Runs the traced nodes once on a zero input and turns those that touch it into steps."""

    def __init__(
        self, model: nn.Module, gradients: Mapping[str, Tensor], input_shape: tuple[int, ...], batch_size: int
    ) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.gradients = gradients
        self.used: set[int] = set()
        reference = next(model.parameters())
        self.example = reference.new_zeros(batch_size, *input_shape)
        self.graph = Graph()
        self.env: dict[fx.Node, Any] = {}

    def read(self, traced: fx.Graph) -> Graph:
        for node in traced.nodes:
            with torch.no_grad():
                self.env[node] = self._visit(node)
        return self.graph

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        if node.op == "output":
            result = self.env.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            if not isinstance(result, _Live):
                raise UnsupportedModelError("output", "a model that does not return one tensor")
            self.graph.output = result.step
            return None
        args = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        return self._layer(node, args, kwargs)

    def _placeholder(self, node: fx.Node) -> Any:
        if self.graph.input:
            if node.args:
                return node.args[0]
            raise UnsupportedModelError(node.name, "a model with several inputs")
        self.graph.input = node.name
        rule = UnsupportedRule("input", "the input itself")
        self.graph.add(Step(node.name, node.name, (), rule, lambda: self.example, self.example.shape))
        return _Live(node.name, self.example)

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        live: list[_Live] = []
        fx.node.map_aggregate((args, kwargs), lambda a: live.append(a) if isinstance(a, _Live) else None)
        unique = list(dict.fromkeys(entry.step for entry in live))
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        function = _function_of(node, module)
        examples = {entry.step: entry.example for entry in live}

        def forward(*operands: Tensor) -> Any:
            values = dict(zip(unique, operands, strict=True))
            plain = lambda a: values[a.step].clone() if isinstance(a, _Live) else a  # noqa: E731 (in-place layers)
            call_args, call_kwargs = fx.node.map_aggregate((args, kwargs), plain)
            return function(*call_args, **call_kwargs)

        operands = [examples[step] for step in unique]
        try:
            result = forward(*operands)
        except Exception as error:  # the model's own code on a shape it does not take
            shapes = ", ".join(str(tuple(x.shape)) for x in operands)
            label = str(node.target) if module is not None else node.name
            raise UnsupportedModelError(label, f"an input of shape {shapes} ({_first_line(error)})") from error
        if not live or not isinstance(result, Tensor):
            return result
        return self._step(node, module, unique, operands, forward, result, args, kwargs)

    def _step(
        self,
        node: fx.Node,
        module: nn.Module | None,
        inputs: list[str],
        operands: list[Tensor],
        forward: Callable[..., Tensor],
        result: Tensor,
        args: Any,
        kwargs: Any,
    ) -> _Live:
        label = str(node.target) if module is not None else node.name
        call = Call(operands, forward, self._gradient_of)
        rule: Rule | None
        try:
            if module is not None and (padding := split_padding(module)) is not None:
                return self._padded_convolution(node, label, module, inputs[0], operands[0], padding)
            if module is not None:
                rule = module_rule(module, call)
            else:
                plain = fx.node.map_aggregate(args, lambda a: a.example if isinstance(a, _Live) else a)
                rule = function_rule(_call_name(node), call, plain, kwargs)
        except _SharedParameter:
            rule = UnsupportedRule("shared", "parameters used more than once, whose gradient is a sum over the uses")
        if rule is None:
            return _Live(inputs[0], result)
        self.graph.add(Step(node.name, label, tuple(inputs), rule, forward, result.shape))
        return _Live(node.name, result)

    def _padded_convolution(
        self,
        node: fx.Node,
        label: str,
        module: Any,
        source: str,
        example: Tensor,
        padding: Callable[[Tensor], Tensor],
    ) -> _Live:
        """A convolution whose padding isn't symmetric zeros: a padding step, then a convolution without."""
        padded = padding(example)
        name = f"{node.name}_padding"
        rule = RearrangeRule.create("Padding", padding, [example])
        self.graph.add(Step(name, f"{label} (padding)", (source,), rule, padding, padded.shape))
        plain = CONVOLUTIONS[module.weight.ndim - 3]
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[module.weight.ndim - 3]
        options = {
            "stride": module.stride,
            "padding": 0,
            "dilation": module.dilation,
            "groups": module.groups,
        }

        def forward(x: Tensor) -> Tensor:
            return convolve(x, module.weight, module.bias, **options)

        call = Call([padded], forward, self._gradient_of)
        conv = conv_rule(plain.__name__, call, module.weight, module.bias, **options)
        result = forward(padded)
        self.graph.add(Step(node.name, label, (name,), conv, forward, result.shape))
        return _Live(node.name, result)

    def _gradient_of(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        if id(parameter) in self.used:
            raise _SharedParameter
        self.used.add(id(parameter))
        return self.gradients.get(self.names.get(id(parameter), ""))


class _SharedParameter(Exception):
    """A parameter is used by a second step."""


def _function_of(node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
    if module is not None:
        return module
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _call_name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", str(node.target))
    return name if not inspect.isbuiltin(node.target) or name != "_pad" else "pad"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

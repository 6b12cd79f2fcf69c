"""Reads a model with torch.fx: every tensor that depends on the input becomes a step with its rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rconv_fast.errors import ArgumentError, UnsupportedModelError
from rconv_fast.layers.base import Rule, UnsupportedRule
from rconv_fast.layers.check import check_rule
from rconv_fast.layers.dropout import DropoutRule
from rconv_fast.layers.norm import NormRule, Statistics, batch_statistics
from rconv_fast.layers.rearrange import RearrangeRule
from rconv_fast.layers.registry import (
    CONVOLUTIONS,
    REARRANGE_CALLS,
    Call,
    conv_rule,
    function_rule,
    linear_rule,
    module_rule,
    unsupported,
)
from rconv_fast.losses import logits_in
from rconv_fast.observation import SharedGradients
from rconv_fast.walk.calls import Live, Several, call_name, first_line, function_of, holds_tensor, in_dtype, trace
from rconv_fast.walk.canonical import OUTPUT_WRAPPERS, positions_back, positions_last, split_padding
from rconv_fast.walk.graph import Graph, Step

Forward = Callable[..., Tensor]
_UNTRACEABLE = "control flow that torch.fx cannot trace"


def build_graph(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
    batch_size: int,
    dtype: torch.dtype = torch.float64,
) -> Graph:
    """Trace `model` and give every step its rule, in the working precision `dtype`; no parameter is copied.

    Raises
    ------
    UnsupportedModelError
        Where the model cannot be traced, or does not accept the input shape.
    """
    try:
        traced = trace(model)
    except Exception as error:  # whatever the model's own code raises under tracing
        reason = f"{_UNTRACEABLE} ({first_line(error)})"
        raise UnsupportedModelError(type(model).__name__, reason) from error
    return _Reader(model, gradients, input_shape, batch_size, dtype).read(traced)


class _Reader:
    """Runs the traced nodes once on a zero input and turns those that depend on it into steps."""

    def __init__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        input_shape: tuple[int, ...],
        batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.gradients = gradients
        self.uses: Counter[int] = Counter()
        reference = next(p for p in model.parameters() if p.is_floating_point())
        self.example = reference.new_zeros(batch_size, *input_shape, requires_grad=False)
        self.graph = Graph(dtype=dtype)
        self.env: dict[fx.Node, Any] = {}

    def read(self, traced: fx.Graph) -> Graph:
        self._count_uses(traced)
        if self._first_is_embedding(traced):
            self.example = self.example.long()
        for node in traced.nodes:
            with torch.no_grad():
                self.env[node] = self._visit(node)
        return self.graph

    def _count_uses(self, traced: fx.Graph) -> None:
        """How often each parameter is used: the gradient of one that is used twice is a sum over the uses."""
        for node in traced.nodes:
            if node.op == "call_module":
                self.uses.update({id(p) for p in self.modules[str(node.target)].parameters()})
            elif node.op == "get_attr":
                value = self._attribute(node)
                if isinstance(value, nn.Parameter):
                    self.uses[id(value)] += len(node.users)

    def _first_is_embedding(self, traced: fx.Graph) -> bool:
        users = next(node for node in traced.nodes if node.op == "placeholder").users
        return any(
            isinstance(self.modules.get(str(user.target)), nn.Embedding | nn.EmbeddingBag)
            or getattr(user.target, "__name__", "") == "embedding"
            for user in users
        )

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.model
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            self._finish(fx.node.map_arg(node.args[0], lambda n: self.env[n]))
            return None
        args = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        if isinstance(node.target, type) and issubclass(node.target, tuple):
            return (*args, *kwargs.values())  # a named tuple: several outputs, no layer
        return self._layer(node, args, kwargs)

    def _finish(self, returned: Any) -> None:
        """Find the logits in what the model returns, and look through what only wraps them."""
        result = logits_in(returned)
        if not isinstance(result, Live):
            raise UnsupportedModelError("output", "a model that returns no tensor that depends on its input")
        name, wrappers = result.step, []
        while True:
            step = self.graph.steps[name]
            wrapper = OUTPUT_WRAPPERS.get(step.rule.kind.lower())
            reshaped = isinstance(step.rule, RearrangeRule) and step.rule.keeps_order
            if len(step.inputs) != 1 or not (wrapper or reshaped):
                break
            wrappers += [wrapper] if wrapper else []
            name = step.inputs[0]
        if len(self.graph.steps[name].shape) != 2:  # a reshape that the head needs, or no head at all
            name, wrappers = result.step, []
        self.graph.output, self.graph.wrappers = name, tuple(reversed(wrappers))
        for later in list(self.graph.steps)[list(self.graph.steps).index(name) + 1 :]:
            self._drop(later)

    def _drop(self, name: str) -> None:
        """Take out a step behind the logits (others, an auxiliary output say, have no part in the loss either)."""
        del self.graph.steps[name], self.graph.consumers[name]
        for consumers in self.graph.consumers.values():
            consumers[:] = [entry for entry in consumers if entry[0] != name]

    def _placeholder(self, node: fx.Node) -> Any:
        if self.graph.input:
            if node.args:
                return node.args[0]
            raise UnsupportedModelError(node.name, "a model with several inputs")
        self.graph.input = node.name
        rule = UnsupportedRule("input", "the input itself")
        self.graph.add(Step(node.name, node.name, (), rule, lambda: self.example, self.example.shape))
        return Live(node.name, self.example)

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        live: list[Live] = []
        fx.node.map_aggregate((args, kwargs), lambda a: live.append(a) if isinstance(a, Live) else None)
        if args and isinstance(args[0], Several):
            return self._one_of_several(node, args[0], args[1:], kwargs)
        unique = list(dict.fromkeys(entry.step for entry in live))
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        function = function_of(node, module)
        examples = {entry.step: entry.example for entry in live}

        def forward(*operands: Tensor) -> Any:
            values = dict(zip(unique, operands, strict=True))
            dtype = next((x.dtype for x in operands if x.is_floating_point()), None)
            plain = lambda a: values[a.step].clone() if isinstance(a, Live) else in_dtype(a, dtype)  # noqa: E731 (in-place)
            call_args, call_kwargs = fx.node.map_aggregate((args, kwargs), plain)
            return function(*call_args, **call_kwargs)

        operands = [examples[step] for step in unique]
        label = str(node.target) if module is not None else node.name
        try:
            result = forward(*operands)
        except Exception as error:  # the model's own code on a shape it does not take
            shapes = ", ".join(str(tuple(x.shape)) for x in operands)
            must = f"be one that the model accepts (at {label!r}, on {shapes}: {first_line(error)})"
            raise ArgumentError(f"invert: input_shape must {must}, got {tuple(self.example.shape[1:])}") from error
        if not live:
            return result
        if not isinstance(result, Tensor):
            holds = holds_tensor(result)
            kind = call_name(node) if module is None else type(module).__name__
            return Several(kind, unique, operands, forward, result) if holds else result
        return self._step(node, label, module, unique, operands, forward, result, args, kwargs)

    def _one_of_several(self, node: fx.Node, source: Several, args: Any, kwargs: Any) -> Any:
        """What is taken out of a result of several tensors depends on the input as all of it does."""
        function = function_of(node, None)
        try:
            result = function(source.example, *args, **kwargs)
        except Exception as error:  # tracing saw no tuple, and took another way than the model does
            raise UnsupportedModelError(node.name, f"{_UNTRACEABLE} ({first_line(error)})") from error

        def forward(*operands: Tensor) -> Any:
            return function(source.forward(*operands), *args, **kwargs)

        if not isinstance(result, Tensor):
            several = Several(source.name, source.inputs, source.operands, forward, result)
            return several if holds_tensor(result) else result
        rule: Rule = unsupported(source.name)
        if source.name in REARRANGE_CALLS:
            rule = RearrangeRule.create(source.name, forward, self._working(source.operands))
        self.graph.add(Step(node.name, node.name, tuple(source.inputs), rule, forward, result.shape))
        return Live(node.name, result)

    def _working(self, operands: list[Tensor]) -> list[Tensor]:
        return [x.to(self.graph.dtype) if x.is_floating_point() else x for x in operands]

    def _step(
        self,
        node: fx.Node,
        label: str,
        module: nn.Module | None,
        inputs: list[str],
        operands: list[Tensor],
        forward: Forward,
        result: Tensor,
        args: Any,
        kwargs: Any,
    ) -> Live:
        call = Call(self._working(operands), forward, self._gradient_of, self.graph.dtype, self._name_of)
        rule: Rule | None
        try:
            if module is not None and (padding := split_padding(module)) is not None:
                return self._padded_convolution(node, label, module, inputs[0], call, padding, result)
            if isinstance(module, nn.Linear) and operands[0].ndim > 2:
                return self._linear_over_positions(node, label, module, inputs[0], call, result)
            if module is not None:
                rule = module_rule(module, call)
            else:
                plain = fx.node.map_aggregate(args, lambda a: a.example if isinstance(a, Live) else a)
                rule = function_rule(call_name(node), call, plain, kwargs)
        except _SharedParameter:
            rule = UnsupportedRule("shared", "parameters used more than once, whose gradient is a sum over the uses")
        if rule is None:
            return Live(inputs[0], result)
        check_rule(label, rule, call, module)
        if isinstance(rule, NormRule) and module is not None:
            rule = replace(rule, statistics=self._statistics(label, module, call.operands[0]))
        if isinstance(rule, NormRule | DropoutRule):
            rule = replace(rule, dead_is_zero=self.graph.never_negative(inputs[0]))
        self.graph.add(Step(node.name, label, tuple(inputs), rule, forward, result.shape))
        return Live(node.name, result)

    def _statistics(self, label: str, module: nn.Module, x: Tensor) -> Statistics | None:
        """Those of the batch in a norm, where the client sent its buffers back after one step."""
        if not isinstance(self.gradients, SharedGradients) or self.gradients.steps > 1:
            return None
        mean, var = (self.gradients.statistics.get(f"{label}.{name}") for name in ("running_mean", "running_var"))
        return batch_statistics(module, mean, var, x)

    def _add_rearranged(self, name: str, label: str, source: str, example: Tensor, forward: Forward) -> Tensor:
        """A step that moves values about, and an example of it in the working precision."""
        rule = RearrangeRule.create("Rearrange", forward, [example])
        moved = forward(example)
        self.graph.add(Step(name, label, (source,), rule, forward, moved.shape))
        return moved

    def _padded_convolution(
        self, node: fx.Node, label: str, module: Any, source: str, call: Call, padding: Forward, result: Tensor
    ) -> Live:
        """A convolution whose padding isn't symmetric zeros: a padding step, then a convolution without."""
        name = f"{node.name}_padding"
        padded = self._add_rearranged(name, f"{label} (padding)", source, call.operands[0], padding)
        ndim = module.weight.ndim - 2
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[ndim - 1]
        options = {"stride": module.stride, "padding": 0, "dilation": module.dilation, "groups": module.groups}

        def forward(x: Tensor) -> Tensor:
            return convolve(x, in_dtype(module.weight, x.dtype), in_dtype(module.bias, x.dtype), **options)

        plain = replace(call, operands=[padded], forward=forward)
        rule = conv_rule(CONVOLUTIONS[ndim - 1].__name__, plain, module.weight, module.bias, **options)
        check_rule(label, rule, plain, module)
        self.graph.add(Step(node.name, label, (name,), rule, forward, result.shape))
        return Live(node.name, result)

    def _linear_over_positions(
        self, node: fx.Node, label: str, module: nn.Linear, source: str, call: Call, result: Tensor
    ) -> Live:
        """A fully connected layer on several positions: a convolution of kernel 1 between two permutations."""
        shape = call.operands[0].shape
        before, middle = f"{node.name}_positions", f"{node.name}_convolution"
        moved = self._add_rearranged(before, f"{label} (positions)", source, call.operands[0], positions_last)

        def forward(x: Tensor) -> Tensor:
            return nn.functional.conv1d(x, in_dtype(module.weight, x.dtype)[..., None], in_dtype(module.bias, x.dtype))

        plain = replace(call, operands=[moved], forward=forward)
        rule = linear_rule("Linear", plain, module.weight, module.bias, positions=moved.shape[2])
        self.graph.add(Step(middle, label, (before,), rule, forward, forward(moved).shape))
        example = moved.new_zeros(self.graph.steps[middle].shape)
        self._add_rearranged(node.name, f"{label} (back)", middle, example, lambda y: positions_back(y, shape))
        return Live(node.name, result)

    def _gradient_of(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        if self.uses[id(parameter)] > 1:
            raise _SharedParameter
        return self.gradients.get(self._name_of(parameter))

    def _name_of(self, parameter: Tensor | None) -> str:
        return self.names.get(id(parameter), "")


class _SharedParameter(Exception):
    """A parameter is used by a second step."""

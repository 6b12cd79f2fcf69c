"""The model as a list of steps: what feeds what, and the rule of each step."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.layers.base import Rule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.layers.dropout import DropoutRule
from rconv_fast.layers.norm import NormRule
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.rearrange import RearrangeRule

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """One tensor of the network and the layer that makes it; `forward` works in its operands' dtype."""

    name: str
    label: str
    inputs: tuple[str, ...]
    rule: Rule
    forward: Forward
    shape: torch.Size

    @property
    def is_relu(self) -> bool:
        """Whether it is a ReLU's output."""
        return isinstance(self.rule, ActivationRule) and self.rule.activation.name == "ReLU"


@dataclass
class Graph:
    """Steps in forward order; the first is the input, the last the logits.

    `wrappers` names what stands behind the logits at the model's end, in order; `dtype` is the working precision;
    `unread` says why a model could not be read, and is empty for one that could.
    """

    steps: dict[str, Step] = field(default_factory=dict)
    consumers: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    input: str = ""
    output: str = ""
    wrappers: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    unread: str = ""

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
        if not isinstance(rule, RearrangeRule | MaxPoolRule | DropoutRule):
            return None
        for operand in self.steps[name].inputs:
            behind = self.activations(operand)
            if behind is None:
                return None
            found += behind
        return found

    @property
    def in_training(self) -> bool:
        """Whether layers in training mode make a sample's gradient depend on its batch or on a private mask."""
        rules = [step.rule for step in self.steps.values()]
        return any(isinstance(r, DropoutRule) or (isinstance(r, NormRule) and r.sets.groups is None) for r in rules)

    def statistics_missed(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """How far the values of a run are from the statistics that the client sent, in units of their rounding."""
        norms = [(step.rule, step.inputs[0]) for step in self.steps.values() if isinstance(step.rule, NormRule)]
        return [part for rule, source in norms for part in rule.statistics_missed(values[source])]

    def never_negative(self, name: str) -> bool:
        """Whether a step's values are outputs of activations that have 0 as their low flat piece, moved about."""
        activations = self.activations(name)
        return activations is not None and all(a.low == 0 and 0.0 in a.flats for a in activations)

    def masks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask of each dropout in training mode, by step, from recovered values."""
        dropouts = [step for step in self.steps.values() if isinstance(step.rule, DropoutRule) and step.name in values]
        return {step.name: self._kept(step, values) for step in dropouts}

    def _kept(self, dropout: Step, values: Mapping[str, Tensor]) -> Tensor:
        """What is not 0: before the dropout, where an activation has been put on its side of the kink; else behind."""
        source = dropout.inputs[0] if self.never_negative(dropout.inputs[0]) else dropout.name
        return (self._settled(source, values) != 0).to(self.dtype)

    def _settled(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        step = self.steps[name]
        if not isinstance(step.rule, RearrangeRule):
            return values[name]
        return step.forward(*(self._settled(operand, values) for operand in step.inputs))

    def with_masks(self, masks: Mapping[str, Tensor]) -> Graph:
        """The same with these masks in its dropouts."""
        steps = {name: _masked(step, masks[name]) if name in masks else step for name, step in self.steps.items()}
        return replace(self, steps=steps)

    def ahead(self, known: Container[str], name: str) -> list[Step] | None:
        """The steps to run, in order, to have a tensor from known ones; None where a way back ends at the input."""
        needed, waiting = set(), [name]
        while waiting:
            entry = waiting.pop()
            if entry in known or entry in needed:
                continue
            if not self.steps[entry].inputs:
                return None
            needed.add(entry)
            waiting += self.steps[entry].inputs
        return [step for step in self.steps.values() if step.name in needed]

    def layer_of(self, name: str) -> tuple[str, str]:
        """Label and kind of the layer(s) whose input a step's tensor is."""
        consumers = [self.steps[consumer] for consumer, _ in self.consumers[name]]
        layers = [step for step in consumers if isinstance(step.rule, ConvRule)] or consumers
        return " + ".join(step.label for step in layers), " + ".join(dict.fromkeys(step.rule.kind for step in layers))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Every step's tensor when the model is run on `inputs`."""
        values = {self.input: inputs}
        with torch.no_grad():
            for name, step in list(self.steps.items())[1:]:
                values[name] = step.forward(*(values[o] for o in step.inputs))
        return values


def _masked(dropout: Step, mask: Tensor) -> Step:
    return replace(dropout, forward=lambda a: dropout.forward(a) * mask.to(a))

"""From the last layer's gradient to the gradient of each sample's logits, for every loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from rconv_fast.binary_head import HeadReading, separate_logistic_head, separate_mse_head
from rconv_fast.errors import RconvError, UnsupportedModelError, require
from rconv_fast.graph import Graph, Step
from rconv_fast.head import separate_softmax_batch
from rconv_fast.layers.activation import Activation
from rconv_fast.layers.rules import ActivationRule, ConvRule
from rconv_fast.peeling import PeeledBatch, peel_relu_batch


@dataclass(frozen=True)
class HeadCandidate:
    """One reading of the head: ``dL/dlogits`` (B, n), labels, and the tensors known with them, by step."""

    grad_logits: Tensor
    labels: Tensor
    values: dict[str, Tensor]
    certificates: Tensor
    complete: bool
    notes: list[str] = field(default_factory=list)


def head_candidates(
    graph: Graph, loss: str, batch_size: int | None, labels: Sequence[int] | Tensor | None
) -> list[HeadCandidate]:
    """Every reading of the last layer that its gradient allows (one, but for a logistic head without bias).

    Raises
    ------
    UnsupportedModelError
        If the model does not end in a fully connected layer whose gradient is given.
    RconvError
        If no sample can be separated.
    """
    step = graph.steps[graph.output]
    rule = step.rule
    if not isinstance(rule, ConvRule) or rule.geometry.n_taps != 1 or len(step.shape) != 2:
        reason = f"{rule.kind} as the last layer, where a fully connected one is needed"
        raise UnsupportedModelError(step.label, reason)
    if rule.grad_weight is None:
        raise UnsupportedModelError(step.label, "a last layer without gradient")
    grad_weight, weight = rule.grad_weight.squeeze(-1), rule.weight.squeeze(-1)
    head = (grad_weight, rule.grad_bias, weight, rule.bias)
    if loss == "cross_entropy":
        return [_softmax_candidate(graph, head, batch_size, labels)]
    function = f"invert: {loss} head at {step.label!r}"
    if loss == "mse":
        targets = None if labels is None else torch.as_tensor(labels).to(weight).reshape(-1, len(weight))
        readings = separate_mse_head(*head, targets=targets)
    else:
        require(batch_size in (None, 1), "invert", "batch_size", f"be 1 for {loss}", batch_size)
        readings = separate_logistic_head(*head)
    if not readings:
        raise RconvError(f"{function} must hold the gradient of one sample, got one that no sample explains")
    activations = graph.activations(step.inputs[0])
    possible = [r for r in readings if activations is None or _in_range(r.inputs, activations)]
    return [_reading_candidate(step.inputs[0], reading) for reading in possible or readings]


def _in_range(x: Tensor, activations: Sequence[Activation]) -> bool:
    """Whether activations can put out the values x, up to far more than rounding and far less than their size."""
    low, high = min(a.low for a in activations), max(a.high for a in activations)
    slack = 1e-3 * float(x.abs().max())
    return low - slack <= float(x.min()) and float(x.max()) <= high + slack


Head = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _reading_candidate(name: str, reading: HeadReading) -> HeadCandidate:
    """One reading of a logistic or regression head, whose input is the step `name`."""
    residuals = torch.full((len(reading.inputs),), reading.residual, dtype=torch.float64)
    return HeadCandidate(reading.grad_logits, reading.targets, {name: reading.inputs}, residuals, complete=True)


def _softmax_candidate(
    graph: Graph, head: Head, batch_size: int | None, labels: Sequence[int] | Tensor | None
) -> HeadCandidate:
    """The samples of a batch: from the head, or from a stack of ReLU layers where the head mixes too many."""
    step, stack = graph.steps[graph.output], _relu_stack(graph)
    separation = separate_softmax_batch(*head, batch_size=batch_size, labels=labels)
    if not separation.complete and stack is not None:
        peeled = peel_relu_batch(stack.layers, stack.gradients, batch_size=batch_size)
        if len(peeled.inputs) > int(separation.multiplicities.sum()):
            return _peeled_candidate(graph, stack, peeled)
    if not len(separation.inputs):
        raise RconvError(
            f"invert: the head at {step.label!r} must hold separable samples, got none ({separation.reason})"
        )
    index = torch.repeat_interleave(separation.multiplicities)
    share = separation.multiplicities.to(separation.grad_logits)[:, None]
    notes = [separation.reason] if separation.reason else []
    if len(separation.duplicates):
        notes.append(f"{len(separation.duplicates)} sample(s) occur more than once and cannot be told apart")
    return HeadCandidate(
        (separation.grad_logits / share)[index],
        separation.labels[index],
        {step.inputs[0]: separation.inputs[index]},
        separation.residuals[index],
        separation.complete,
        notes,
    )


@dataclass(frozen=True)
class _ReluStack:
    """Fully connected layers with ReLUs between them, down to the logits; `steps` from the first one's input on."""

    steps: list[Step]
    layers: list[tuple[Tensor, Tensor]]
    gradients: list[tuple[Tensor, Tensor]]


def _relu_stack(graph: Graph) -> _ReluStack | None:
    """The stack that ends the network, if it has two layers or more, with biases and all gradients."""
    steps = [graph.steps[graph.output]]
    while len(graph.consumers[steps[-1].inputs[0]]) == 1:
        before = graph.steps[steps[-1].inputs[0]]
        linear = isinstance(before.rule, ConvRule) and before.rule.geometry.n_taps == 1 and len(before.shape) == 2
        relu = isinstance(before.rule, ActivationRule) and before.rule.activation.name == "ReLU"
        if not (linear if isinstance(steps[-1].rule, ActivationRule) else relu):
            break
        steps.append(before)
    if isinstance(steps[-1].rule, ActivationRule):
        steps.pop()
    layers, gradients = [], []
    for step in reversed(steps):
        rule = step.rule
        if isinstance(rule, ConvRule):
            if rule.bias is None or rule.grad_weight is None or rule.grad_bias is None:
                return None
            layers.append((rule.weight.squeeze(-1), rule.bias))
            gradients.append((rule.grad_weight.squeeze(-1), rule.grad_bias))
    if len(layers) < 2:
        return None
    return _ReluStack([graph.steps[steps[-1].inputs[0]], *reversed(steps)], layers, gradients)


def _peeled_candidate(graph: Graph, stack: _ReluStack, peeled: PeeledBatch) -> HeadCandidate:
    """The peeled samples, with every tensor of the stack by a forward run."""
    values = {stack.steps[0].name: peeled.inputs}
    with torch.no_grad():
        for before, step in pairwise(stack.steps):
            values[step.name] = step.forward(values[before.name])
    del values[graph.output]
    notes = [f"the batch was taken apart in {stack.steps[1].label}, as the head alone mixes too many samples"]
    notes += [peeled.reason] if peeled.reason else []
    return HeadCandidate(peeled.grad_logits, peeled.labels, values, peeled.residuals, peeled.complete, notes)

"""From the last layer's gradient to the gradient of each sample's logits, for every loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.binary_head import HeadReading, separate_logistic_head, separate_mse_head
from rconv_fast.errors import RconvError, UnsupportedModelError, require
from rconv_fast.graph import Graph
from rconv_fast.head import separate_softmax_batch
from rconv_fast.layers.rules import ConvRule


@dataclass(frozen=True)
class HeadCandidate:
    """One reading of the head: ``dL/dlogits`` (B, n), labels, and the head's inputs (B, d) where they are known."""

    grad_logits: Tensor
    labels: Tensor
    inputs: Tensor | None
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
        return [_softmax_candidate(step.label, head, batch_size, labels)]
    function = f"invert: {loss} head at {step.label!r}"
    if loss == "mse":
        targets = None if labels is None else torch.as_tensor(labels).to(weight).reshape(-1, len(weight))
        readings = separate_mse_head(*head, targets=targets)
    else:
        require(batch_size in (None, 1), "invert", "batch_size", f"be 1 for {loss}", batch_size)
        readings = separate_logistic_head(*head)
    if not readings:
        raise RconvError(f"{function} must hold the gradient of one sample, got one that no sample explains")
    return [_reading_candidate(reading) for reading in readings]


Head = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _reading_candidate(reading: HeadReading) -> HeadCandidate:
    """One reading of a logistic or regression head."""
    residuals = torch.full((len(reading.inputs),), reading.residual, dtype=torch.float64)
    return HeadCandidate(reading.grad_logits, reading.targets, reading.inputs, residuals, complete=True)


def _softmax_candidate(
    label: str, head: Head, batch_size: int | None, labels: Sequence[int] | Tensor | None
) -> HeadCandidate:
    """The separated samples, each repeated as often as it occurs."""
    separation = separate_softmax_batch(*head, batch_size=batch_size, labels=labels)
    if not len(separation.inputs):
        raise RconvError(f"invert: the head at {label!r} must hold separable samples, got none ({separation.reason})")
    index = torch.repeat_interleave(separation.multiplicities)
    share = separation.multiplicities.to(separation.grad_logits)[:, None]
    notes = [separation.reason] if separation.reason else []
    if len(separation.duplicates):
        notes.append(f"{len(separation.duplicates)} sample(s) occur more than once and cannot be told apart")
    return HeadCandidate(
        (separation.grad_logits / share)[index],
        separation.labels[index],
        separation.inputs[index],
        separation.residuals[index],
        separation.complete,
        notes,
    )

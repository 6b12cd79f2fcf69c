"""From the last layer's gradient to the gradient of each sample's logits: every reading, for every loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rconv_fast.adam import SURE
from rconv_fast.budget import Budget
from rconv_fast.containers import read_tensor
from rconv_fast.heads.counts import label_counts
from rconv_fast.heads.head import Head
from rconv_fast.heads.logistic import logistic_readings
from rconv_fast.heads.mse import mse_readings
from rconv_fast.heads.peeling import peel_relu_batch
from rconv_fast.heads.separation import HeadSeparation
from rconv_fast.heads.softmax import checked_labels, separate
from rconv_fast.layers.activation import Activation, ActivationRule
from rconv_fast.layers.conv import ConvRule
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.walk.graph import Graph, Step


@dataclass(frozen=True)
class HeadCandidate:
    """One reading of the head; all tensors have one row a sample, repeated samples repeated.

    Attributes
    ----------
    grad_logits : Tensor, shape (B, n)
        ``dL/dlogits`` of each sample.
    labels : Tensor, shape (B,) or (B, n)
        Class numbers, or targets.
    values : mapping of str to Tensor
        The tensors known with it, by step name.
    certificates : Tensor, shape (B,)
        Relative violation of the equations that each sample alone must satisfy.
    multiplicities : Tensor, shape (B,), int64
        How often the sample occurs in the batch.
    complete : bool
        Whether the reading explains the head's whole gradient, nothing in it is assumed, and equations were left over.
    spare : int
        Equations of the head that the reading did not use; with none, almost any gradient has such a reading.
    scale : float
        Factor by which the gradients are multiplied.
    errors : Tensor, shape (B,), or None
        Predicted relative error of the last layer's input under the noise, where it was computed.
    notes : tuple of str
        What a reader must know.
    seen : bool
        Whether `grad_logits` is what the client computed, to the last bit.
    """

    grad_logits: Tensor
    labels: Tensor
    values: Mapping[str, Tensor]
    certificates: Tensor
    multiplicities: Tensor
    complete: bool
    spare: int
    scale: float = 1.0
    errors: Tensor | None = None
    notes: tuple[str, ...] = ()
    seen: bool = False


@dataclass(frozen=True)
class HeadOutcome:
    """What the head gives away.

    Attributes
    ----------
    candidates : tuple of HeadCandidate
        Every reading that explains the head's gradient, best first; empty where nothing can be separated.
    batch_size : int or None
        Samples behind the gradient, as far as it follows.
    label_counts : Tensor or None
        How many samples each class has (n,), also where the samples cannot be separated.
    stops_at, reason : str
        The last layer's name and one sentence, where no reading is complete; empty otherwise.
    """

    candidates: tuple[HeadCandidate, ...] = ()
    batch_size: int | None = None
    label_counts: Tensor | None = None
    stops_at: str = ""
    reason: str = ""


def head_candidates(
    graph: Graph,
    observation: Observation,
    batch_size: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    budget: Budget = Budget(),  # noqa: B008 (frozen)
) -> HeadOutcome:
    """Every reading of the last layer that its gradient allows.

    Parameters
    ----------
    graph : Graph
        The model, wrappers at its end already removed.
    observation : Observation
        Gradients, noise, scale and loss.
    batch_size : int, optional
        Number of samples.
    labels : sequence of int or Tensor, optional
        Labels in any order (targets for regression).
    budget : Budget
        When it is over, what is known is returned.

    Returns
    -------
    HeadOutcome
        Never raises for a head that cannot be separated: ``reason`` says why.
    """
    step = graph.steps[graph.output]
    rule = step.rule
    if not isinstance(rule, ConvRule) or rule.geometry.n_taps != 1 or len(step.shape) != 2:
        reason = f"{rule.kind} as the last layer, where a fully connected one is needed"
        return HeadOutcome(stops_at=step.label, reason=reason)
    if rule.grad_weight is None:
        return HeadOutcome(stops_at=step.label, reason="a last layer without gradient")
    sigma = _noise_of(observation, rule)
    if sigma is not None and any(s is not None and bool(s.isinf().any()) for s in sigma):
        return HeadOutcome((), batch_size, None, step.label, _signs_only(observation.loss, rule.grad_bias, sigma[1]))
    head = Head.create(
        rule.grad_weight.squeeze(-1), rule.grad_bias, rule.weight.squeeze(-1), rule.bias, observation.loss,
        rounding=2 * observation.rounding,
        sigma=sigma,
        scale=observation.scale,
        budget=budget,
    )  # fmt: skip
    if not bool(head.grad_weight.any()):
        return HeadOutcome((), batch_size, None, step.label, "a last layer whose gradient is zero")
    if observation.loss.takes_labels:
        return _softmax_outcome(graph, head, rule.weight.dtype, batch_size, labels)
    targets = (
        None if labels is None else read_tensor("invert", "labels", labels).to(head.weight).reshape(-1, head.n_classes)
    )
    readings = mse_readings(head, targets) if observation.loss.name == "mse" else logistic_readings(head)
    nothing = "a gradient that no sample explains"
    if observation.loss.name == "mse" and not head.has_bias and targets is None:
        nothing = "a regression without a bias here, which shows its input up to a factor: pass the targets as labels="
    return _reading_outcome(graph, step, [r.to(rule.weight.dtype) for r in readings], batch_size, nothing)


def _signs_only(loss: Loss, grad_bias: Tensor | None, sigma: Tensor | None) -> str:
    """The reason where sizes are lost; ``db = mean(softmax - onehot)`` is negative for classes of the batch only."""
    reason = "a last layer of whose gradients signs are left, and of many no size"
    if grad_bias is None or sigma is None or not loss.takes_labels or loss.label_smoothing > 0:
        return reason
    negative = (grad_bias < 0) & (sigma.isinf() | (grad_bias < -SURE * sigma))
    return f"{reason}: classes {negative.nonzero().flatten().tolist()} are in the batch"


def _noise_of(observation: Observation, rule: ConvRule) -> tuple[Tensor, Tensor | None] | None:
    """The stated noise of the layer's gradients."""
    weight, bias = rule.stored.weight_name, rule.stored.bias_name
    if weight not in observation.noise:
        return None
    sigma = observation.sigma(weight).expand_as(observation.gradients[weight])
    if rule.grad_bias is None or bias not in observation.noise:
        return sigma, None
    return sigma, observation.sigma(bias).expand_as(observation.gradients[bias])


def _reading_outcome(
    graph: Graph, step: Step, readings: Sequence[HeadSeparation], batch_size: int | None, nothing: str
) -> HeadOutcome:
    """The readings of a logistic or regression head, those that the layer before can put out if there are any.

    `nothing` is the reason where there is no reading at all.
    """
    if not readings:
        return HeadOutcome((), batch_size, None, step.label, nothing)
    agreeing = [r for r in readings if batch_size in (None, r.batch_size)]
    if not agreeing:
        reason = f"a gradient that {readings[0].batch_size} sample explains, where batch_size says {batch_size}"
        return HeadOutcome((), batch_size, None, step.label, reason)
    activations = graph.activations(step.inputs[0])
    possible = [r for r in agreeing if activations is None or _in_range(r.inputs, activations)] or agreeing
    notes = []
    if batch_size == 1 and any(r.spare <= 0 for r in possible):
        possible = [replace(r, complete=True, reason="") if r.spare <= 0 else r for r in possible]
        notes = [
            "one sample, as batch_size says: the gradient of one output could not tell it from a mixture of several"
        ]
    candidates = tuple(_candidate({step.inputs[0]: r.inputs}, r, notes) for r in possible)
    reason = "" if any(c.complete for c in candidates) else possible[0].reason
    return HeadOutcome(candidates, possible[0].batch_size, None, step.label if reason else "", reason)


def _in_range(x: Tensor, activations: Sequence[Activation]) -> bool:
    """Whether activations can put out the values x, up to far more than rounding and far less than their size."""
    low, high = min(a.low for a in activations), max(a.high for a in activations)
    slack = 1e-3 * float(x.abs().max())
    return low - slack <= float(x.min()) and float(x.max()) <= high + slack


def _candidate(values: Mapping[str, Tensor], found: HeadSeparation, notes: Sequence[str] = ()) -> HeadCandidate:
    """A separation as rows, one for every occurrence of a sample."""
    index = torch.repeat_interleave(found.multiplicities)
    share = found.multiplicities.to(found.grad_logits)[:, None]
    return HeadCandidate(
        grad_logits=(found.grad_logits / share)[index],
        labels=found.labels[index],
        values={name: value[index] for name, value in values.items()},
        certificates=found.residuals[index],
        multiplicities=found.multiplicities[index],
        complete=found.complete,
        spare=found.spare,
        scale=found.scale,
        errors=None if found.errors is None else found.errors[index],
        notes=tuple(notes),
        seen=found.seen,
    )


def _softmax_outcome(
    graph: Graph, head: Head, dtype: torch.dtype, batch_size: int | None, labels: Sequence[int] | Tensor | None
) -> HeadOutcome:
    """The samples of a batch: from the head, or from a stack of ReLU layers where the head mixes too many."""
    step = graph.steps[graph.output]
    given = checked_labels("invert", labels, head.n_classes, batch_size, head.weight.device)
    found = separate(head, batch_size, given).to(dtype)
    values, notes = {step.inputs[0]: found.inputs}, [found.reason] if found.reason else []
    loss = head.loss
    plain = loss.label_smoothing == 0 and loss.class_weights is None and head.scale == 1 and not head.noisy
    stack = _relu_stack(graph) if plain and not found.complete else None
    if stack is not None:
        peeled = peel_relu_batch(
            stack.layers, stack.gradients,
            batch_size=batch_size, reduction=head.loss.reduction, time_limit=head.budget.left,
        )  # fmt: skip
        if len(peeled.inputs) > int(found.multiplicities.sum()):
            found, values = peeled, _stack_values(graph, stack, peeled)
            notes = [f"the batch was taken apart in {stack.steps[1].label}, as the head alone mixes too many samples"]
            notes += [peeled.reason] if peeled.reason else []
    size = batch_size or (found.batch_size if found.complete else None)
    if found.complete:
        counts: Tensor | None = torch.bincount(
            found.labels.repeat_interleave(found.multiplicities), minlength=head.n_classes
        )
    else:
        counts = None if size is None else label_counts(head, size)
    where = "" if found.complete else step.label
    if not len(found.inputs):
        return HeadOutcome((), size, counts, where, found.reason)
    if len(found.duplicates):
        notes.append(f"{len(found.duplicates)} sample(s) occur more than once and cannot be told apart")
    return HeadOutcome((_candidate(values, found, notes),), size, counts, where, found.reason)


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


def _stack_values(graph: Graph, stack: _ReluStack, peeled: HeadSeparation) -> dict[str, Tensor]:
    """Every tensor of the stack at the peeled samples, by a forward run."""
    values = {stack.steps[0].name: peeled.inputs}
    with torch.no_grad():
        for before, step in pairwise(stack.steps):
            values[step.name] = step.forward(values[before.name])
    del values[graph.output]
    return values

"""From the last layer's gradient to the gradient of each sample's logits, for every loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rconv_fast.errors import RconvError, UnsupportedModelError
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
    separation = separate_softmax_batch(
        grad_weight, rule.grad_bias, weight, rule.bias, batch_size=batch_size, labels=labels
    )
    if not len(separation.inputs):
        raise RconvError(f"invert: no sample could be separated at {step.label!r} ({separation.reason})")
    repeated = torch.repeat_interleave(torch.arange(len(separation.labels)), separation.multiplicities.cpu())
    share = separation.multiplicities.to(separation.grad_logits)[:, None]
    index = repeated.to(separation.inputs.device)
    return [
        HeadCandidate(
            (separation.grad_logits / share)[index],
            separation.labels[index],
            separation.inputs[index],
            separation.residuals[index],
            separation.complete,
            [separation.reason] if separation.reason else [],
        )
    ]

"""A loss: its value, its targets and what its mean is over. The only place where loss names are dispatched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.errors import require, require_number, require_type

NAMES = ("cross_entropy", "nll", "binary_cross_entropy_with_logits", "binary_cross_entropy", "mse")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Loss:
    """One loss as the client computed it.

    Attributes
    ----------
    name : {"cross_entropy", "nll", "binary_cross_entropy_with_logits", "binary_cross_entropy", "mse"}
        torch's name of it.
    reduction : {"mean", "sum"}
        Over the batch.
    label_smoothing : float
        As in ``torch.nn.functional.cross_entropy``.
    class_weights : Tensor or None
        One weight a class (n,); with "mean" torch divides by the sum of the weights of the labels.
    """

    name: str = "cross_entropy"
    reduction: str = "mean"
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for argument, word in (("loss", self.name), ("reduction", self.reduction)):
            require_type(isinstance(word, str), "invert", argument, "be a str", type(word).__name__)
        require(self.name in NAMES, "invert", "loss", f"be one of {', '.join(NAMES)}", repr(self.name))
        require(
            self.reduction in REDUCTIONS, "invert", "reduction", f"be one of {', '.join(REDUCTIONS)}", self.reduction
        )
        require_number("invert", "label_smoothing", self.label_smoothing)
        require(0 <= self.label_smoothing < 1, "invert", "label_smoothing", "be in [0, 1)", self.label_smoothing)

        if self.class_weights is not None:
            dtype = torch.as_tensor(self.class_weights).dtype
            require_type(not dtype.is_complex, "invert", "class_weights", "be real", dtype)

    @property
    def takes_labels(self) -> bool:
        """Whether targets are class numbers (else: values shaped as the outputs)."""
        return self.name in ("cross_entropy", "nll")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; `outputs` are what the model returns."""
        return self._function(outputs, self.as_targets(outputs, targets))

    def as_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the dtype and shape that torch's function takes."""
        return targets if self.takes_labels else targets.to(outputs).reshape(outputs.shape)

    def class_targets(self, labels: Tensor, n_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What samples with these labels are pulled to: a distribution t (m, n), and the weight v (m,) of the pull.

        One sample's loss has the gradient ``v (softmax - t)`` by its logits: with class weights w and smoothing e,
        ``v t = (1 - e) w_y e_y + (e / n) w`` and v is the sum of that.
        """
        w = self._weights(n_classes, dtype, labels.device)
        smoothing = self.label_smoothing if self.name == "cross_entropy" else 0.0
        pull = (smoothing / n_classes * w).repeat(len(labels), 1)
        pull.scatter_add_(1, labels[:, None], ((1 - smoothing) * w[labels])[:, None])
        v = pull.sum(1)
        return pull / v[:, None], v

    def total_weight(self, labels: Tensor, n_classes: int) -> float:
        """What the sum over a batch with these labels is divided by."""
        if self.reduction == "sum":
            return 1.0
        return float(self._weights(n_classes, torch.float64, labels.device)[labels].sum())

    def _weights(self, n_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.class_weights is None:
            return torch.ones(n_classes, dtype=dtype, device=device)
        weights = torch.as_tensor(self.class_weights).to(device=device, dtype=dtype).reshape(-1)
        fits = len(weights) == n_classes and bool(((weights > 0) & weights.isfinite()).all())
        require(fits, "invert", "class_weights", f"be {n_classes} positive numbers", weights.tolist())
        return weights

    @property
    def _function(self) -> Callable[[Tensor, Tensor], Tensor]:
        weights = self.class_weights
        match self.name:
            case "cross_entropy":
                return lambda o, t: F.cross_entropy(
                    o, t, _like(weights, o), reduction=self.reduction, label_smoothing=self.label_smoothing
                )
            case "nll":
                return lambda o, t: _nll(o, t, _like(weights, o), self.reduction)
            case "binary_cross_entropy_with_logits":
                return lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction=self.reduction)
            case "binary_cross_entropy":
                return lambda o, t: F.binary_cross_entropy(o, t, reduction=self.reduction)
            case _:
                return lambda o, t: F.mse_loss(o, t, reduction=self.reduction)


class Linear(Loss):
    """``<delta, outputs>`` with delta in the place of targets: what a loss is to the layers once delta is known."""

    @property
    def takes_labels(self) -> bool:
        """It takes delta."""
        return False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The inner product."""
        return (outputs * targets.to(outputs)).sum()


def _nll(outputs: Tensor, targets: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """``nll_loss``, which takes distributions as targets as well, as ``cross_entropy`` does."""
    if not targets.is_floating_point():
        return F.nll_loss(outputs, targets, weights, reduction=reduction)
    value = -(targets * outputs if weights is None else weights * targets * outputs).sum()
    return value / len(outputs) if reduction == "mean" else value


def _like(weights: Tensor | None, outputs: Tensor) -> Tensor | None:
    return None if weights is None else torch.as_tensor(weights).to(outputs)


def logits_in(outputs: Any) -> Any:
    """The one tensor a loss is taken of in what a model returns.

    A tensor is itself; of a mapping it is the entry ``logits``, else the first; of a tuple or list the first. Works on
    anything that stands for a tensor as well.
    """
    if isinstance(outputs, Mapping):
        return logits_in(outputs["logits"] if "logits" in outputs else next(iter(outputs.values()), None))
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return logits_in(outputs[0]) if len(outputs) else None
    return getattr(outputs, "logits", outputs)

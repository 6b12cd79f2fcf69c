"""One sample behind a layer with a bias: ``delta = db`` and ``x = dW^T db / |db|^2``, whatever the loss.

The softmax then gives the label, and the scale where it is open: ``db = s v (softmax(W x + c) - t_y)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.multiplicity import doubt_of_scale
from rconv_fast.heads.noisy_single import LABELS
from rconv_fast.heads.problem import SAFETY
from rconv_fast.heads.separation import NOTHING_LEFT, HeadSeparation

# Soft targets are told from nonsense up to this.
_SIMPLEX = 1e-3


@dataclass(frozen=True)
class _Reading:
    """One label for the sample, with the factor s v of ``softmax - t_y`` that fits best."""

    label: Tensor
    factor: float
    gap: Tensor
    excess: float

    @property
    def fits(self) -> bool:
        return self.excess <= SAFETY


def single_sample(head: Head, expected: int | None, given: Tensor | None) -> HeadSeparation | None:
    """The only sample of a gradient of rank 1; None if the rank is higher or there is no bias gradient.

    Parameters
    ----------
    head : Head
        A softmax head.
    expected : int, optional
        The batch's size: more than 1 means that the sample is repeated.
    given : Tensor, optional
        Labels.

    Returns
    -------
    HeadSeparation or None
        Not ``complete`` where no label fits; then ``labels`` is the soft target (1, n) if there is one, and `reason`
        names the cause. Features and ``grad_logits`` do not depend on that.
    """
    if head.grad_bias is None:
        return None
    delta = head.grad_bias
    square = delta @ delta
    x = head.grad_weight.mT @ delta / square
    mixed = float((head.grad_weight - torch.outer(delta, x)).norm() / head.grad_weight.norm())
    if not mixed <= SAFETY * head.rounding:  # also NaN, of a zero bias gradient
        return None
    times = expected or 1
    logits = head.logits(x)
    labels = delta.topk(min(LABELS, len(delta)), largest=False).indices
    softmax = torch.softmax(logits, 0)
    readings = [_read(head, delta, logits, softmax, label, times, head.scale) for label in labels]
    best = min(readings, key=lambda r: r.excess)
    one = torch.full((1,), times, dtype=torch.int64, device=x.device)
    share = times * _pull(head, best.label) * float(head.share_of_weight(x[None], best.label[None]))
    scale = best.factor * _total(head, best.label, times) / share
    agree = given is None or bool((given == best.label).all())
    certificate = (best.gap.norm() / delta.norm())[None]
    target, reason = best.label[None], doubt_of_scale(one, head.scale)
    if not best.fits:
        target, reason, scale = _without_label(head, delta, logits, softmax, best, times)
    elif not agree:
        reason = f"the gradient has the label {int(best.label)}, which the given ones are not"
    spare = head.n_classes - 1 - (head.scale is None)
    if spare <= 0 and expected != 1:
        reason = reason or NOTHING_LEFT
    return HeadSeparation(
        x[None], target, delta[None], certificate, times, one, not reason, mixed, 1, reason, spare=spare, scale=scale,
        seen=True,
    )  # fmt: skip


def _pull(head: Head, label: Tensor) -> float:
    return float(head.loss.class_targets(label[None], head.n_classes, torch.float64)[1])


def _total(head: Head, label: Tensor, times: int) -> float:
    return head.loss.total_weight(label.repeat(times), head.n_classes)


def _read(
    head: Head, delta: Tensor, logits: Tensor, softmax: Tensor, label: Tensor, times: int, scale: float | None
) -> _Reading:
    """Compare ``db`` with what this label would give, each entry in units of its rounding.

    The client's softmax is rounded relatively, ``eps (1 + |logits|) softmax_j``; its entry of the label, from which 1
    was subtracted, absolutely: that is all that is left of it where a sample is well classified.
    """
    target, v = head.loss.class_targets(label[None], head.n_classes, torch.float64)
    pull = softmax - target[0]
    if scale is None:
        factor = float(pull @ delta / (pull @ pull))
    else:
        factor = scale * times * float(v) / _total(head, label, times)
        factor *= float(softmax[label]) if head.of_probabilities else 1.0
    gap = delta - factor * pull
    rounded = softmax * (1 + logits.abs().max())
    rounded[label] += 1.0
    unit = head.rounding * (abs(factor) * rounded + delta.abs()) + _smallest(head.rounding)
    return _Reading(label, factor, gap, float((gap.abs() / unit).max()))


def _smallest(rounding: float) -> float:
    """The least positive value of the type of this relative spacing: what an underflow is off."""
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    held = next((t for t in types if torch.finfo(t).eps >= rounding), torch.bfloat16)
    return torch.finfo(held).tiny * torch.finfo(held).eps


def _without_label(
    head: Head, delta: Tensor, logits: Tensor, softmax: Tensor, best: _Reading, times: int
) -> tuple[Tensor, str, float]:
    """What else the sample's target can be, and the cause to name."""
    scale = 1.0 if head.scale is None else head.scale
    rescaled = _read(head, delta, logits, softmax, best.label, times, None)
    if head.scale is not None and rescaled.fits and rescaled.factor > 0:
        found = rescaled.factor / best.factor * scale
        reason = f"the gradient is {found / scale:.6g} times what this loss gives: pass scale=None"
        return best.label[None], reason, found
    target = softmax - delta / best.factor
    rest = torch.cat([target[: int(best.label)], target[int(best.label) + 1 :]])
    if head.loss.class_weights is None and bool((target >= -_SIMPLEX).all()):
        level = float(rest.mean())
        if level > _SIMPLEX / len(target) and bool((rest - level).abs().max() <= _SIMPLEX * level):
            smoothing = level * len(target)
            return target[None], f"the target is a smoothed label: pass label_smoothing={smoothing:.4g}", scale
        return target[None], "the target is no single class: soft labels, mixup, or another loss", scale
    return best.label[None], "no label explains the bias gradient: another loss, class weights or a stale model", scale

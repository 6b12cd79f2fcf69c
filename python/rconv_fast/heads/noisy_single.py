"""One sample of a gradient of rank 1 above its noise: the label, and without a bias the size of delta, of least chi^2.

The leading singular vectors of ``[dW, kappa db]`` are ``delta`` and ``(x, kappa)`` up to a factor. The bias tells the
factor; without one, ``delta = a u`` and ``x = s v / a`` for an a > 0 at which the softmax gives delta back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rconv_fast.heads.head import Head
from rconv_fast.heads.multiplicity import doubt_of_scale
from rconv_fast.heads.refine import Refined, complete_limit, refine
from rconv_fast.heads.roots import HeadFactors
from rconv_fast.heads.separation import NOTHING_LEFT, HeadSeparation

# Labels looked at: at a label the softmax's gradient is the most negative, but for smoothing.
LABELS = 3
# A reading this much better in chi^2 than the next is certain: five standard deviations.
_CHI2_MARGIN = 25.0
# Sizes of the logits between which a is looked for, in steps of two per cent, and the best places that are refined.
_LOGITS, _PLACES, _BEST = (1e-3, 1e3), 700, 6
# Relative difference up to which two refined features are one reading.
_SAME = 1e-2


@dataclass(frozen=True)
class _Start:
    """A label, features (1, d) and ``dL/dlogits`` (n,) to start from, and the factor of the gradients there."""

    label: Tensor
    x: Tensor
    delta: Tensor
    scale: float


def noisy_single_sample(
    head: Head, factors: HeadFactors, expected: int | None, given: Tensor | None, note: str = ""
) -> HeadSeparation | None:
    """The sample that fits best, by Gauss-Newton on x for each of the likeliest labels.

    None where nothing is said of noise, at another rank, or where no start is found.

    Parameters
    ----------
    head, factors : Head, HeadFactors
        The layer and its gradient's factors, truncated to its numerical rank.
    expected : int, optional
        The batch's size: more than 1 means that the sample is repeated.
    given : Tensor, optional
        Labels.
    note : str
        What else keeps the reading from being complete.
    """
    if head.sigma_weight is None or factors.rank != 1:
        return None
    times = expected or 1
    starts = _without_bias(head, factors, times) if factors.kappa is None else _with_bias(head, factors, times)
    if not starts:
        return None
    fits = sorted(((start, _refined(head, start, times)) for start in starts), key=lambda fit: fit[1].chi2)
    start, best = fits[0]
    one = torch.full((1,), times, dtype=torch.int64, device=start.x.device)
    spare = head.n_classes - 1 - (head.scale is None) - (factors.kappa is None)
    reason = note or doubt_of_scale(one, head.scale)
    rival = next(
        (s for s, fit in fits[1:] if fit.chi2 - best.chi2 < _CHI2_MARGIN and _differ(start, best, s, fit)), None
    )
    if not best.fits:  # the features do not depend on the label
        reason = f"no label explains the gradient of the logits: {best.misfit}"
        best = replace(best, x=start.x, delta=start.delta[None], errors=None)
    elif rival is not None:
        two = "two sizes of the features" if rival.label == start.label else "two labels"
        reason = reason or f"{two} fit about as well (labels {int(start.label)} and {int(rival.label)})"
    elif spare <= 0 and expected != 1:
        reason = reason or NOTHING_LEFT
    if best.errors is not None and float(best.errors.max()) > complete_limit(head):
        reason = reason or f"the noise leaves a relative error of {float(best.errors.max()):.0e} in the features"
    if given is not None and bool((given != start.label).any()):
        reason = f"the gradient has the label {int(start.label)}, which the given ones are not"
    mismatch = head.mismatch(best.x, best.delta)
    return HeadSeparation(
        best.x, start.label[None], best.delta, best.x.new_full((1,), mismatch), times, one, not reason, mismatch, 1,
        reason, spare=spare, scale=start.scale * best.factor, errors=best.errors,
    )  # fmt: skip


def _refined(head: Head, start: _Start, times: int) -> Refined:
    assert head.sigma_weight is not None
    target, weight = _target(head, start.label, start.x, times)
    return refine(head, (head.sigma_weight, head.sigma_bias), start.x, target, weight * start.scale)


def _target(head: Head, label: Tensor, x: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """The label's target (1, n), and the weight of ``softmax - target`` for each row of x at a scale of 1."""
    target, v = head.loss.class_targets(label[None], head.n_classes, torch.float64)
    total = head.loss.total_weight(label.repeat(times), head.n_classes)
    return target, v * head.share_of_weight(x, label.expand(len(x))) * times / total


def _differ(start: _Start, best: Refined, other: _Start, fit: Refined) -> bool:
    return bool(other.label != start.label) or float((fit.x - best.x).norm()) > _SAME * float(best.x.norm())


def _with_bias(head: Head, factors: HeadFactors, times: int) -> list[_Start]:
    """One x, and the labels of the most negative entries of delta."""
    assert factors.kappa is not None
    x = factors.vh[:, :-1] * (factors.kappa / factors.vh[:, -1:])
    delta = factors.u[:, 0] * factors.s * factors.vh[:, -1] / factors.kappa
    starts = []
    for label in delta.topk(min(LABELS, len(delta)), largest=False).indices:
        target, weight = _target(head, label, x, times)
        pull = torch.softmax(head.logits(x), 1) - target
        scale = float(pull @ delta / (pull.square().sum() * weight)) if head.scale is None else head.scale
        starts.append(_Start(label, x, delta, scale))
    return starts


def _without_bias(head: Head, factors: HeadFactors, times: int) -> list[_Start]:
    """The places where ``|w (softmax(W x + c) - t_y) - delta| |x|``, the misfit of dW, has its least minima along a."""
    s, v = factors.s[0], factors.vh[0]
    first, last = (math.log10(size) for size in _LOGITS)
    sizes = torch.logspace(first, last, _PLACES, dtype=s.dtype, device=s.device)
    a = s * (head.weight @ v).norm() / sizes
    found: list[tuple[float, _Start]] = []
    for sign in (1.0, -1.0):
        u = sign * factors.u[:, 0]
        x = sign * s * v / a[:, None]
        softmax = torch.softmax(head.logits(x), 1)
        for label in u.topk(min(LABELS, len(u)), largest=False).indices:
            target, weight = _target(head, label, x, times)
            pull = softmax - target
            fitted = a * (pull @ u) / pull.square().sum(1)  # the weight that fits best, where the scale is open
            w = fitted if head.scale is None else weight * head.scale
            misfit = (w[:, None] * pull - a[:, None] * u).norm(dim=1) / a
            around = torch.nn.functional.pad(misfit, (1, 1), value=float("inf"))
            least = (misfit <= around[:-2]) & (misfit < around[2:]) & (w > 0)
            for place in least.nonzero()[:, 0].tolist():
                start = _Start(label, x[place][None], a[place] * u, float(w[place] / weight[place]))
                found.append((float(misfit[place]), start))
    return [start for _, start in sorted(found, key=lambda one: one[0])[:_BEST]]

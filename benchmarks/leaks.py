"""What leaks: a client's gradients of a batch, our attack on them, and how near it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rconv_fast
from bench import Outcome, Target
from rconv_fast.losses import Loss
from rconv_fast.walk.report import LayerReport

# A batch counts as recovered in a rate where every sample is this near, whether or not it is proven.
SUCCESS_PSNR = 60.0


@dataclass
class Leak:
    """What an attacker holds (model, gradients, loss), and what to compare with (inputs, labels)."""

    model: nn.Module
    gradients: dict[str, Tensor]
    x: Tensor
    labels: Tensor
    loss: str = "cross_entropy"


def leak(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    target: Target,
    loss: str = "cross_entropy",
    arithmetic: torch.dtype = torch.float64,
) -> Leak:
    """The gradients of one batch: computed in `arithmetic`, shared in the precision of the target, on its device."""
    model, x, labels = model.to(target.device, arithmetic), x.to(target.device, arithmetic), labels.to(target.device)
    names, values = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(Loss(loss)(model(x), labels), values)
    shared = {name: g.to(target.dtype) for name, g in zip(names, found, strict=True)}
    return Leak(model, shared, x, labels, loss)


Answer = tuple[Leak, rconv_fast.Inversion]


def ours(given: Leak, **options: Any) -> Answer:
    return given, rconv_fast.invert(given.model, given.gradients, given.x.shape[1:], loss=given.loss, **options)


def beside(attack: Callable[..., rconv_fast.Inversion], **options: Any) -> Callable[[Leak], Answer]:
    """A baseline on the same leak, which is told how many samples there are."""

    def run(given: Leak) -> Answer:
        size = {"batch_size": len(given.x), "loss": given.loss}
        return given, attack(given.model, given.gradients, given.x.shape[1:], **size, **options)

    return run


def worst_psnr(answer: Answer) -> float:
    """Of the sample that came out worst; NaN where there is none, or another number of them."""
    given, found = answer
    if found.inputs is None or found.inputs.shape != given.x.shape or not bool(found.inputs.isfinite().all()):
        return float("nan")
    matched = given.x[rconv_fast.match_samples(found.inputs, given.x)].double()
    return min(rconv_fast.psnr(a.double(), b) for a, b in zip(found.inputs, matched, strict=True))


def rows_per_unknown(layer: LayerReport) -> float:
    return layer.rows / max(layer.unknowns, 1)


def facts(answer: Answer) -> dict[str, Any]:
    _, found = answer
    known = {name: getattr(found, name, None) for name in ("verdict", "stops_at", "reason")}
    tightest = min(found.layers, key=rows_per_unknown, default=None)
    rows = "-" if tightest is None else f"{tightest.name}: {tightest.rows} rows for {tightest.unknowns} unknowns"
    return {
        "worst psnr": worst_psnr(answer),
        "verified": found.verified,
        "gradient residual": found.gradient_residual,
        "tightest layer": rows,
        **{name: value for name, value in known.items() if value},
    }


def judge(answer: Answer) -> Outcome:
    """Success means near the truth; verified but far from it would be the worst of failures, and is named so."""
    _, found = answer
    quality = worst_psnr(answer)
    near = quality >= SUCCESS_PSNR
    rows = min(map(rows_per_unknown, found.layers), default=None)
    if found.verified and not near:
        return Outcome(False, quality, f"WRONG but verified ({quality:.0f} dB)", True, rows)
    why = getattr(found, "reason", "") or next(iter(found.notes), "")
    return Outcome(near, quality, "" if near else f"{quality:.0f} dB: {why}", found.verified, rows)

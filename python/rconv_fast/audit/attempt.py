"""The recovery run on the probe: what it says overrules every count."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import Tensor, nn

from rconv_fast.audit.probe import Probe
from rconv_fast.invert import invert
from rconv_fast.losses import Loss
from rconv_fast.metrics import match_samples, psnr

# Up to so many unknowns of all layers together the recovery takes about a second on one core.
CHEAP = 40_000
# Seconds after which an attempt says nothing.
TIME_LIMIT = 10.0
# A recovered probe is at least this near to the probe, or it is not one.
RECOVERED_PSNR = 60.0


@dataclass(frozen=True)
class Attempt:
    r"""What `invert` made of the probe's gradients.

    Attributes
    ----------
    verdict : str
        In the audit's words.
    reason, stops_at : str, str or None
    summary : str
        One line for the report.
    conclusive : bool
        False where the time ran out.
    psnr : float
        Of the recovered inputs against the probe, in dB; -inf without inputs.
    determined : Tensor or None
        Which values were proven, (B, \*input_shape).
    """

    verdict: str
    reason: str
    stops_at: str | None
    summary: str
    conclusive: bool = True
    psnr: float = -math.inf
    determined: Tensor | None = None


# The words of an inversion's verdict in an audit's.
_WORDS = {"exact": "exact", "approximate": "partial", "partial": "partial", "features": "features only"}


def attempt(model: nn.Module, probe: Probe, input_shape: tuple[int, ...], loss: Loss) -> Attempt:
    """Run `invert` on the probe's gradients, with what an attacker knows."""
    start = time.perf_counter()
    found = invert(
        model,
        probe.gradients(model, loss),
        input_shape,
        batch_size=len(probe.inputs),
        loss=loss.name,
        time_limit=TIME_LIMIT,
    )
    seconds = time.perf_counter() - start
    reached = nearness(found.inputs, probe.inputs)
    verdict = _WORDS.get(found.verdict, "none found")
    if verdict == "exact" and not reached >= RECOVERED_PSNR:
        verdict = "partial"
    if verdict == "partial" and found.determined is not None and not bool(found.determined.any()):
        verdict = "features only"
    summary = f"{found.verdict}, {reached:.0f} dB, {seconds:.1f} s"
    reason = found.reason or next(iter(found.notes), "") or f"invert on the probe: {summary}"
    conclusive = seconds < TIME_LIMIT or verdict == "exact"
    return Attempt(verdict, reason, found.stops_at, summary, conclusive, reached, found.determined)


def nearness(found: Tensor | None, true: Tensor) -> float:
    """PSNR of what was recovered, whichever sample is which."""
    if found is None or found.shape != true.shape:
        return -math.inf
    return psnr(found[match_samples(true.to(found), found)], true.to(found))

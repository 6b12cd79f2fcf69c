"""A verdict with its reason: by the counts alone, and corrected by what the recovery makes of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rconv_fast.audit.attempt import Attempt
from rconv_fast.audit.rank import LayerRank

# How much each verdict says: a run that finds less than the count allows refutes only "exact".
_RANKS = {"none found": 0, "features only": 1, "not covered": 1, "partial": 2, "exact": 3}
# With this share of the equations it needs a layer is nearly determined: that its input is not negative, or a smooth
# picture, makes up for a few that are missing.
ENOUGH = 0.9
# What x >= 0 behind a ReLU says cannot make up for more missing equations than this share of the unknowns.
_NONNEGATIVE = 0.75


@dataclass(frozen=True)
class Finding:
    """A verdict with its reason and the layer at which the recursion stops; `open`: whether a run may correct it."""

    verdict: str
    reason: str
    stops_at: str | None = None
    open: bool = True
    tried: str = ""
    notes: tuple[str, ...] = ()
    determined: Tensor | None = None

    def corrected(self, tried: Attempt) -> Finding:
        """What the recovery itself says is right, where it came to an end."""
        if not tried.conclusive:
            note = f"invert did not end within its time on the probe ({tried.summary}); the verdict is the count's"
            return replace(self, tried=tried.summary, notes=(note,))
        fixed = tried.determined
        less = self.verdict != "exact" and _RANKS[tried.verdict] <= _RANKS[self.verdict]
        if less or tried.verdict == self.verdict:
            return replace(self, tried=tried.summary, determined=fixed)
        counted = f"by its count of equations the verdict is {self.verdict!r}; invert on the probe decides"
        return Finding(tried.verdict, tried.reason, tried.stops_at, False, tried.summary, (counted,), fixed)

    def seconded(self, tried: Attempt) -> Finding:
        """A second probe: where one of two was recovered, that is what there is to say."""
        both = {self.verdict, tried.verdict}
        if not tried.conclusive or "exact" not in both or len(both) == 1:
            return self
        reason = "one made-up batch was recovered whole and another was not: it depends on the batch"
        return replace(self, verdict="partial", reason=reason, stops_at=self.stops_at or tried.stops_at)


def judge(layers: Sequence[LayerRank]) -> Finding:
    """The verdict by the counts alone: the first layer from behind at which the recursion stops."""
    for layer in reversed(layers):
        if not layer.stops:
            continue
        reason, counted = f"{layer.name}: {layer.reason}", layer.unknowns > 0
        if not layer.covered:
            return Finding("not covered", reason, layer.name)
        if layer is layers[-1] and counted:
            return Finding("partial" if layer.determined else "none found", reason, layer.name)
        if layer is layers[0] and counted:
            nearly = layer.rank_bound >= ENOUGH * (layer.unknowns - layer.unreached)
            return Finding("partial" if nearly else "features only", reason, layer.name)
        return Finding(
            "features only", reason, layer.name, not counted or layer.rank_bound > _NONNEGATIVE * layer.unknowns
        )
    return Finding("exact", "every layer has at least as many independent equations as unknowns")

"""Inputs that lie on a grid, as pictures of 8 bits do: snapped where the error bars allow it, and checked by a run.

A value ``x = (k q - mean) / std`` with an integer k is known exactly once its error bar is a small part of ``q / std``.
The client's own arithmetic, run on the snapped inputs, then gives the shared gradients back, bit for bit where it is
the same arithmetic; a single value off by one step does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rconv_fast.errors import require
from rconv_fast.estimate.joint import Estimate
from rconv_fast.observation import Observation

Statistic = float | Sequence[float]
Quantum = float | tuple[float, Statistic, Statistic]

# A value is snapped where so many standard deviations are at most half a step, and the nearest level is no further off.
DEVIATIONS = 5.0
# The run of a right answer differs from what was shared by the noise; this many times its size is more than chance.
RATIO = 1.1
# Steps by which rounding puts a value beside its level.
SLACK = 1e-4


@dataclass(frozen=True)
class Grid:
    """``x = (k step - mean) / std``, mean and std a channel."""

    step: float
    mean: Tensor
    std: Tensor

    @classmethod
    def create(cls, quantum: Quantum, shape: torch.Size) -> Grid:
        """From what `invert` takes, for inputs of shape (B, C, ...)."""
        parts = quantum if isinstance(quantum, tuple) else (quantum, 0.0, 1.0)
        require(len(parts) == 3, "invert", "quantum", "be a step or (step, mean, std)", quantum)
        step = parts[0]
        mean, std = (torch.as_tensor(p, dtype=torch.float64).reshape(-1) for p in parts[1:])
        channels = shape[1] if len(shape) > 1 else 1
        for t in (mean, std):
            require(len(t) in (1, channels), "invert", "quantum", f"hold 1 or {channels} values a channel", len(t))
        require(step > 0 and bool((std > 0).all()), "invert", "quantum", "have a positive step and std", quantum)
        axes = (1, -1) + (1,) * (len(shape) - 2)
        return cls(float(step), mean.reshape(axes), std.reshape(axes))

    def levels(self, x: Tensor) -> Tensor:
        """The nearest k."""
        mean, std = self.mean.to(x), self.std.to(x)
        return ((x * std + mean) / self.step).round()

    def values(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """X of k in the arithmetic of `dtype`, in the order that loaders of pictures have: divide, subtract, divide."""
        whole = round(1 / self.step)
        k = levels.to(dtype)
        level = k / whole if abs(whole * self.step - 1) < 1e-9 else k * self.step
        return (level - self.mean.to(level)) / self.std.to(level)


def snapped(
    grid: Grid,
    estimate: Estimate,
    observation: Observation,
    shared: Mapping[str, Tensor],
    client: nn.Module,
    targets: Tensor,
) -> Estimate:
    """The estimate on its grid, if the error bars single out a level for every value and a run confirms them.

    Parameters
    ----------
    grid : Grid
        Where inputs may lie.
    estimate : Estimate
        Inputs and error bars.
    observation : Observation
        Noise and loss.
    shared : mapping of str to Tensor
        The gradients in the dtype they were shared in.
    client : nn.Module
        The model in the client's precision.
    targets : Tensor
        Labels or targets.

    Returns
    -------
    Estimate
        With inputs on the grid, no uncertainty, and a note; or as it was, with a note that says why.
    """
    levels = grid.levels(estimate.inputs)
    x = grid.values(levels, estimate.inputs.dtype)
    in_steps = grid.std.to(x) / grid.step
    deviation, off = estimate.uncertainty * in_steps, (estimate.inputs - x).abs() * in_steps
    wide = int((DEVIATIONS * deviation >= 0.5).sum())
    beside = int((off > DEVIATIONS * deviation + SLACK).sum())
    if wide or beside:
        why = f"{wide} error bars are too wide" if wide else f"{beside} values lie on no level"
        return replace(estimate, notes=[*estimate.notes, f"the inputs are not snapped to their grid: {why}"])
    there = next(p for p in client.parameters() if p.is_floating_point())
    at_scale = replace(observation, scale=estimate.scale)
    found = at_scale.gradients_at(client, grid.values(levels, there.dtype), targets)
    ratio, equal = _compare(found, observation, shared)
    if ratio > RATIO:
        note = f"the inputs are not snapped to their grid: a run there is off by {ratio:.3g} times the noise"
        return replace(estimate, notes=[*estimate.notes, note])
    how = f"{equal:.1%} of the gradients bit for bit" if equal > 0.5 else "the gradients to within their noise"
    note = f"every value is on its level of the grid; a run there gives {how}"
    return replace(estimate, inputs=x, uncertainty=torch.zeros_like(x), notes=[*estimate.notes, note])


def _compare(
    found: Mapping[str, Tensor], observation: Observation, shared: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Root mean square mismatch in units of the noise, and the share of entries that are equal bit for bit."""
    chi2, equal, entries = 0.0, 0, 0
    for name, seen in shared.items():
        alive = seen != 0
        miss = (found[name].double() - observation.gradients[name].double()) / observation.sigma(name)
        chi2 += float(miss[alive].square().sum())
        equal += int((found[name].to(seen.dtype) == seen)[alive].sum())
        entries += int(alive.sum())
    return math.sqrt(chi2 / max(entries, 1)), equal / max(entries, 1)

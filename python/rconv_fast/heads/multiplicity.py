"""How often each separated sample occurs, from the weights with which they stand in the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rconv_fast.losses import Loss

# Repetitions tried of the sample of the least weight.
_REPEATS = 8
# At most so many samples of a batch leave no trace in its gradient.
_SILENT = 64


@dataclass(frozen=True)
class Occurrences:
    """Repetitions of each sample, the batch's size and scale with them, and why that is not proven (or empty)."""

    times: Tensor
    batch_size: int
    scale: float
    doubt: str = ""


def count_occurrences(
    shares: Tensor, labels: Tensor, n_classes: int, loss: Loss, scale: float | None, batch_size: int | None,
    tolerance: float,
) -> Occurrences:  # fmt: skip
    """The fewest repetitions that explain the samples' weights.

    With ``total`` the batch's total weight, a sample of weight v that occurs t times has the share
    ``scale t / total`` of v in the gradient. Repetitions that no given batch size confirms are an assumption: clients
    or classes of unequal weight look alike.

    Parameters
    ----------
    shares : Tensor, shape (m,)
        Weight of each sample in the gradient over its weight in the loss.
    labels : Tensor, shape (m,), int64
        Their labels.
    n_classes : int
        Number of classes.
    loss : Loss
        What the total weight is.
    scale : float or None
        Factor of the gradients, if known.
    batch_size : int, optional
        If given.
    tolerance : float
        Relative accuracy of the shares.
    """
    m = len(shares)
    for times in _repetitions(shares, tolerance):
        size = int(times.sum())
        total = loss.total_weight(labels.repeat_interleave(times), n_classes)
        implied = float((shares / times).mean()) * total
        if batch_size is not None and size != batch_size:
            continue
        if scale is not None and abs(implied / scale - 1) > tolerance:
            continue
        doubt = ""
        if size > m and batch_size is None:
            doubt = f"read as {size} samples of which some are repeated, which batch_size={size} would confirm"
        doubt = doubt or doubt_of_scale(times, scale)
        return Occurrences(times, size, implied if scale is None else scale, doubt)
    once = torch.ones(m, dtype=torch.int64, device=shares.device)
    stated = 1.0 if scale is None else scale
    equal = bool((shares / shares.mean() - 1).abs().max() <= tolerance)
    if not equal:
        listed = ", ".join(f"{w:.4g}" for w in (shares / shares.sum()).tolist()[:8])
        doubt = f"the samples stand in the gradient with unequal weights ({listed}): class weights, or several clients"
        return Occurrences(once, batch_size or m, stated, doubt)
    implied = float(shares.mean()) * loss.total_weight(labels, n_classes)
    if abs(implied / stated - 1) <= tolerance:
        return Occurrences(once, m, stated, f"the gradient holds {m} samples, not {batch_size}")
    size = round(m * stated / implied)
    silent = loss.reduction == "mean" and loss.class_weights is None and m < size <= m + _SILENT
    if silent and abs(size * implied / (m * stated) - 1) <= tolerance and batch_size in (None, size):
        doubt = f"{size - m} of {size} samples leave no trace in the gradient"
        if batch_size is None:
            doubt += f", or it is {implied / stated:.6g} times what this loss gives for {m}: pass scale=None"
        return Occurrences(once, size, stated, doubt)
    doubt = f"the gradient is {implied / stated:.6g} times what this loss gives for {m} samples: pass scale=None"
    return Occurrences(once, m, implied, doubt)


def doubt_of_scale(times: Tensor, scale: float | None) -> str:
    """Why repetitions common to all samples are not proven at an unknown scale, which they are a factor of (or empty).

    As many other samples that leave no trace in the gradient would look alike.
    """
    if scale is not None or int(times.min()) == 1:
        return ""
    size, m = int(times.sum()), len(times)
    return f"read as {m} samples that are repeated, {size} in all; at an unknown scale the others may leave no trace"


def _repetitions(shares: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Whole multiples of the least share that fit all of them, fewest first."""
    for least in range(1, _REPEATS + 1):
        real = shares * (least / shares.min())
        whole = real.round()
        if bool(((real / whole - 1).abs() <= tolerance).all()):
            yield whole.long()

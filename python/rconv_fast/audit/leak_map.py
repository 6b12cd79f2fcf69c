"""Where in the input the gradients leak: predicted deviations as a picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Deviations from here (a quarter grey level of a picture with peak 1) to there (no more than the range) are told apart.
FINEST, COARSEST = 1e-3, 1.0
# Known exactly, in between, unknown; open values, of which nothing is known, are grey.
COLOURS = ((0.79, 0.10, 0.10), (0.98, 0.80, 0.35), (0.93, 0.95, 0.97))
OPEN = (0.45, 0.45, 0.45)
# A page's picture is at most this large, and small maps are enlarged to about it.
SIDE = 256


def leak_picture(leak: Tensor) -> NDArray[np.uint8] | None:
    """A map of deviations (C, H, W) as pixels (height, width, 3): red where a value is known, pale where it is not.

    Channels are joined by their root mean square; a place with an open channel is open. None for other shapes.
    """
    if leak.ndim != 3:
        return None
    deviation = leak.detach().double().cpu().square().mean(0).sqrt()
    share = (deviation.clamp(FINEST, COARSEST).log10() - np.log10(FINEST)) / np.log10(COARSEST / FINEST)
    low, middle, high = (torch.tensor(colour, dtype=torch.float64) for colour in COLOURS)
    t = share[..., None]
    colour = torch.where(t < 0.5, low + 2 * t * (middle - low), middle + (2 * t - 1) * (high - middle))
    colour[deviation.isinf()] = torch.tensor(OPEN, dtype=torch.float64)
    times = max(1, SIDE // max(deviation.shape))
    enlarged = colour.repeat_interleave(times, 0).repeat_interleave(times, 1)
    step = -(-max(enlarged.shape[:2]) // (2 * SIDE))
    pixels: NDArray[np.uint8] = (255 * enlarged[::step, ::step]).round().to(torch.uint8).numpy()
    return pixels


def describe(leak: Tensor) -> str:
    """Smallest, median and largest deviation, and how much is open."""
    known = leak[leak.isfinite()].double().flatten()
    share = 1 - known.numel() / max(leak.numel(), 1)
    if not known.numel():
        return "every value is open"
    low, median, high = known.min(), known.median(), known.max()
    deviations = f"standard deviation {low:.1e} to {high:.1e}, median {median:.1e}"
    return deviations + (f"; {share:.1%} of the values are open (grey)" if share else "")

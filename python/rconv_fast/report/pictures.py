"""Figures drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rconv_fast.errors import require
from rconv_fast.metrics import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_MAX_SAMPLES = 16  # rows of a figure; a larger batch is cut, which the title then says
_DPI = 110


def save_comparison(path: Path, originals: Tensor, recovered: Tensor) -> None:
    """Draw one row a sample: the original, the recovered, and the absolute error with its own colour scale.

    Parameters
    ----------
    path : Path
        Of the PNG file.
    originals, recovered : Tensor, shape (B, C, H, W)
        In the same order (see ``match_samples``), C being 1 or 3 and the values in [0, 1].
    """
    from matplotlib.figure import Figure

    shape = tuple(originals.shape)
    require(
        tuple(recovered.shape) == shape,
        "save_comparison",
        "recovered",
        f"have shape {shape}",
        recovered.shape,
    )
    n = min(shape[0], _MAX_SAMPLES)
    figure = Figure(figsize=(9.0, 3.1 * n), dpi=_DPI, layout="constrained")
    axes = figure.subplots(n, 3, squeeze=False)
    for i in range(n):
        original, found = originals[i].detach().cpu().double(), recovered[i].detach().cpu().double()
        error = (found - original).abs().amax(dim=0).numpy()
        _show(axes[i, 0], original, "original" if i == 0 else "")
        _show(axes[i, 1], found, f"recovered, PSNR {psnr(found, original):.0f} dB")
        # A constant colour scale needs some height, even for an error of exactly zero.
        image = axes[i, 2].imshow(error, cmap="magma", vmin=0, vmax=max(float(error.max()), 1e-300))
        axes[i, 2].set_title(f"absolute error, at most {error.max():.0e}", fontsize=10)
        axes[i, 2].set_axis_off()
        figure.colorbar(image, ax=axes[i, 2], shrink=0.8, format="%.1e").ax.tick_params(labelsize=7)
    if n < shape[0]:
        figure.suptitle(f"the first {n} of {shape[0]} samples", fontsize=10)
    figure.savefig(path)


def save_batch(path: Path, inputs: Tensor) -> None:
    """Draw the samples of a batch beside one another.

    Parameters
    ----------
    path : Path
        Of the PNG file.
    inputs : Tensor, shape (B, ...)
        Images ``(C, H, W)`` are drawn as such: in colour when C is 3, else their first channel; volumes by
        their middle slice; anything else as curves. Values outside [0, 1] are stretched, and the
        title says so.
    """
    from matplotlib.figure import Figure

    n = min(len(inputs), _MAX_SAMPLES)
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    for i in range(n):
        sample = inputs[i].detach().cpu().double()
        if sample.ndim == 4:
            sample = sample[:, sample.shape[1] // 2]
        if sample.ndim == 3:
            low, high = float(sample.min()), float(sample.max())
            inside = low >= -0.01 and high <= 1.01
            title = f"sample {i}" if inside else f"sample {i}: {low:.3g} to {high:.3g}, stretched"
            _show(axes[i], sample if inside else (sample - low) / max(high - low, 1e-300), title)
        else:
            axes[i].plot(np.atleast_2d(sample.numpy()).reshape(-1, sample.shape[-1]).T, linewidth=0.8)
            axes[i].set_title(f"sample {i}", fontsize=10)
    figure.savefig(path)


def _show(axis: Axes, sample: Tensor, title: str) -> None:
    """Draw one (C, H, W) image with hard pixel borders while it is small."""
    picture: NDArray[np.float64] = (sample if sample.shape[0] == 3 else sample[:1]).permute(1, 2, 0).numpy()
    smooth = "nearest" if min(picture.shape[:2]) <= 64 else "antialiased"
    axis.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation=smooth)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()

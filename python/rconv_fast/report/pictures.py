"""Recovered samples as pictures: pixels, and figures drawn with matplotlib's object interface (no window, no state)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rconv_fast.errors import optional, require
from rconv_fast.metrics import psnr
from rconv_fast.report.files import write_private
from rconv_fast.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rconv_fast.result import Inversion

MAX_SAMPLES = 16  # of a figure; a larger batch is cut, which the title then says
OPEN = (0.85, 0.0, 0.75)  # the colour over pixels that the gradients leave open
_DPI = 110


def is_image(sample: Tensor) -> bool:
    """Whether a sample of this shape is drawn as pixels: (C, H, W), or a volume, by its middle slice."""
    return sample.ndim in (3, 4)


def pixels(sample: Tensor, determined: Tensor | None = None) -> NDArray[np.uint8]:
    """One (C, H, W) image or (C, D, H, W) volume as (H, W, 3) pixels: in colour when C is 3, else its first channel.

    Values outside [0, 1] are stretched; pixels with an open value are half covered by `OPEN`.
    """
    image = _middle(sample.detach().cpu().double())
    image = (image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0)
    low, high = _range_of(sample)
    painted = ((image - low) / max(high - low, 1e-300)).clamp(0, 1).nan_to_num(0.5)
    if determined is not None:
        is_open = ~_middle(determined.detach().cpu()).all(dim=0)
        painted[is_open] = (painted[is_open] + torch.tensor(OPEN, dtype=torch.float64)) / 2
    return (255 * painted).round().to(torch.uint8).numpy()


def title(inversion: Inversion, i: int) -> str:
    """What stands over sample `i`: its label and status, its error, and whether its values were stretched."""
    assert inversion.inputs is not None
    parts = [f"sample {i}"]
    if i < len(inversion.samples):
        sample = inversion.samples[i]
        parts = [f"sample {i}, label {sample.label}: {sample.status}"]
        parts += [f"error {number(sample.error)}"] if sample.status == "approximate" else []
    low, high = _range_of(inversion.inputs[i])
    if (low, high) != (0.0, 1.0):
        parts.append(f"{low:.3g} to {high:.3g}, stretched")
    return "; ".join(parts)


def stamp(inversion: Inversion) -> str:
    """The verdict as it stands on every picture."""
    text = f"{inversion.verdict}, {'verified' if inversion.verified else 'NOT verified'}"
    share = 1.0 if inversion.determined is None else float(inversion.determined.double().mean())
    return text if share == 1 else f"{text}; {share:.1%} of the values determined, the rest in magenta"


def save_comparison(path: Path, originals: Tensor, recovered: Tensor, verdict: str = "") -> None:
    """Draw one row a sample: the original, the recovered, and the absolute error with its own colour scale.

    Parameters
    ----------
    path : Path
        Of the PNG file.
    originals, recovered : Tensor, shape (B, C, H, W)
        In the same order (see ``match_samples``), C being 1 or 3 and the values in [0, 1].
    verdict : str
        Stamped on the picture.
    """
    shape, other = tuple(originals.shape), tuple(recovered.shape)
    require(other == shape, "save_comparison", "recovered", f"have shape {shape}", other)
    n = min(shape[0], MAX_SAMPLES)
    figure = _figure(9.0, 3.1 * n)
    axes = figure.subplots(n, 3, squeeze=False)
    for i in range(n):
        original, found = originals[i].detach().cpu().double(), recovered[i].detach().cpu().double()
        error = (found - original).abs().amax(dim=0).numpy()
        _show(axes[i, 0], original.clamp(0, 1), "original" if i == 0 else "")
        _show(axes[i, 1], found.clamp(0, 1), f"recovered, PSNR {psnr(found, original):.0f} dB")
        # A constant colour scale needs some height, even for an error of exactly zero.
        image = axes[i, 2].imshow(error, cmap="magma", vmin=0, vmax=max(float(error.max()), 1e-300))
        axes[i, 2].set_title(f"absolute error, at most {error.max():.0e}", fontsize=10)
        axes[i, 2].set_axis_off()
        figure.colorbar(image, ax=axes[i, 2], shrink=0.8, format="%.1e").ax.tick_params(labelsize=7)
    _save(figure, path, verdict, n, shape[0])


def save_batch(path: Path, inversion: Inversion) -> None:
    """Draw the recovered samples beside one another, with the verdict on the picture.

    Parameters
    ----------
    path : Path
        Of the PNG file.
    inversion : Inversion
        With inputs (B, ...): images and volumes are drawn as `pixels` has them, anything else as curves.
    """
    assert inversion.inputs is not None
    size = len(inversion.inputs)
    n = min(size, MAX_SAMPLES)
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = _figure(max(3.0 * columns, 4.5), 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    for i in range(n):
        sample = inversion.inputs[i].detach().cpu().double()
        if is_image(sample):
            _show(
                axes[i], sample, title(inversion, i), None if inversion.determined is None else inversion.determined[i]
            )
        else:
            axes[i].plot(np.atleast_2d(sample.numpy()).reshape(-1, sample.shape[-1]).T, linewidth=0.8)
            axes[i].set_title(title(inversion, i), fontsize=8)
    _save(figure, path, stamp(inversion), n, size)


def _figure(width: float, height: float) -> Figure:
    figures = optional("matplotlib.figure", "report", "save_batch")
    figure: Figure = figures.Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure


def _save(figure: Figure, path: Path, verdict: str, shown: int, size: int) -> None:
    said = [verdict] if verdict else []
    said += [f"the first {shown} of {size} samples"] if shown < size else []
    if said:
        figure.suptitle("; ".join(said), fontsize=10, wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_private(path, buffer.getvalue())


def _show(axis: Axes, sample: Tensor, text: str, determined: Tensor | None = None) -> None:
    """Draw one image with hard pixel borders while it is small."""
    picture = pixels(sample, determined)
    axis.imshow(picture, interpolation="nearest" if min(picture.shape[:2]) <= 64 else "antialiased")
    axis.set_title(text, fontsize=10 if len(text) < 30 else 7)
    axis.set_axis_off()


def _middle(sample: Tensor) -> Tensor:
    return sample[:, sample.shape[1] // 2] if sample.ndim == 4 else sample


def _range_of(sample: Tensor) -> tuple[float, float]:
    """What is drawn as black and as white: 0 and 1 where the values lie there."""
    finite = sample[sample.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    return (0.0, 1.0) if low >= -0.01 and high <= 1.01 else (low, high)

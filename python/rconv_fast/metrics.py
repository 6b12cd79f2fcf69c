"""How close a recovered batch is to the original: for measuring, never needed by an attack."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.errors import require

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5  # skimage and the original SSIM code cut the Gaussian at 3.5 sigma: an 11x11 window


def mse(recovered: Tensor, original: Tensor) -> float:
    """Mean squared error over all values, in float64.

    Parameters
    ----------
    recovered, original : Tensor
        Of one shape.

    Examples
    --------
    >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    2.0
    """
    _check_pair("mse", recovered, original)
    return float((recovered.double() - original.to(recovered.device).double()).square().mean())


def psnr(recovered: Tensor, original: Tensor, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels, ``10 log10(peak^2 / mse)``; infinite for equal tensors.

    The R-CONV paper uses ``peak=255`` on images in [0, 1], which adds 48.1 dB.

    Parameters
    ----------
    recovered, original : Tensor
        Of one shape.
    peak : float
        The largest value a pixel can have.

    Examples
    --------
    >>> round(psnr(torch.zeros(4), torch.full((4,), 0.1)), 6)
    20.0
    """
    _check_pair("psnr", recovered, original)
    require(peak > 0, "psnr", "peak", "be > 0", peak)
    error = mse(recovered, original)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(recovered: Tensor, original: Tensor, *, peak: float = 1.0) -> float:
    """Mean structural similarity of Wang et al. (2004), over channels and samples.

    Equivalent to ``skimage.metrics.structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=peak)``: an 11x11 Gaussian window, the image continued by
    reflection for the window, and the outermost 5 pixels left out of the mean.

    Parameters
    ----------
    recovered, original : Tensor, shape (..., H, W)
        Images of at least 11x11 pixels.
    peak : float
        The largest value a pixel can have.
    """
    _check_pair("ssim", recovered, original)
    require(peak > 0, "ssim", "peak", "be > 0", peak)
    side = 2 * _SSIM_RADIUS + 1
    shape = tuple(recovered.shape)
    require(
        recovered.ndim >= 2 and min(shape[-2:]) >= side,
        "ssim",
        "recovered",
        f"be at least {side}x{side}",
        shape,
    )
    x = recovered.detach().double().reshape(-1, 1, *shape[-2:])
    y = original.detach().to(x.device).double().reshape(-1, 1, *shape[-2:])
    offsets = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=torch.float64, device=x.device)
    window = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    window /= window.sum()

    def blur(image: Tensor) -> Tensor:
        # The windows that leave the image are the ones left out of the mean, so no padding is needed at all.
        return F.conv2d(F.conv2d(image, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def exact_match(recovered: Tensor, original: Tensor, *, quantum: float = 1 / 255) -> float:
    """Share of the samples that are the original to the last grey level: every value within half a quantum of it.

    Parameters
    ----------
    recovered, original : Tensor, shape (B, ...)
        Of one shape, in the same order (see `match_samples`).
    quantum : float
        Step of the originals' grid: 1/255 for pictures of 8 bits with values in [0, 1].

    Examples
    --------
    >>> photos = torch.tensor([[0.0, 1.0], [0.2, 0.4]])
    >>> exact_match(photos + torch.tensor([[0.001], [0.003]]), photos)
    0.5
    """
    _check_pair("exact_match", recovered, original)
    require(recovered.ndim >= 2, "exact_match", "recovered", "have a batch and one more axis", tuple(recovered.shape))
    require(0 < quantum < math.inf, "exact_match", "quantum", "be positive and finite", quantum)
    difference = recovered.detach().double() - original.detach().to(recovered.device).double()
    return float((difference.abs().flatten(1) < quantum / 2).all(dim=1).double().mean())


def match_samples(recovered: Tensor, originals: Tensor) -> Tensor:
    """Find which original each recovered sample is: the assignment with the least total squared error.

    Parameters
    ----------
    recovered, originals : Tensor, shape (B, ...)
        Of one shape. A recovered batch comes in no particular order.

    Returns
    -------
    Tensor, shape (B,), int64
        ``originals[match_samples(recovered, originals)]`` stands in the order of `recovered`.

    Examples
    --------
    >>> photos = torch.arange(6.0).reshape(3, 2)
    >>> match_samples(photos[[2, 0, 1]], photos)
    tensor([2, 0, 1])
    """
    _check_pair("match_samples", recovered, originals)
    require(
        recovered.ndim >= 2,
        "match_samples",
        "recovered",
        "have a batch and one more axis",
        tuple(recovered.shape),
    )
    a = recovered.detach().double().flatten(1)
    b = originals.detach().to(a.device).double().flatten(1)
    # Differences rather than |a|^2 + |b|^2 - 2ab: near-duplicates must not drown in cancellation.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    require(bool(cost.isfinite().all()), "match_samples", "recovered", "be finite", "NaN or Inf")
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.int64, device=recovered.device)


def _check_pair(function: str, recovered: Tensor, original: Tensor) -> None:
    shape = tuple(original.shape)
    require(tuple(recovered.shape) == shape, function, "recovered", f"have shape {shape}", tuple(recovered.shape))
    require(recovered.numel() > 0, function, "recovered", "not be empty", tuple(recovered.shape))

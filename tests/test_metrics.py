"""MSE, PSNR, SSIM and the matching of a batch, against scikit-image and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from skimage import data, metrics

from rconv_fast.errors import ArgumentError
from rconv_fast.metrics import exact_match, match_samples, mse, psnr, ssim


def photos(n: int = 2, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1).double() / 255
    original = torch.stack([picture[:, 40 * i : 40 * i + 48, 100:164] for i in range(1, n + 1)])
    generator = torch.Generator().manual_seed(0)
    return original + noise * torch.randn(original.shape, generator=generator, dtype=torch.float64), original


def test_mse_and_psnr_match_scikit_image() -> None:
    recovered, original = photos()
    a, b = recovered.numpy(), original.numpy()
    assert mse(recovered, original) == pytest.approx(metrics.mean_squared_error(b, a), rel=1e-12)
    for peak in (1.0, 255.0):
        expected = metrics.peak_signal_noise_ratio(b, a, data_range=peak)
        assert psnr(recovered, original, peak=peak) == pytest.approx(expected, rel=1e-12)


def test_peak_of_255_adds_48_decibels() -> None:
    recovered, original = photos()
    assert psnr(recovered, original, peak=255) - psnr(recovered, original) == pytest.approx(48.13, abs=0.01)


def test_psnr_sees_errors_below_float32() -> None:
    original = torch.rand(8, dtype=torch.float64)
    assert psnr(original + 1e-12, original) == pytest.approx(240, abs=0.1)
    assert psnr(original, original) == math.inf


@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_ssim_matches_scikit_image(peak: float, noise: float) -> None:
    recovered, original = photos(noise=noise)
    expected = [
        metrics.structural_similarity(
            b.numpy() * peak,
            a.numpy() * peak,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=peak,
        )
        for a, b in zip(recovered, original, strict=True)
    ]
    value = ssim(recovered * peak, original * peak, peak=peak)
    assert value == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_match_samples_is_the_best_permutation() -> None:
    generator = torch.Generator().manual_seed(1)
    originals = torch.rand(5, 3, 4, generator=generator)
    order = torch.randperm(5, generator=generator)
    recovered = originals[order] + 0.4 * torch.randn(5, 3, 4, generator=generator)
    found = match_samples(recovered, originals)

    def cost(permutation: tuple[int, ...]) -> float:
        return float((recovered - originals[list(permutation)]).double().square().sum())

    assert found.dtype == torch.int64
    assert tuple(found.tolist()) == min(itertools.permutations(range(5)), key=cost)


def test_match_samples_beats_nearest_neighbours() -> None:
    """Each recovered sample is nearest to original 0; only one of them may have it."""
    originals = torch.tensor([[0.0], [10.0]])
    assert match_samples(torch.tensor([[1.0], [0.0]]), originals).tolist() == [1, 0]


def test_match_samples_tells_near_duplicates_apart() -> None:
    originals = torch.ones(3, 1000, dtype=torch.float64)
    originals[:, 0] += torch.tensor([0.0, 1e-7, 2e-7], dtype=torch.float64)
    assert match_samples(originals[[2, 0, 1]], originals).tolist() == [2, 0, 1]


@pytest.mark.parametrize("function", [mse, psnr, match_samples])
def test_shapes_must_agree(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        ArgumentError, match=rf"^{function.__name__}: recovered must have shape \(2, 3\), got \(2, 4\)$"
    ):
        function(torch.zeros(2, 4), torch.zeros(2, 3))


def test_an_exact_match_is_the_same_picture_of_8_bits() -> None:
    photos = torch.randint(256, (4, 3, 5, 5)) / 255
    off = torch.zeros(4, 1, 1, 1)
    off[1], off[2] = 0.49 / 255, 0.51 / 255
    found = photos + off
    found[3, 0, 0, 0] = float("nan")
    assert exact_match(found, photos) == 0.5
    assert [round(float(255 * p)) for p in found[1].flatten()] == (255 * photos[1]).round().int().flatten().tolist()
    assert exact_match(photos + 0.2, photos, quantum=0.5) == 1
    with pytest.raises(ArgumentError, match=r"^exact_match: quantum must be positive and finite, got 0$"):
        exact_match(photos, photos, quantum=0)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"^psnr: peak must be > 0, got 0$"):
        psnr(torch.zeros(2), torch.zeros(2), peak=0)
    with pytest.raises(ArgumentError, match=r"^ssim: recovered must be at least 11x11, got \(3, 10, 32\)$"):
        ssim(torch.zeros(3, 10, 32), torch.zeros(3, 10, 32))
    with pytest.raises(ArgumentError, match=r"^match_samples: recovered must be finite, got NaN or Inf$"):
        match_samples(torch.full((2, 2), math.nan), torch.zeros(2, 2))
    with pytest.raises(ArgumentError, match=r"^mse: recovered must not be empty, got \(0, 3\)$"):
        mse(torch.zeros(0, 3), torch.zeros(0, 3))

"""Heads whose gradient is noisy: right labels, errors as predicted, a fit that no wrong claim reaches, and an end."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from rconv_fast.heads import HeadSeparation, separate_softmax_batch
from rconv_fast.heads.head import Head
from rconv_fast.heads.softmax import separate
from rconv_fast.heads.spectrum import singular_triplets
from rconv_fast.losses import Loss
from softmax_batches import Batch, assert_nothing_wrong, errors, make_batch


def with_noise(batch: Batch, relative: float, seed: int = 0) -> tuple[Batch, tuple[Tensor, Tensor | None]]:
    """Normal noise, relative to the root mean square of each tensor, and its standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    noisy, sigmas = [], []
    for g in (batch.grad_weight, batch.grad_bias):
        sigma = None if g is None else relative * g.square().mean().sqrt()
        sigmas.append(sigma)
        noisy.append(None if g is None else g + sigma * torch.randn(g.shape, generator=generator, dtype=g.dtype))
    changed = Batch(batch.inputs, batch.labels, batch.weight, batch.bias, noisy[0], noisy[1])
    return changed, (sigmas[0], sigmas[1])


def rounded(batch: Batch, dtype: torch.dtype) -> tuple[Batch, tuple[Tensor, Tensor | None]]:
    """As `dtype` holds it, with half a unit in the last place over sqrt(3)."""
    values, sigmas = zip(*(in_type(g, dtype) for g in (batch.grad_weight, batch.grad_bias)), strict=True)
    return Batch(batch.inputs, batch.labels, batch.weight, batch.bias, *values), sigmas


def in_type(g: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if g is None:
        return None, None
    value, finfo = g.to(dtype).double(), torch.finfo(dtype)
    spacing = value.abs().clamp_min(finfo.tiny).log2().floor().exp2() * finfo.eps
    return value, spacing / 12**0.5


def assert_as_predicted(result: HeadSeparation, batch: Batch, factor: float = 1.6) -> None:
    assert result.complete, result.reason
    error, nearest = errors(result, batch)
    assert torch.equal(result.labels, batch.labels[nearest])
    assert sorted(nearest.tolist()) == list(range(len(batch.inputs)))
    assert bool((error <= factor * result.errors).all())
    assert bool((error >= result.errors / factor).all())


@pytest.mark.parametrize("relative", [1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 1), (10, 2), (100, 1), (100, 4)])
def test_errors_are_those_that_the_bound_predicts(n: int, batch_size: int, relative: float) -> None:
    batch, sigma = with_noise(make_batch(n, batch_size, seed=batch_size), relative)
    assert_as_predicted(separate(Head.create(*batch.head, Loss(), sigma=sigma), None, None), batch)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_noise_and_an_unknown_scale(bias: bool) -> None:
    batch, sigma = with_noise(make_batch(100, 3, seed=1, bias=bias), 1e-3)
    result = separate(Head.create(*batch.head, Loss(), sigma=sigma, scale=None), None, None)
    assert_as_predicted(result, batch, factor=2)
    assert result.scale == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "batch_size"), [(10, 1), (100, 3)])
def test_half_precision_gradients(n: int, batch_size: int, dtype: torch.dtype) -> None:
    batch, sigma = rounded(make_batch(n, batch_size, seed=3), dtype)
    assert_as_predicted(separate(Head.create(*batch.head, Loss(), sigma=sigma), None, None), batch, factor=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [4, 10, 100])
def test_half_precision_gradients_of_one_sample_without_a_bias(n: int, dtype: torch.dtype) -> None:
    """The size of delta is open, and found from what the softmax gives back."""
    complete = 0
    for seed in range(6):
        batch, sigma = rounded(make_batch(n, 1, seed=seed, bias=False), dtype)
        result = separate(Head.create(*batch.head, Loss(), sigma=sigma), None, None)
        assert_nothing_wrong(result, batch, tolerance=0.2)
        complete += result.complete
        if result.complete:
            assert_as_predicted(result, batch, factor=4)
    assert complete >= 4


def test_a_wrong_claim_does_not_fit() -> None:
    batch, sigma = with_noise(make_batch(10, 1, seed=1), 1e-3)
    for loss in (Loss(label_smoothing=0.1), Loss(reduction="sum")):
        assert separate(Head.create(*batch.head, loss, sigma=sigma), None, None).complete == (loss.reduction == "sum")
    wrong = (batch.labels + 1) % 10
    assert not separate(Head.create(*batch.head, Loss(), sigma=sigma), None, wrong).complete
    louder = (sigma[0] / 10, sigma[1] / 10)
    assert not separate(Head.create(*batch.head, Loss(), sigma=louder), None, None).complete
    twice = Batch(batch.inputs, batch.labels, batch.weight, batch.bias, 2 * batch.grad_weight, 2 * batch.grad_bias)
    assert not separate(Head.create(*twice.head, Loss(), sigma=sigma), None, None).complete


def test_one_logit_has_no_softmax() -> None:
    """Its softmax is 1 whatever the features are: no label explains a gradient, and no direction is seen."""
    batch, sigma = with_noise(make_batch(10, 1, seed=1), 1e-3)
    grads = batch.grad_weight[:1], batch.grad_bias[:1]
    one = Head.create(*grads, batch.weight[:1], batch.bias[:1], Loss(), sigma=sigma)
    assert not separate(one, None, None).complete


@pytest.mark.parametrize("batch_size", [1, 3])
def test_noise_that_nobody_stated_is_named_and_the_search_ends(batch_size: int) -> None:
    batch = make_batch(100, batch_size, seed=2)
    coarse = [g.mul(1e4 / float(g.abs().max())).round() * (float(g.abs().max()) / 1e4) for g in batch.head[:2]]
    start = time.process_time()
    result = separate_softmax_batch(*coarse, batch.weight, batch.bias)
    assert time.process_time() - start < 5
    assert not result.complete
    assert "noise" in result.reason
    error, nearest = errors(result, batch)
    assert float(error.max()) < 1e-2
    assert torch.equal(result.labels, batch.labels[nearest])


def test_a_search_ends_with_its_time() -> None:
    batch = make_batch(40, 24, seed=2)
    start = time.monotonic()
    result = separate_softmax_batch(*batch.head, time_limit=0.5)
    assert time.monotonic() - start < 10  # one step of the largest solve may be on its way
    assert result.complete or "time" in result.reason


def test_a_random_range_holds_the_triplets_of_a_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    matrix = low @ torch.randn(20, 400, generator=generator, dtype=torch.float64)
    u, s, vh = singular_triplets(matrix, 2.2e-16)
    assert len(s) < 300
    torch.testing.assert_close(s[:20], torch.linalg.svdvals(matrix)[:20], rtol=1e-12, atol=0)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-11)
    full = torch.randn(300, 400, generator=generator, dtype=torch.float64)
    assert len(singular_triplets(full, 2.2e-16)[1]) == 300

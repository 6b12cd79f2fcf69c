"""Differential privacy beside the leak: epsilon, reconstruction bound, predicted PSNR, and Opacus' own steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attacks import photo
from rconv_fast import invert, models, psnr
from rconv_fast.audit.privacy import DpSgd, epsilon, privacy_table, reconstruction_bound


def test_reconstruction_bound_is_the_power_of_the_best_test() -> None:
    # The likelihood-ratio test of N(0, 1) against N(1 / sigma, 1) at level `prior`, by simulation.
    sigma, prior = 0.8, 0.05
    generator = torch.Generator().manual_seed(0)
    threshold = torch.randn(400_000, generator=generator, dtype=torch.float64).quantile(1 - prior)
    power = float(
        (torch.randn(400_000, generator=generator, dtype=torch.float64) + 1 / sigma > threshold).double().mean()
    )
    assert reconstruction_bound(sigma, DpSgd(clip=1.0), prior) == pytest.approx(power, abs=5e-3)


def test_reconstruction_bound_falls_with_noise_and_grows_with_steps() -> None:
    bounds = [reconstruction_bound(sigma, DpSgd(clip=1.0), 0.01) for sigma in (0.5, 1.0, 4.0, 1e4)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(0.01, rel=1e-2)
    assert reconstruction_bound(1.0, DpSgd(clip=1.0, steps=4), 0.01) == pytest.approx(bounds[0])


def test_subsampling_lowers_the_bound_and_never_below_the_prior() -> None:
    pytest.importorskip("opacus")
    full = reconstruction_bound(1.0, DpSgd(clip=1.0, steps=10), 0.01)
    sampled = reconstruction_bound(1.0, DpSgd(clip=1.0, steps=10, sample_rate=0.01), 0.01)
    assert 0.01 <= sampled < full


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 16, 6))


def test_table_puts_epsilon_bound_and_prediction_side_by_side() -> None:
    pytest.importorskip("opacus")
    training = DpSgd(clip=1.0, batch_size=4, sample_rate=0.1, steps=20)
    weak, strong = privacy_table(small().double(), (1, 8, 8), [1.0, 10.0], training)
    assert weak.epsilon > strong.epsilon == pytest.approx(epsilon(10.0, training))
    assert weak.reconstruction >= strong.reconstruction
    assert weak.predicted_psnr is not None
    assert strong.predicted_psnr is not None
    assert weak.predicted_psnr - strong.predicted_psnr == pytest.approx(20, abs=0.1)


# It recommends its secure random numbers, which need another package.
@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook", "ignore::FutureWarning")
def test_a_private_step_is_recorded_with_and_without_its_noise() -> None:
    opacus = pytest.importorskip("opacus")
    from rconv_fast.integrations.opacus import StepRecorder

    model, x = small(), photo(8, 1, 1).float()
    reference = small()
    nn.functional.cross_entropy(reference(x), torch.tensor([2])).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None))

    loader = DataLoader(TensorDataset(x, torch.tensor([2])), batch_size=1)
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=0.5,
        max_grad_norm=norm / 2,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(0),
    )
    recorder = StepRecorder(optimizer, private)
    nn.functional.cross_entropy(private(x), torch.tensor([2])).backward()
    optimizer.step()
    assert recorder.shared is not None
    assert recorder.clean is not None
    for name, p in reference.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(recorder.clean[name], p.grad / 2, rtol=1e-3, atol=1e-6)
    difference = torch.cat([(recorder.shared[name] - recorder.clean[name]).flatten() for name in recorder.clean])
    assert recorder.shared.noise is not None
    sigma = recorder.shared.noise["3.weight"]
    assert sigma == pytest.approx(0.5 * norm / 2)
    assert float(difference.std()) == pytest.approx(float(sigma), rel=0.1)
    assert not recorder.shared.scale_known

    doubled = {name: 2 * g for name, g in recorder.clean.items()}
    found = invert(small(), doubled, (1, 8, 8))
    assert found.inputs is not None
    assert psnr(found.inputs, x.double()) > 50


@pytest.mark.filterwarnings("ignore:Full backward hook", "ignore::FutureWarning")
def test_the_model_inside_opacus_module_is_attacked() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model = models.cnn3("leaky_relu", n_classes=5, in_channels=3, image_size=8, dtype=torch.float64)
    x = photo(8)
    wrapped = grad_sample.GradSampleModule(model)
    nn.functional.cross_entropy(wrapped(x), torch.tensor([2])).backward()
    shared = {name: p.grad for name, p in wrapped.named_parameters()}
    assert all(name.startswith("_module.") for name in shared)
    found = invert(wrapped, shared, (3, 8, 8))
    assert found.verified
    assert found.inputs is not None
    assert float((found.inputs - x).abs().max()) < 1e-9

"""The joint estimate meets the Cramer-Rao bound, knows how sure it is, and does not fit what is wrong."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import photo
from rconv_fast import gradients_from_update, invert, psnr
from rconv_fast.estimate import Estimate, Grid, cramer_rao, estimate, noise_of, snapped
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from small_networks import grey


def observed(model: nn.Module, x: Tensor, y: Tensor, noise: float, scale: float = 1.0) -> Observation:
    """Gradients with Gaussian noise of this size, relative to each tensor's root mean square."""
    found = torch.autograd.grad(scale * F.cross_entropy(model(x), y), list(model.parameters()))
    named = {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}
    sigma = {name: noise * float(g.square().mean().sqrt()) for name, g in named.items()}
    return Observation({n: g + sigma[n] * torch.randn_like(g) for n, g in named.items()}, Loss(), sigma)


def near(x: Tensor, decibel: float) -> Tensor:
    return x + 10 ** (-decibel / 20) * torch.randn_like(x)


def solved(
    activation: type[nn.Module], noise: float, start: float = 30.0
) -> tuple[Estimate, Tensor, nn.Module, Observation]:
    model, x, y = grey(activation), photo(12, channels=1), torch.tensor([3])
    observation = observed(model, x, y, noise)
    return estimate(model, observation, near(x, start), y), x, model, observation


@pytest.mark.parametrize(("activation", "noise"), [(nn.ReLU, 1e-5), (nn.LeakyReLU, 1e-2), (nn.Tanh, 1e-3)])
def test_meets_the_bound_with_error_bars_and_the_law_of_chi_square(activation: type[nn.Module], noise: float) -> None:
    found, x, model, observation = solved(activation, noise)
    bound = cramer_rao(model, "cross_entropy", x, torch.tensor([3]), observation.noise)
    assert psnr(found.inputs, x) > bound.psnr - 1.5
    assert abs(found.z) < 4
    within = ((found.inputs - x).abs() < 2 * found.uncertainty).double().mean()
    assert 0.88 < float(within) < 0.99


def test_wrong_bits_of_the_start_are_put_right() -> None:
    found, x, model, observation = solved(nn.ReLU, 1e-4, start=22.0)
    assert abs(found.z) < 4
    assert (
        psnr(found.inputs, x) > cramer_rao(model, "cross_entropy", x, torch.tensor([3]), observation.noise).psnr - 1.5
    )


@pytest.mark.parametrize("seed", range(6))
def test_bits_are_put_right_from_a_start_far_off_in_units_of_the_noise(seed: int) -> None:
    torch.manual_seed(seed)
    found, x, model, observation = solved(nn.ReLU, 1e-6, start=14.0)
    bound = cramer_rao(model, "cross_entropy", x, torch.tensor([3]), observation.noise)
    assert abs(found.z) < 4
    assert psnr(found.inputs, x) > bound.psnr - 2.5


@pytest.mark.parametrize("wrong", ["label", "scale"])
def test_what_is_wrong_does_not_fit(wrong: str) -> None:
    model, x, y = grey(nn.Tanh), photo(12, channels=1), torch.tensor([3])
    observation = observed(model, x, y, 1e-2)
    if wrong == "label":
        y = torch.tensor([4])
    if wrong == "scale":
        observation = replace(observation, scale=2.0)
    assert estimate(model, observation, near(x, 30.0), y).z > 20


def test_unknown_scale_is_found() -> None:
    model, x, y = grey(nn.LeakyReLU), photo(12, channels=1), torch.tensor([3])
    observation = replace(observed(model, x, y, 1e-3, scale=0.05), scale=0.0501)
    found = estimate(model, observation, near(x, 30.0), y, free_scale=True)
    assert found.scale == pytest.approx(0.05, rel=1e-3)
    assert abs(found.z) < 4


@pytest.mark.parametrize("inputs", [1, 3])
def test_a_scale_that_the_gradients_do_not_tell_stays_finite(inputs: int) -> None:
    # As many gradients as unknowns: whatever the scale, some input explains them.
    model = nn.Linear(inputs, 1, bias=False).double()
    seen = {"weight": 1e3 * torch.randn(1, inputs, dtype=torch.float64)}
    observation = Observation(seen, Loss("mse"), {"weight": 1e3})
    x, target = torch.randn(1, inputs, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    found = estimate(model, observation, x, target, free_scale=True)
    assert math.isfinite(found.scale)
    assert found.inputs.isfinite().all()


def test_bits_are_put_right_at_an_unknown_scale() -> None:
    model, x, y = grey(nn.ReLU), photo(12, channels=1), torch.tensor([3])
    observation = replace(observed(model, x, y, 1e-4, scale=0.05), scale=0.0505)
    found = estimate(model, observation, near(x, 24.0), y, free_scale=True)
    assert found.scale == pytest.approx(0.05, rel=1e-3)
    assert abs(found.z) < 4


def test_batch_through_wrappers() -> None:
    model = nn.Sequential(grey(nn.ReLU), nn.LogSoftmax(1))
    x, y = photo(12, batch=2, channels=1), torch.tensor([3, 7])
    observation = replace(observed(model, x, y, 1e-4), loss=Loss("nll"))
    found = estimate(model, observation, near(x, 40.0), y)
    assert math.isfinite(found.z)
    assert psnr(found.inputs, x) > 40


def shared_by_client(kind: str, levels: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float32 client's gradients of an 8-bit picture, rounded to float16 or read from an update."""
    model, y = grey(nn.ReLU).float(), torch.tensor([3])
    loss = F.cross_entropy(model(levels.float() / 255), y)
    named = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    if kind == "float16":
        return model, {name: g.half() for name, g in named.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {name: p - 0.01 * named[name] for name, p in before.items()}
    return model, gradients_from_update(before, after, 0.01)


@pytest.mark.parametrize("kind", ["float16", "update"])
def test_picture_of_8_bits_comes_back_byte_for_byte(kind: str) -> None:
    levels = (photo(12, channels=1) * 255).round()
    model, shared = shared_by_client(kind, levels)
    found = invert(model, shared, (1, 12, 12), quantum=1 / 255)
    assert found.verified
    assert torch.equal((found.inputs * 255).round(), levels)
    assert float(found.uncertainty.max()) == 0
    assert (found.layers[-1].rank, found.layers[-1].proof) == (12 * 12, "cholesky")


def test_picture_off_the_grid_is_not_put_on_it() -> None:
    levels = (photo(12, channels=1) * 255).round()
    levels[0, 0, 3, 4] += 0.4
    model, shared = shared_by_client("float16", levels)
    found = invert(model, shared, (1, 12, 12), quantum=1 / 255)
    assert float(found.uncertainty.min()) > 0
    assert any("not snapped" in note for note in found.notes)


def test_one_level_off_in_one_value_is_refused() -> None:
    levels = (photo(12, channels=1) * 255).round()
    model, shared = shared_by_client("float16", levels)
    work = copy.deepcopy(model).double()
    sigma, _ = noise_of(shared)
    observation = Observation({n: g.double() for n, g in shared.items()}, Loss(), sigma)
    wrong = levels.double()
    wrong[0, 0, 5, 5] += 1
    answer = replace(estimate(work, observation, levels.double() / 255, torch.tensor([3])), inputs=wrong / 255)
    assert answer.uncertainty.max() < 1e-3
    found = snapped(Grid.create(1 / 255, levels.shape), answer, observation, shared, model, torch.tensor([3]))
    assert float(found.uncertainty.min()) > 0
    assert any("not snapped" in note for note in found.notes)


def test_time_limit_is_said() -> None:
    model, x, y = grey(nn.ReLU), photo(12, channels=1), torch.tensor([3])
    observation = observed(model, x, y, 1e-2)
    found = invert(model, observation.gradients, (1, 12, 12), noise=1e-2, time_limit=0.0)
    assert not found.verified
    assert "time" in found.reason


def test_batch_norm_at_rest_is_estimated_with_the_clients_arithmetic() -> None:
    """Runs of the client's model beside the answer leave the statistics of the graph alone that is differentiated."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24)
    model = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), norm, nn.LeakyReLU(), nn.Flatten(), nn.Linear(384, 10)).eval()
    norm.running_mean, norm.running_var = torch.randn(24) / 10, torch.rand(24) + 0.5
    x = photo(8, channels=1).float()
    value = F.cross_entropy(model(x), torch.tensor([1]))
    shared = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True)
    )
    result = invert(model, shared, x.shape[1:], noise=1e-4)
    assert result.verified
    assert result.uncertainty is not None
    assert float((result.inputs - x).abs().max()) < 6 * float(result.uncertainty.max())

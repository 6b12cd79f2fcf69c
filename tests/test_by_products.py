"""Without an information matrix: the same solves, error bars, bits and verdicts, by products alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks import photo
from rconv_fast import defenses, invert, psnr
from rconv_fast.estimate import answer, cramer_rao, noise_of
from rconv_fast.estimate.bits import Doubt
from rconv_fast.estimate.bounds import problem_of
from rconv_fast.estimate.by_products import estimate_by_products
from rconv_fast.estimate.fisher import dense_fisher
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.joint import first_bits, under
from rconv_fast.estimate.relaxed import settle
from rconv_fast.estimate.sampled import SampledInformation, rounded
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.wrappers import working_copy
from small_networks import grey

LABEL = torch.tensor([3])


def information_of(model: nn.Module, x: Tensor, free_scale: bool = False) -> tuple[SampledInformation, Tensor]:
    """By products, and the matrix."""
    problem, x = problem_of(model, "cross_entropy", x, LABEL, 1e-3)
    problem = problem.held(first_bits(problem, x, None))
    bits = {name: d.float() for name, d in first_bits(problem, x, None).items()}
    coarse = rounded(problem, working_copy(problem.model, torch.float32), x.shape, torch.float32).held(bits)
    ones = [torch.ones_like(part) for part in problem.residual(x)]
    return SampledInformation.create(problem, coarse, x, ones, free_scale), dense_fisher(problem, x)


def test_solves_and_errors_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    x = photo(12, channels=1)
    information, fisher = information_of(grey(nn.ReLU), x)
    right = torch.linalg.cholesky(fisher) @ torch.randn(144, dtype=torch.float64)
    exact = torch.linalg.solve(fisher, right)
    assert float((information.solve(right.reshape(x.shape)).flatten() - exact).norm() / exact.norm()) < 0.05
    errors, explained = information.draw(60, torch.Generator().manual_seed(0))
    variance = torch.linalg.inv(fisher).diagonal()
    assert float((errors.square().mean(0).flatten() / variance).mean()) == pytest.approx(1.0, abs=0.1)
    assert explained == pytest.approx(144, rel=0.05)
    assert not bool(information.open_values().any())


def test_one_open_direction_is_seen_though_every_value_moves_it_a_little() -> None:
    torch.manual_seed(0)
    model = grey(nn.ReLU)
    with torch.no_grad():  # filters of no mean, and of an output gradient of no sum: a constant is not seen
        model[0].weight -= model[0].weight.mean((1, 2, 3), keepdim=True)
    whole = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 24, 5, 2), *list(model)[1:]).double()
    with torch.no_grad():
        whole[1].weight.copy_(model[0].weight)
        model[-1].weight.zero_()
    information, _ = information_of(whole, photo(12, channels=1))
    assert bool(information.open_values().all())


def test_bits_turned_over_are_turned_back() -> None:
    torch.manual_seed(1)
    model, x = grey(nn.ReLU), photo(12, channels=1)
    problem, x = problem_of(model, "cross_entropy", x, LABEL, 1e-4)
    bits = first_bits(problem, x, None)
    inputs = torch.cat([z.flatten() for z in problem.kink_inputs(x).values()])
    places = inputs.abs().argsort()[:12]
    doubt = Doubt(places, torch.full((12,), 0.5, dtype=torch.float64))
    right = torch.cat([d.flatten() for d in bits.values()])[places]
    wrong = doubt.put(bits, torch.where(torch.arange(12) % 3 == 0, 1 - right, right))
    _, settled = settle(problem, x + 1e-4 * torch.randn_like(x), wrong, doubt)
    assert all(torch.equal(settled[name], bits[name]) for name in bits)


@pytest.mark.parametrize(("activation", "noise"), [(nn.ReLU, 1e-4), (nn.LeakyReLU, 1e-2), (nn.GELU, 1e-3)])
def test_meets_the_bound_with_error_bars_and_the_law_of_chi_square(
    activation: type[nn.Module], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "DENSE_UP_TO", 0)
    torch.manual_seed(0)
    model, x = grey(activation), photo(12, channels=1)
    seen = dict(zip(dict(model.named_parameters()), gradients_of(model, x), strict=True))
    shared = defenses.gaussian(seen, noise, relative=True, generator=torch.Generator().manual_seed(0))
    found = invert(model, shared, (1, 12, 12))
    sigma, _ = noise_of(shared)
    assert found.verified
    assert found.inputs is not None
    assert found.uncertainty is not None
    assert psnr(found.inputs, x) > cramer_rao(model, "cross_entropy", x, LABEL, sigma).psnr - 1.5
    assert 0.88 < float(((found.inputs - x).abs() < 2 * found.uncertainty).double().mean()) < 0.99


@pytest.mark.parametrize("unknown_scale", [False, True])
def test_weights_that_are_bounded_keep_the_law_of_chi_square(unknown_scale: bool) -> None:
    torch.manual_seed(0)
    model, x = grey(nn.ReLU), photo(12, channels=1)
    named = dict(zip(dict(model.named_parameters()), gradients_of(model, x), strict=True))
    size = {name: 1e-4 * float(g.square().mean().sqrt()) for name, g in named.items()}
    sigma = {name: size[name] * 10 ** (2 * torch.rand_like(g) - 2) for name, g in named.items()}
    scale = 0.7 if unknown_scale else 1.0
    noisy = {name: scale * g + sigma[name] * torch.randn_like(g) for name, g in named.items()}
    observation = Observation(noisy, Loss(), sigma)
    found = estimate_by_products(model, observation, x + 1e-3 * torch.randn_like(x), LABEL, free_scale=unknown_scale)
    problem = GradientMap.read(model, Loss(), LABEL, noisy, sigma, x.shape)
    assert any(bool((under(problem, 0.1).sigma[name] > s).any()) for name, s in sigma.items())
    assert abs(found.z) < 4
    assert 0.88 < float(((found.inputs - x).abs() < 2 * found.uncertainty).double().mean()) < 0.99
    assert found.scale == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("wrong", ["label", "scale"])
def test_what_is_wrong_does_not_fit(wrong: str) -> None:
    torch.manual_seed(0)
    model, x = grey(nn.Tanh), photo(12, channels=1)
    named = dict(zip(dict(model.named_parameters()), gradients_of(model, x), strict=True))
    sigma = {name: 1e-2 * g.square().mean().sqrt() for name, g in named.items()}
    factor, label = (0.5, LABEL) if wrong == "scale" else (1.0, torch.tensor([4]))
    noisy = {name: factor * g + sigma[name] * torch.randn_like(g) for name, g in named.items()}
    found = estimate_by_products(model, Observation(noisy, Loss(), sigma), x + 0.03 * torch.randn_like(x), label)
    assert found.z > 10


def gradients_of(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(nn.functional.cross_entropy(model(x), LABEL), list(model.parameters()))

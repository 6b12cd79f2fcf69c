"""Gradient matching: the Gauss-Newton step against a dense oracle, and what it must survive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.polish import gauss_newton_step, polish, size_of

LABELS = torch.tensor([3])


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    front = [nn.Conv2d(2, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Sigmoid()]
    return nn.Sequential(*front, *layers, nn.Flatten(), nn.Linear(16, 8)).double()


def gradients_at(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(model(x), LABELS), parameters), strict=True))


def problem_of(model: nn.Module, seen: dict[str, Tensor], targets: Tensor, loss: str = "cross_entropy") -> GradientMap:
    """With a noise of one unit in each gradient's root mean square: none counts more than another."""
    live = {name: g for name, g in seen.items() if bool(g.any())}
    sigma = {name: g.square().mean().sqrt() for name, g in live.items()}
    return GradientMap(model, Loss(loss), targets, live, sigma)


def test_a_step_is_the_least_squares_solution() -> None:
    model, x = network(), torch.rand(1, 2, 8, 8, dtype=torch.float64)
    near = x + 1e-3 * torch.randn_like(x)
    problem = problem_of(model, gradients_at(model, x), LABELS)
    at = near.clone().requires_grad_()
    flat = torch.cat([part.flatten() for part in problem.residual(at)])
    jacobian = torch.stack([torch.autograd.grad(row, at, retain_graph=True)[0].flatten() for row in flat])
    expected = torch.linalg.lstsq(jacobian, -flat.detach()[:, None], driver="gelsd").solution.view_as(x)
    step = gauss_newton_step(problem.at(near))
    left, best = (float((jacobian @ d.flatten() + flat.detach()).norm()) for d in (step, expected))
    assert left < best + 1e-3 * float(flat.detach().norm())


def test_an_answer_nearby_becomes_the_answer() -> None:
    model, x = network(), torch.rand(1, 2, 8, 8, dtype=torch.float64)
    model[-1].weight.data.mul_(3)
    near = x + 1e-4 * torch.randn_like(x)
    found = polish(problem_of(model, gradients_at(model, x), LABELS), near, 1e-12)
    assert float((found - x).abs().max()) < 1e-2 * float((near - x).abs().max())


@pytest.mark.parametrize("classes", [1, 3])
def test_dead_units_and_a_regression_loss(classes: int) -> None:
    """Units that pass nothing on: zeros that torch's forward mode stumbled over."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 6), nn.ReLU()).double()
    model.append(nn.Linear(6, classes).double())
    with torch.no_grad():
        model[3].bias[:3] = -100.0
    x, y = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1, classes, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), parameters)
    near = x + 1e-5 * torch.randn_like(x)

    def mismatch(at: Tensor) -> float:
        found = torch.autograd.grad(F.mse_loss(model(at), y), parameters)
        return sum(float((a - b).square().sum()) for a, b in zip(found, gradients, strict=True))

    found = polish(problem_of(model, dict(zip(names, gradients, strict=True)), y, "mse"), near, 1e-12)
    assert mismatch(found) < 1e-6 * mismatch(near)


class _OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("derivative of the derivative")
        return 2 * grad


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _OnlyOnce.apply(x)


def test_a_model_that_cannot_be_differentiated_again_is_left_as_it_is() -> None:
    model, x = network(Once()), torch.rand(1, 2, 8, 8, dtype=torch.float64)
    near = x + 1e-4 * torch.randn_like(x)
    assert torch.equal(polish(problem_of(model, gradients_at(model, x), LABELS), near, 1e-12), near)


def test_what_rounding_left_of_terms_that_cancel_has_no_weight() -> None:
    gradients = {"weight": torch.ones(4, dtype=torch.float64), "bias": torch.full((2,), 1e-16, dtype=torch.float64)}
    observation = Observation(gradients, Loss())
    assert float(observation.sigma("weight")) == pytest.approx(2.0**-53)
    assert 1e-16 < float(observation.sigma("bias")) < 1e-14
    smaller = Observation(gradients | {"bias": gradients["bias"] * 1e6}, Loss())
    assert float(smaller.sigma("bias")) == pytest.approx(2.0**-53 * 1e-10)


def in_training(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels, filters in ((3, 12), (12, 24)):
        layers += [nn.Conv2d(channels, filters, 3, 2, 1), nn.BatchNorm2d(filters), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 10)).double().train()
    return model, torch.rand(1, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("seed", [2, 3])
def test_wrong_sides_are_settled_where_units_of_rounding_differ_by_orders(seed: int) -> None:
    """A start at 50 dB with sides on the wrong side of their kinks, gradients known to 1e-7."""
    model, x = in_training(seed)
    seen = gradients_at(model, x)
    least = 1e-6 * max(float(g.square().mean().sqrt()) for g in seen.values())
    sigma = {name: 1e-7 * g.square().mean().sqrt().clamp_min(least) for name, g in seen.items()}
    problem = GradientMap.read(model, Loss(), LABELS, seen, sigma, x.shape)
    near = x + 3e-3 * torch.randn_like(x)
    wrong = [(a > 0) != (b > 0) for a, b in zip(*(problem.kink_inputs(v).values() for v in (x, near)), strict=True)]
    assert any(bool(part.any()) for part in wrong)
    found = polish(problem, near, 1.0)
    assert size_of(problem.residual(found)) <= 1.0

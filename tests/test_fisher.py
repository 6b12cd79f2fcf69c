"""The Fisher information and the Cramer-Rao bound, against the Jacobian that torch's forward mode gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rconv_fast.estimate import bounds, cramer_rao, fisher_matrix
from rconv_fast.losses import Loss


class Residual(nn.Module):
    """Two branches, batch norm in evaluation mode, groups, a pool: what the structure must add up rightly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, stride=1, padding=1, groups=2, bias=False)
        self.head = nn.Linear(6 * 9, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.first(x)))
        a = F.leaky_relu(a + self.second(a), 0.2)
        return self.head(F.avg_pool2d(a, 2).flatten(1))


def chain(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(8, 10, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(10 * 9, 5),
    )


def normed(norm: Callable[[], nn.Module], activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    """The same chain with a layer behind the first convolution."""
    return lambda: nn.Sequential(chain(activation)()[0], norm(), *chain(activation)()[1:])


MODELS = {
    "relu": chain(nn.ReLU),
    "leaky": chain(nn.LeakyReLU),
    "tanh": chain(nn.Tanh),
    "gelu": chain(nn.GELU),
    "residual": Residual,
    "group norm": normed(lambda: nn.GroupNorm(2, 8)),
    "layer norm": normed(lambda: nn.LayerNorm([8, 3, 3])),
    "instance norm": normed(lambda: nn.InstanceNorm2d(8, affine=True)),
    "max pool": normed(lambda: nn.MaxPool2d(3, 1, 1)),
}


def jacobian(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], sigma: dict[str, Tensor]) -> Tensor:
    """Rows: all gradients over their noise; by forward over reverse differentiation."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def whitened(flat: Tensor) -> Tensor:
        at = lambda p: loss(torch.func.functional_call(model, p, (flat.reshape(x.shape),)), y)  # noqa: E731
        found = torch.func.grad(at)(parameters)
        return torch.cat([(found[name] / sigma[name]).flatten() for name in parameters])

    return torch.func.jacfwd(whitened)(x.flatten()).detach()


def problem(name: str, batch: int = 1) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    model = MODELS[name]().double().eval()
    x, y = torch.rand(batch, 2, 6, 6, dtype=torch.float64), torch.arange(batch) % 5
    sigma = {n: 1e-3 * (1 + torch.rand_like(p)) for n, p in model.named_parameters()}
    return model, x, y, sigma


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entries", [True, False], ids=["noise an entry", "noise a tensor"])
def test_information_is_jacobian_times_its_transpose(name: str, batch: int, entries: bool) -> None:
    model, x, y, sigma = problem(name, batch)
    if not entries:
        sigma = {n: s.mean() for n, s in sigma.items()}
    rows = jacobian(model, x, y, F.cross_entropy, sigma)
    found = fisher_matrix(model, "cross_entropy", x, y, sigma)
    torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-9, atol=1e-9 * float(found.abs().max()))


def test_structure_is_used_where_layers_are_piecewise_linear() -> None:
    for name, expected in (("relu", True), ("residual", True), ("tanh", False), ("gelu", False), ("group norm", False)):
        model, x, y, sigma = problem(name)
        assert bounds.has_structure(bounds.problem_of(model, "cross_entropy", x, y, sigma)[0]) is expected


def test_unknown_scale_is_one_more_unknown() -> None:
    model, x, y, sigma = problem("residual")
    rows = jacobian(model, x, y, F.cross_entropy, sigma)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    scale = torch.cat([(t / s).flatten() for t, s in zip(g, sigma.values(), strict=True)])
    rows = torch.cat([rows, scale[:, None]], 1)
    expected = torch.linalg.inv(rows.mT @ rows).diagonal()[:-1].sqrt().reshape(x.shape)
    found = cramer_rao(model, "cross_entropy", x, y, sigma, known_scale=False)
    torch.testing.assert_close(found.std, expected, rtol=1e-6, atol=0)
    assert found.psnr < cramer_rao(model, "cross_entropy", x, y, sigma).psnr


def test_predicted_psnr_is_of_the_mean_variance() -> None:
    model, x, y, _ = problem("residual")
    found = cramer_rao(model, Loss("cross_entropy"), x, y, 1e-4)
    assert found.psnr == pytest.approx(-10 * math.log10(float(found.std.square().mean())))
    assert cramer_rao(model, "cross_entropy", x, y, 1e-3).psnr == pytest.approx(found.psnr - 20, abs=1e-3)


def test_what_no_equation_reaches_is_open() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 2, stride=3), nn.Flatten(), nn.Linear(6 * 4, 4)).double()
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)  # rows and columns 2 and 5 are stepped over
    std = cramer_rao(model, "mse", x, torch.rand(1, 4), 1e-3).std[0, 0]
    reached = torch.tensor([True, True, False] * 2)
    assert torch.equal(std.isfinite(), reached[:, None] & reached)


def test_larger_inputs_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, sigma = problem("leaky")
    exact = cramer_rao(model, "cross_entropy", x, y, sigma)
    monkeypatch.setattr(bounds, "DENSE_UP_TO", 10)
    found = cramer_rao(model, "cross_entropy", x, y, sigma)
    assert exact.exact
    assert not found.exact
    assert found.psnr == pytest.approx(exact.psnr, abs=1.0)


def test_model_is_left_as_it_was() -> None:
    model, x, y, _ = problem("relu")
    model.float().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    cramer_rao(model, "cross_entropy", x, y, 1e-3)
    assert model.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())

"""Too few equations: the answer obeys every one of them, and among those it is the prior's own optimum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import Solution, System, WeightRows, apply_prior, solve
from rconv_fast.solve.dense import PseudoInverse
from rconv_fast.solve.prior import differences, differences_adjoint
from rconv_fast.walk.bounds import flat_rows
from rconv_fast.walk.reader import build_graph
from rconv_fast.walk.search import forward_pieces

# What the splitting leaves of a bound, with room.
BOUND = 1e-3


def photo(name: str, size: int) -> Tensor:
    image = torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)[None].double() / 255
    side = min(image.shape[2:])
    return F.interpolate(image[..., :side, :side], size=(size, size), mode="area")


def dense(system: System) -> Tensor:
    """The system's matrix, column by column."""
    basis = torch.eye(system.shape.numel(), dtype=torch.float64).reshape(-1, *system.shape)
    return torch.stack([torch.cat([part.reshape(-1) for part in system.apply(e)]) for e in basis], dim=1)


def relu_rows(x: Tensor, geometry: ConvGeometry, weight: Tensor) -> tuple[WeightRows, WeightRows]:
    """The equations of the outputs above 0 and the inequalities of the others."""
    output = F.conv2d(x, weight, stride=geometry.stride, padding=geometry.padding)
    alive = (output > 0).double()
    equations = WeightRows.create(geometry, weight, output, alive)
    return equations, WeightRows(geometry, weight, 1 - alive, torch.zeros_like(output))


@pytest.fixture
def underdetermined() -> tuple[Tensor, System, Solution, WeightRows]:
    """A ReLU layer with 0.7 equations an unknown, for a photo whose values stay inside the box."""
    x = 0.2 + 0.6 * photo("coffee", 10)
    geometry = ConvGeometry.create("test", 3, 16, (10, 10), (5, 5), (2, 2), (2, 2), (1, 1), 1)
    equations, inequalities = relu_rows(x, geometry, torch.randn(16, 3, 5, 5, dtype=torch.float64))
    system = System(x.shape, (equations,))
    solution = solve(system)
    assert not bool(solution.determined.all())
    return x, system, solution, inequalities


def total_variation(x: Tensor) -> float:
    return float(differences(x).square().sum(dim=(0, 2)).sqrt().sum())


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 2, 5, 4), (1, 1, 3, 4, 5)], ids=["1d", "2d", "3d"])
def test_differences_adjoint(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    d = differences(x)
    y = torch.randn_like(d)
    assert torch.allclose((d * y).sum(), (x * differences_adjoint(y)).sum(), rtol=1e-12)


@pytest.mark.parametrize("prior", ["box", "nonnegative", "tv"])
def test_prior_keeps_equations_and_bounds(underdetermined, prior: str) -> None:
    x, system, solution, inequalities = underdetermined
    found = apply_prior(system, solution, prior, [inequalities])
    assert found.residual < 1e-12
    assert system.residual(found.x) < 1e-12
    assert float(found.x.min()) > -BOUND
    assert float((inequalities.apply(found.x) - inequalities.rhs).max()) <= 0
    assert torch.equal(found.determined, solution.determined)
    assert found.solver.endswith(f"+{prior}")
    if prior != "nonnegative":
        assert float(found.x.max()) < 1 + BOUND
        assert float((found.x - x).square().mean()) < float((solution.x - x).square().mean())


def test_tv_is_least_among_solutions(underdetermined) -> None:
    x, system, solution, _ = underdetermined
    found = apply_prior(system, solution, "tv")
    least = total_variation(found.x)
    assert least < total_variation(x)
    null = PseudoInverse.create(system).null
    for size in (1e-2, 1e-1, 1.0):
        for direction in torch.randn(20, null.shape[1], dtype=torch.float64):
            other = found.x + size * (null @ (direction / direction.norm())).reshape(x.shape)
            assert total_variation(other) > least - 1e-3 * size


@pytest.mark.parametrize("prior", ["box", "nonnegative", "tv"])
def test_matrix_free_agrees_with_null_space(underdetermined, prior: str, monkeypatch) -> None:
    _, system, solution, inequalities = underdetermined
    expected = apply_prior(system, solution, prior, [inequalities])
    monkeypatch.setattr("rconv_fast.solve.prior.MAX_DENSE_UNKNOWNS", 0)
    found = apply_prior(system, solution, prior, [inequalities])
    assert found.residual < 1e-12
    assert float((found.x - expected.x).abs().max()) < 20 * BOUND


@pytest.mark.parametrize(("prior", "centre", "high"), [("nonnegative", 0.0, np.inf), ("box", 0.5, 1.0)])
def test_nearest_matches_scipy(underdetermined, prior: str, centre: float, high: float) -> None:
    _, system, solution, _ = underdetermined
    found = apply_prior(system, solution, prior)
    heavy = 1e4
    matrix = np.vstack([heavy * dense(system).numpy(), np.eye(system.unknowns)])
    rhs = np.concatenate([heavy * system.rhs[0].reshape(-1).numpy(), np.full(system.unknowns, centre)])
    expected = scipy.optimize.lsq_linear(matrix, rhs, (0.0, high), method="bvls", tol=1e-12).x
    assert np.abs(found.x.reshape(-1).numpy() - expected).max() < 20 * BOUND


def test_determined_values_match_dense_null_space() -> None:
    x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    geometry = ConvGeometry.create("test", 2, 9, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), 1)
    weight = torch.randn(9, 2, 3, 3, dtype=torch.float64)
    equations, _ = relu_rows(x, geometry, weight)
    known = torch.ones_like(equations.row_weight)
    known[..., 2:] = equations.row_weight[..., 2:]
    output = F.conv2d(x, weight, stride=2, padding=1)
    system = System(x.shape, (WeightRows.create(geometry, weight, output, known),))
    solution = solve(system)
    _, s, vh = np.linalg.svd(dense(system).numpy())
    null = vh[int((s > 1e-9 * s[0]).sum()) :]
    expected = (np.abs(null) < 1e-6).all(axis=0).reshape(x.shape)
    assert 0 < expected.mean() < 1
    found = apply_prior(system, solution, "tv")
    assert np.array_equal(found.determined.numpy(), expected)
    assert float((found.x - x)[found.determined].abs().max()) < 1e-9
    assert solution.inverse.null.shape[1] == len(null)


def test_null_basis_stays_on_the_support(underdetermined) -> None:
    x, system, _, _ = underdetermined
    support = torch.ones(x.shape, dtype=torch.bool)
    support[..., :2] = False
    restricted = replace(system, support=support)
    null = PseudoInverse.create(restricted).null
    rank = np.linalg.matrix_rank(dense(system).numpy()[:, support.reshape(-1).numpy()])
    assert null.shape[1] == int(support.sum()) - rank
    assert bool((null[~support.reshape(-1)] == 0).all())
    assert torch.allclose(null.mT @ null, torch.eye(null.shape[1], dtype=torch.float64), atol=1e-10)


def test_flat_rows_hold_at_the_true_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model = model.double().eval()
    nn.init.normal_(model[0].weight, std=2.0)
    nn.init.normal_(model[1].weight)  # scales of both signs
    nn.init.normal_(model[1].bias)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    graph = build_graph(model, gradients, (3, 12, 12), 2)
    values = forward_pieces(graph, x, 0.0)
    (activation,) = values.values()
    rows = flat_rows(graph, values, graph.input)
    held = sum(int((block.row_weight != 0).sum()) for block in rows)
    assert held == int((activation == 0).sum() + (activation == 6).sum())
    assert bool((activation == 6).any())
    for block in rows:
        assert float((block.apply(x) - block.rhs).max()) < 1e-12
        assert float((block.apply(-3 * x) - block.rhs).max()) > 0


def lenet(size: int, seed: int) -> nn.Sequential:
    """The authors' LeNet-O with ReLU everywhere: about 0.7 equations an unknown in the first layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 12, 5, 1, 2),
        nn.ReLU(),
        nn.Conv2d(12, 3, 5, 1, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * (size // 4) ** 2, 100),
    )
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return model.double()


def inverted(model: nn.Module, x: Tensor, prior: str | None) -> tuple[rconv_fast.Inversion, float]:
    """The inversion and its PSNR."""
    loss = F.cross_entropy(model(x), torch.tensor([7]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    found = rconv_fast.invert(model, gradients, x.shape[1:], prior=prior)
    return found, -10 * float((found.inputs - x).square().mean().log10())


def test_invert_with_too_few_rows() -> None:
    x = photo("coffee", 24)
    plain, plain_psnr = inverted(lenet(24, 2), x, None)
    found, psnr = inverted(lenet(24, 2), x, "tv")
    assert found.layers[-1].rank < found.layers[-1].unknowns
    assert plain_psnr < 15
    assert psnr > 25
    for inversion, choice in ((plain, "minimum-norm"), (found, "prior 'tv'")):
        assert not inversion.verified
        assert float(inversion.determined.double().mean()) < 0.5
        assert any(choice in note for note in inversion.notes)
    assert found.layers[-1].solver.endswith("+tv")
    assert found.gradient_residual < 1e-10  # equations and dead units: all that the gradient says


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("astronaut", 0), ("chelsea", 0), ("coffee", 1), ("rocket", 2)])
def test_tv_shows_the_photo(name: str, seed: int) -> None:
    found, psnr = inverted(lenet(32, seed), photo(name, 32), "tv")
    assert psnr >= 25
    assert not found.verified

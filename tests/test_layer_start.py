"""A layer's input under noise: every way to solve its weighted rows gives the least squares solution and its error."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rconv_fast import psnr
from rconv_fast.budget import Budget
from rconv_fast.errors import LinAlgError
from rconv_fast.estimate import joint_answer, layer_start
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.layer_start import WeightedRows, solve_robustly, solve_rows
from rconv_fast.estimate.recursion import noisy_start
from rconv_fast.losses import Loss
from rconv_fast.observation import Observation
from rconv_fast.walk.reader import build_graph


def noisy_rows(batch: int, kernel: int, groups: int = 1) -> WeightedRows:
    """Of one convolution behind a ReLU; the noise of both kinds of rows is drawn."""
    torch.manual_seed(kernel)
    model = nn.Sequential(
        nn.Conv2d(4, 8, kernel, stride=2, padding=kernel // 2, groups=groups), nn.Flatten(), nn.Linear(8 * 9, 3)
    ).double()
    unseen = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    graph = build_graph(model, unseen, (4, 6, 6), batch, torch.float64)
    rule = next(step.rule for step in graph.steps.values() if step.label == "0")
    x, g = torch.rand(batch, 4, 6, 6).double(), torch.randn(batch, 8, 3, 3).double()
    w, v = 1e4 * (0.5 + torch.rand_like(rule.weight)), 1e6 * (torch.rand_like(g) > 0.5) * (0.5 + torch.rand_like(g))
    seen = torch.ops.aten.convolution_backward(
        g, x, rule.weight, None, (2, 2), (kernel // 2,) * 2, (1, 1), False, [0, 0], groups, [False, True, False]
    )[1]
    z = nn.functional.conv2d(x, rule.weight, None, 2, kernel // 2, groups=groups)
    noisy = seen + torch.randn_like(seen) / w.sqrt()
    return WeightedRows(rule, g, w, noisy, v, z + torch.randn_like(z) * 1e-3, prior=1.0)


def by_columns(rows: WeightedRows) -> tuple[Tensor, Tensor]:
    """The normal equations column by column."""
    n = rows.shape.numel()
    units = torch.eye(n, dtype=torch.float64).reshape(n, *rows.shape)
    inverse = torch.linalg.inv(torch.stack([rows.normal(unit).flatten() for unit in units]))
    return (inverse @ rows.right.flatten()).reshape(rows.shape), inverse.diagonal().sqrt().reshape(rows.shape)


@pytest.mark.parametrize(("batch", "kernel", "groups"), [(1, 3, 1), (2, 3, 1), (2, 5, 2)])
@pytest.mark.parametrize("way", ["direct", "woodbury", "conjugate gradients"])
def test_every_way_gives_the_same(
    batch: int, kernel: int, groups: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = noisy_rows(batch, kernel, groups)
    x, deviation = by_columns(rows)
    if way != "direct":
        monkeypatch.setattr(layer_start, "DIRECT_UP_TO", 0)
    if way == "woodbury":
        monkeypatch.setattr(layer_start, "DRAWS", 60)
    if way == "conjugate gradients":
        monkeypatch.setattr(layer_start, "WOODBURY_UP_TO", 0)
        monkeypatch.setattr(layer_start, "TOLERANCE", 1e-12)  # to its end: a start stops far before
        monkeypatch.setattr(layer_start, "ITERATIONS", 2000)
    found, error = solve_rows(rows)
    assert float(((found - x) / deviation).abs().max()) < 1e-2
    if way == "direct":
        assert torch.allclose(error, deviation)
    if way == "woodbury":
        assert float(error.square().mean() / deviation.square().mean()) == pytest.approx(1.0, abs=0.25)


def test_no_output_known_is_solved_by_the_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noisy_rows(1, 3)
    rows = WeightedRows(**{**vars(rows), "v": torch.zeros_like(rows.v)})
    monkeypatch.setattr(layer_start, "DIRECT_UP_TO", 0)
    x, deviation = by_columns(rows)
    assert float(((solve_rows(rows)[0] - x) / deviation).abs().max()) < 1e-2


def test_blocks_that_are_not_finite_end_the_search_for_a_factor() -> None:
    with pytest.raises(LinAlgError, match="positive semi-definite"):
        layer_start._shifted_cholesky(torch.full((1, 2, 2), math.nan, dtype=torch.float64), 1.0)


def test_a_filter_with_a_wrong_output_gradient_is_weighed_down() -> None:
    rows = noisy_rows(1, 3)
    without = rows.w.clone()
    without[2] = 0.0
    wrong = rows.g.clone()
    wrong[0, 2, 1, 1] += 1.0
    broken = replace(rows, g=wrong)
    best, deviation = solve_rows(replace(rows, w=without))
    robust, _ = solve_robustly(broken)
    assert float(((robust - best) / deviation).square().mean().sqrt()) < 0.5
    assert float(((solve_rows(broken)[0] - best) / deviation).square().mean().sqrt()) > 5


def test_rows_within_their_noise_keep_their_weights() -> None:
    rows = noisy_rows(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(solve_robustly(rows), solve_rows(rows), strict=True))


def behind_relus(
    seed: int, shapes: tuple[tuple[int, int, int], ...], noise: float
) -> tuple[GradientMap, Tensor, Tensor]:
    """A noisy gradient of convolutions (filters, kernel, stride); the picture, and the last layer's input."""
    torch.manual_seed(seed)
    channels = (1, *(filters for filters, _, _ in shapes))
    convolutions = [nn.Conv2d(c, f, k, s, k // 2) for c, (f, k, s) in zip(channels, shapes, strict=False)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten())
    width = model(torch.zeros(1, 1, 16, 16)).numel()
    model = nn.Sequential(*model, nn.Linear(width, 10)).double()
    x, y = torch.rand(1, 1, 16, 16).double(), torch.tensor([3])
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(parameters.values()))
    sigma = {name: noise * g.square().mean().sqrt() for name, g in zip(parameters, found, strict=True)}
    noisy = {n: (g + sigma[n] * torch.randn_like(g)).detach() for n, g in zip(parameters, found, strict=True)}
    return GradientMap.read(model, Loss("cross_entropy"), y, noisy, sigma, x.shape), x, model[:-1](x).detach()


def in_front_of_last(problem: GradientMap, features: Tensor) -> dict[str, Tensor]:
    assert problem.graph is not None
    return {problem.graph.steps[problem.graph.output].inputs[0]: features}


@pytest.mark.parametrize("seed", range(3))
def test_many_bits_that_are_all_but_sure_do_not_drown_the_rows(seed: int) -> None:
    """Thousands of dead values, active with a probability of 1e-4 each, are no noise in every filter's rows."""
    problem, x, features = behind_relus(seed, ((16, 5, 2), (32, 3, 2), (48, 3, 1)), 1e-5)
    start = noisy_start(problem, in_front_of_last(problem, features), Budget())
    assert start is not None
    assert psnr(start[0], x) > 105  # 90 to 100 dB with the doubt of each taken for noise


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_starts_on_the_sides_that_the_recursion_found(seed: int) -> None:
    """A first layer of few filters leaves the start far less exact than the layers behind it are."""
    problem, x, features = behind_relus(seed, ((7, 5, 2), (32, 3, 1)), 3e-3)
    observation = Observation(problem.seen, problem.loss, problem.sigma)
    known = in_front_of_last(problem, features)
    found = joint_answer(problem.model, observation, problem.targets, known, x.shape, None, Budget())
    assert found is not None
    assert abs(found.z) < 4

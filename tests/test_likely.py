"""Pictures that hidden maxima do not determine: what to expect under a prior, with error bars, never verified."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks import gradients_of, photo
from pooled_layers import pooled_layer
from rconv_fast import Inversion, invert, psnr
from rconv_fast.budget import Budget
from rconv_fast.patterns.alternation import Guided, alternate
from rconv_fast.patterns.likely import likely_picture
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.moments import Moments, Site
from rconv_fast.patterns.roughness import COLOUR, GREY, Roughness, random_pictures
from rconv_fast.walk.chain import read_chain, read_problem
from rconv_fast.walk.found import Known, Options, Pass
from rconv_fast.walk.reader import build_graph


def attacked(model: nn.Module, x: Tensor, prior: str | None) -> Inversion:
    label = torch.tensor([1])
    gradients = gradients_of(model, x, label)
    return invert(model, gradients, x.shape[1:], batch_size=1, labels=[1], prior=prior)


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_that_few_filters_leave_open_is_what_is_to_be_expected(seed: int) -> None:
    """Six filters behind a pool: 0.4 equations a value, and not even those under a known pattern."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 6, 5)
    model = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 64, 10)).double()
    x = photo(20)
    found = attacked(model, x, "tv")
    assert (found.verdict, found.verified) == ("approximate", False)
    assert found.inputs is not None
    assert found.uncertainty is not None
    assert found.determined is not None
    assert not bool(found.determined.any())
    assert psnr(found.inputs, x) > 18
    assert float(((found.inputs - x).abs() <= 2 * found.uncertainty).double().mean()) > 0.9
    assert found.samples[0].error == pytest.approx(float(found.uncertainty.square().mean().sqrt()))
    assert "prove no pattern" in found.reason
    assert attacked(model, x, None).verdict == "features"


@pytest.mark.slow
def test_six_filters_show_a_photo_of_32_pixels() -> None:
    """As many as in Flower's tutorial."""
    torch.manual_seed(0)
    x = photo(32)
    assert psnr(likely_picture(pooled_layer(x, 6).problem, Budget()).x, x) > 20


def test_no_time_leaves_the_first_round() -> None:
    torch.manual_seed(0)
    assert likely_picture(pooled_layer(photo(12), 4).problem, Budget.seconds(0)).rounds == 1


def test_two_samples_and_one_channel() -> None:
    torch.manual_seed(0)
    x = torch.cat([photo(12, channels=1), photo(12, channels=1).flip(-1)])
    found = likely_picture(pooled_layer(x, 6).problem, Budget())
    assert psnr(found.x, x) > 15
    assert found.deviation.shape == x.shape


def truncated(mean: float, deviation: float, low: float, high: float) -> tuple[float, float]:
    """Mean and variance by quadrature."""
    x = torch.linspace(max(low, mean - 12 * deviation), min(high, mean + 12 * deviation), 200_001, dtype=torch.float64)
    density = torch.exp(-((x - mean) / deviation).square() / 2)
    density = density / density.sum()
    first = float((density * x).sum())
    return first, float((density * (x - first).square()).sum())


@pytest.mark.parametrize(("mean", "limit"), [(0.0, 0.3), (1.0, -0.5), (-2.0, 1.0), (3.0, 0.0)])
def test_moments_of_what_is_below_or_above(mean: float, limit: float) -> None:
    given = Moments(torch.tensor([mean], dtype=torch.float64), torch.tensor([0.49], dtype=torch.float64))
    for found, bounds in ((given.below(limit), (-math.inf, limit)), (given.above(limit), (limit, math.inf))):
        expected = truncated(mean, 0.7, *bounds)
        assert (float(found.mean), float(found.variance)) == pytest.approx(expected, rel=1e-3)


def test_a_limit_far_below_leaves_what_is_near_it() -> None:
    found = Moments(torch.tensor([5.0], dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)).below(4.0)
    assert float(found.mean) == pytest.approx(4.0, abs=0.02)
    assert 0 < float(found.variance) < 0.001


def test_a_site_makes_of_a_gaussian_what_was_seen() -> None:
    before = Moments(torch.tensor([0.2, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64))
    seen = before.below(torch.tensor([0.1, math.inf], dtype=torch.float64)).or_at(
        torch.tensor([0.1, 0.0], dtype=torch.float64), torch.tensor([0.3, 0.0], dtype=torch.float64)
    )
    site = seen.site(before)
    precision = 1 / before.variance + site.weight
    mean = (before.mean / before.variance + site.weight * site.target) / precision
    assert torch.allclose(mean, seen.mean)
    assert torch.allclose(1 / precision, seen.variance)
    assert float(site.weight[1]) == 0.0
    half = site.halfway(Site.zeros(torch.zeros(2, dtype=torch.float64)))
    assert torch.allclose(half.weight, site.weight / 2)
    assert torch.allclose(half.target, site.target)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 7), (1, 2, 3, 3, 3)], ids=str)
def test_roughness_is_a_sum_over_neighbours(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rough, x = Roughness.of_pictures(torch.Size(shape)), torch.randn(shape, dtype=torch.float64)
    expected = 0.0
    for axis in range(2, len(shape)):
        d = x.diff(dim=axis)
        grey = d.mean(1, keepdim=True)
        expected += float(grey.square().sum() / GREY**2 + (d - grey).square().sum() / COLOUR**2)
    prior = rough.prior(rough.even())
    assert float(x.flatten() @ prior.information @ x.flatten()) == pytest.approx(expected)
    assert int(torch.linalg.matrix_rank(prior.information, hermitian=True)) == prior.rank


def test_neighbours_at_an_edge_hold_each_other_less() -> None:
    rough = Roughness.of_pictures(torch.Size((1, 3, 1, 3)))
    x = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(1, 3, 1, 3)
    w = rough.weights(x, torch.zeros(4, 1, 3, 1, 3, dtype=torch.float64))
    assert float(w.min()) == pytest.approx(GREY * math.sqrt(3))
    assert float(w.max()) == pytest.approx(10.0)


def test_what_was_open_stays_open_when_more_is_known() -> None:
    both = Known(open=frozenset({"a"})).and_also(Known(open=frozenset({"b"})))
    assert both.open == {"a", "b"}


@pytest.mark.parametrize("seed", range(4))
def test_features_are_found_by_what_those_of_random_pictures_are_like(seed: int) -> None:
    """Ten filters of 5x5 on six channels: beliefs alone find three of the four, and two of these with eight filters."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 6, 5, padding=2, dtype=torch.float64)

    def features(x: Tensor) -> Tensor:
        return F.max_pool2d(conv(x).relu(), 2).detach()

    x = features(photo(24))
    samples = features(random_pictures(torch.Size((64, 3, 24, 24)), torch.Generator().manual_seed(0)))
    problem = pooled_layer(x, 10, image=False).problem
    found = alternate(problem, Guided(Roughness.of_features(x.shape, samples)), Budget())
    assert found.certified
    assert found.fit is not None
    assert torch.allclose(found.fit.x, x, atol=1e-9)


def test_a_maximum_that_is_open_bounds_nothing() -> None:
    """Values that no active window of the layer behind sees are open, and what is made up for them is not believed."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()
    graph = build_graph(model, {}, (1, 6, 6), 1)
    name = next(step.name for step in graph.steps.values() if step.rule.hidden)
    value, grad = torch.rand(1, 4, 2, 2, dtype=torch.float64) + 0.1, torch.rand(1, 4, 2, 2, dtype=torch.float64)
    determined = torch.ones(1, 4, 2, 2, dtype=torch.bool)
    determined[0, 0, 0, 0] = False
    grad[0, 0, 0, 0] = 0
    (model(torch.rand(1, 1, 6, 6, dtype=torch.float64)).sum()).backward()
    graph = build_graph(model, {k: p.grad for k, p in model.named_parameters()}, (1, 6, 6), 1)
    chain = read_chain(graph, name)
    assert chain is not None
    problem = read_problem(
        graph, Pass({name: value}, {name: grad}, determined={name: determined}), chain, Options(1e-15)
    )
    assert problem is not None
    hidden = problem.hidden
    assert isinstance(hidden, Maxima)
    assert not bool(hidden.known[0, 0, 0])
    assert float(hidden.bound[0, 0, 0]) == math.inf
    assert int(hidden.known.sum()) == 15


def test_random_pictures_are_as_rough_as_pictures() -> None:
    x = random_pictures(torch.Size((200, 3, 16, 16)), torch.Generator().manual_seed(0))
    d = x.diff(dim=3)
    grey = d.mean(1, keepdim=True)
    inside = ((x > 0) & (x < 1)).all(1, keepdim=True)
    inside = inside[..., 1:] & inside[..., :-1]
    assert float(grey[inside].square().mean().sqrt()) == pytest.approx(GREY / math.sqrt(2), rel=0.15)
    assert float((d - grey).square().sum(1, keepdim=True)[inside].mean().sqrt()) == pytest.approx(COLOUR, rel=0.15)

"""Beliefs about hidden positions: what values and gradients say of them, the equations they weigh, and the search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks import photo
from pooled_layers import pooled_layer
from rconv_fast.budget import Budget
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.windows import Windows
from rconv_fast.patterns import information
from rconv_fast.patterns.alternation import BELIEFS, alternate
from rconv_fast.patterns.beliefs import Estimate, Marginal, can_believe, gradient_belief, position_belief, updated
from rconv_fast.patterns.certificate import certify
from rconv_fast.patterns.information import Equations, Prior
from rconv_fast.patterns.maxima import Maxima
from rconv_fast.patterns.moments import Site
from rconv_fast.patterns.problem import Convolution, Problem, Reading
from rconv_fast.patterns.robust import SHARP, RobustSteps


def convolution(groups: int = 1, batch: int = 1, channels: int = 2, filters: int = 4) -> Convolution:
    geometry = ConvGeometry.create("test", channels, filters, (5, 6), 3, stride=2, padding=1, groups=groups)
    weight = torch.randn(filters, channels // groups, 3, 3, dtype=torch.float64)
    return Convolution(geometry, weight, torch.randn(filters).double(), torch.randn_like(weight), batch)


def columns(function: object, shape: torch.Size) -> Tensor:
    """The matrix of a linear function."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64)
    return torch.stack([function(one.view(shape)).flatten() for one in basis], 1)  # type: ignore[operator]


@pytest.mark.parametrize(("groups", "batch"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_information_is_that_of_all_rows_with_their_covariances(groups: int, batch: int) -> None:
    c = convolution(groups, batch)
    outputs = (batch, 4, c.geometry.n_output)
    g, target, weight = torch.randn(outputs).double(), torch.randn(outputs).double(), torch.rand(outputs).double()
    root = torch.randn(4, *2 * (c.weight[0].numel(),), dtype=torch.float64)
    inputs = Site(torch.rand(c.shape, dtype=torch.float64), torch.randn(c.shape, dtype=torch.float64))
    before = Prior(torch.eye(inputs.weight.numel(), dtype=torch.float64), inputs.weight.numel())
    equations = Equations(c, Reading(g, target, weight), inputs, root @ root.mT, before)
    of_values = columns(lambda x: c.output(x) - c.bias[:, None], c.shape)
    of_gradients = columns(lambda x: c.weight_gradient(x, g), c.shape)
    metric = torch.block_diag(*equations.precision)
    expected = of_gradients.T @ metric @ of_gradients + of_values.T @ torch.diag(weight.flatten()) @ of_values
    assert torch.allclose(equations.information(), expected + torch.diag(inputs.weight.flatten()) + before.information)
    seen = of_gradients.T @ metric @ c.grad_weight.flatten()
    known = of_values.T @ (weight * (target - c.bias[:, None])).flatten()
    assert torch.allclose(equations.right().flatten(), seen + known + (inputs.weight * inputs.target).flatten())


@pytest.mark.parametrize("most_exact", [1700, 0], ids=["exact", "drawn"])
def test_error_bars_are_those_of_the_inverse(most_exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(information, "MOST_EXACT", most_exact)
    monkeypatch.setattr(information, "DRAWS", 4000)
    c = convolution(2, 2)
    g = torch.randn(2, 4, c.geometry.n_output, dtype=torch.float64)
    white = torch.eye(9, dtype=torch.float64).expand(4, 9, 9)
    solved = Equations(c, Reading(g, g, torch.rand_like(g)), Site.zeros(torch.ones(c.shape).double()), white).solved()
    covariance = (solved.factor @ solved.factor.T).inverse()
    of_values = columns(lambda x: c.output(x) - c.bias[:, None], c.shape)
    of_x, of_o = solved.variances(c)
    tolerance = 1e-8 if most_exact else 0.15
    assert torch.allclose(of_x.flatten(), covariance.diagonal(), rtol=tolerance)
    assert torch.allclose(of_o.flatten(), (of_values @ covariance @ of_values.T).diagonal(), rtol=tolerance)


def pairs(known: bool = True) -> Maxima:
    """One filter, two windows of two positions each; maxima 1 and 2."""
    windows = Windows.create((4,), (2,), (2,), (0,), (1,))
    value = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    return Maxima.create(windows, value, torch.tensor([[[0.5, -1.5]]]).double(), torch.full_like(value, known) > 0)


def test_a_position_is_believed_by_how_well_it_meets_the_maximum_and_the_others_stay_below() -> None:
    maxima, normal = pairs(), torch.distributions.Normal(0.0, 1.0)
    o, s = torch.tensor([0.9, 1.2, 1.0, 1.9], dtype=torch.float64), 0.3
    belief = position_belief(maxima, Marginal.alike(o.view(1, 1, 4), s))[0, 0]
    z = (o - torch.tensor([1.0, 1.0, 2.0, 2.0])) / s
    density, below = normal.log_prob(z).exp(), normal.cdf(-z)
    likely = (density * below.view(2, 2).flip(1).flatten()).view(2, 2)
    assert torch.allclose(belief, likely / likely.sum(1, keepdim=True))
    assert float(position_belief(pairs(known=False), Marginal.alike(o.view(1, 1, 4), s)).abs().max()) == 0


def test_an_equation_does_not_confirm_itself() -> None:
    others, own, target = (torch.tensor([0.4]), 1 / 0.2**2), 1 / 0.1**2, 1.0
    precision = others[1] + own
    both = Marginal(
        (others[0] * others[1] + target * own) / precision, torch.tensor([precision**-0.5]), own / precision
    )
    cavity = replace(both, share=torch.tensor([float(both.share)])).without_own(target)
    assert torch.allclose(cavity.mean, others[0])
    assert torch.allclose(cavity.deviation, torch.tensor([0.2]))


def test_gradients_say_of_a_window_what_all_patterns_of_the_others_say_on_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a window in doubt one that is sure: the likelihood of either position is a Gaussian, written out."""
    monkeypatch.setattr("rconv_fast.patterns.beliefs.HEARD", 1.0)
    maxima, x = pairs(), torch.tensor([0.3, -0.2, 0.9, 0.5, 0.1], dtype=torch.float64).view(1, 1, 5)
    geometry = ConvGeometry.create("test", 1, 1, (5,), 2)
    weight = torch.tensor([[[1.0, -0.5]]], dtype=torch.float64)
    bare = Convolution(geometry, weight, torch.zeros(1).double(), torch.zeros_like(weight))
    right = maxima.gradient(maxima.one_hot(torch.tensor([[[1, 0]]])))
    c = replace(bare, grad_weight=bare.weight_gradient(x, right))
    by_value = torch.tensor([[[[0.6, 0.4], [1.0, 0.0]]]], dtype=torch.float64)
    error = 0.2
    known = Estimate(Marginal.alike(x, error), Marginal.alike(c.output(x), error))
    belief = gradient_belief(c, maxima, known, by_value, by_value)
    white = error**2 * float(maxima.gradient(by_value).square().sum())
    missed = [
        c.grad_weight - c.weight_gradient(x, maxima.gradient(maxima.one_hot(torch.tensor([[[q, 0]]])))) for q in (0, 1)
    ]
    odds = by_value[0, 0, 0] * torch.stack([torch.exp(-m.square().sum() / (2 * white)) for m in missed])
    assert torch.allclose(belief[0, 0, 0], odds / odds.sum())
    assert torch.equal(belief[0, 0, 1], by_value[0, 0, 1])


def pooled(x: Tensor, filters: int, *, image: bool = True, rare: int = 0) -> Problem:
    return pooled_layer(x, filters, image=image, rare=rare).problem


@pytest.mark.parametrize("seed", range(4))
def test_beliefs_find_a_colour_picture(seed: int) -> None:
    """Of twelve filters, which are few."""
    torch.manual_seed(seed)
    x = photo(16)
    found = alternate(pooled(x, 12), BELIEFS, Budget())
    assert found.certified
    assert found.fit is not None
    assert torch.allclose(found.fit.x, x, atol=1e-9)


def test_an_estimate_is_asked_less_what_its_own_equations_added() -> None:
    torch.manual_seed(0)
    problem = pooled(photo(12, channels=1), 12)
    x = photo(12, channels=1) + 0.05 * torch.randn(1, 1, 12, 12, dtype=torch.float64)
    o, maxima = problem.front.output(x), problem.hidden
    assert isinstance(maxima, Maxima)
    pulled = Marginal(o, torch.full_like(o, 0.05), 0.8 * torch.rand_like(o))
    known = Estimate(Marginal.alike(x, 0.05), pulled)
    without = replace(known, o=pulled.without_own(maxima.target))
    assert torch.allclose(updated(problem, known).x.mean, updated(problem, without).x.mean)


@pytest.mark.parametrize("seed", range(3))
def test_error_bars_hold_the_errors_while_most_positions_are_in_doubt(seed: int) -> None:
    torch.manual_seed(seed)
    x = photo(16)
    problem = pooled(x, 16)
    known = Estimate.of_start(problem, RobustSteps.create(problem, SHARP).next(None))
    for _ in range(3):
        known = updated(problem, known)
    error = (known.o.mean - problem.front.output(x)).abs()
    assert float((error <= 3 * known.o.deviation).double().mean()) > 0.98


def test_a_filter_with_a_single_active_window_does_not_mislead() -> None:
    """Its gradient shows one patch, of which x tells little: what that is taken for is as uncertain as x."""
    for seed in range(6):
        torch.manual_seed(seed)
        x = photo(16)
        assert alternate(pooled(x, 20, rare=4), BELIEFS, Budget()).certified


def test_values_behind_a_relu_are_believed_to_be_zero() -> None:
    torch.manual_seed(0)
    x = F.conv2d(photo(12), torch.randn(6, 3, 5, 5, dtype=torch.float64) / 5, padding=2).relu()
    problem = pooled(x, 20, image=False)
    near = x + 0.01 * torch.randn_like(x)
    known = Estimate(Marginal.alike(near, 0.01), Marginal.alike(problem.front.output(near), 0.05))
    found = updated(problem, known)
    assert float(found.x.share[x == 0].median()) > 100 * float(found.x.share[x > 0.1].median())
    assert float((found.x.mean - x).norm()) < float((near - x).norm())
    searched = alternate(problem, BELIEFS, Budget())
    assert searched.fit is not None
    assert torch.allclose(searched.fit.x, x, atol=1e-9)


def test_no_beliefs_about_too_many_values_or_what_is_no_maximum() -> None:
    problem = pooled(photo(12, channels=1), 8)
    assert can_believe(problem)
    assert not can_believe(pooled(photo(36), 8))
    assert alternate(problem, SHARP, Budget.seconds(0)).fit is not None


def test_equations_too_singular_for_a_factor_end_a_search_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rconv_fast.patterns.information.safe_cholesky", refuse)
    found = alternate(pooled(photo(12, channels=1), 8), BELIEFS, Budget())
    assert not found.certified


def refuse(*_: object) -> None:
    raise torch.linalg.LinAlgError("not positive-definite")


def test_a_right_pattern_that_leaves_values_open_is_certified_by_an_input_that_meets_everything() -> None:
    """A corner that no active window sees is open under the right pattern; another value there fits as well."""
    torch.manual_seed(0)
    problem, x = corner_unseen()
    pattern = problem.hidden.choose(problem.front.output(x))
    fit = certify(problem, pattern, x)
    assert fit is not None
    assert fit.certified
    assert not bool(fit.determined.all())
    near = certify(problem, pattern, x + 1e-6 * fit.determined * torch.randn_like(x))
    assert near is not None
    assert near.misfit < problem.tolerance
    wrong = pattern.clone()
    wrong[0, 0, -1] = (wrong[0, 0, -1] + 1) % 4
    assert certify(problem, wrong, x) is None


def corner_unseen() -> tuple[Problem, Tensor]:
    """A picture of which the windows that see the first corner are all negative."""
    x = photo(12, channels=1)
    problem = pooled(x, 24)
    front, hidden = problem.front, problem.hidden
    assert isinstance(front, Convolution)
    assert isinstance(hidden, Maxima)
    o = front.output(x)
    value, grad = hidden.value.clone(), hidden.grad.clone()
    first = torch.tensor([0, 1, 6, 7])
    known = hidden.known.clone()
    known[..., first] = False
    bound = hidden.windows.gather(o).amax(-1).clamp_min(0)
    blind = replace(hidden, value=value * known, grad=grad * known, known=known, bound=bound)
    g = blind.tight(blind.choose(o)).g
    return replace(problem, front=replace(front, grad_weight=front.weight_gradient(x, g)), hidden=blind), x


def test_a_pattern_that_leaves_values_open_is_certified_once_its_input_meets_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pattern is right before the input is exact: it is tried again."""
    torch.manual_seed(0)
    problem, x = corner_unseen()
    off = [x + size * torch.randn_like(x) for size in (1e-6, 1e-7, 1e-8)]
    iterates = iter([*off, *[x] * 80])

    class Given:
        def next(self, _: Tensor | None) -> Tensor:
            return next(iterates)

    monkeypatch.setattr("rconv_fast.patterns.alternation.BeliefSteps", lambda _: Given())
    assert alternate(problem, BELIEFS, Budget()).certified

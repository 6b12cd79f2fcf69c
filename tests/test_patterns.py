"""Hidden patterns, layer by layer: windows, normal equations, positions of maxima, and the certificate that accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks import photo
from layers import random_weight
from pooled_layers import Layer, pooled_layer
from rconv_fast.budget import Budget
from rconv_fast.geometry import ConvGeometry
from rconv_fast.layers.windows import Windows
from rconv_fast.patterns.alternation import alternate
from rconv_fast.patterns.averages import arrange
from rconv_fast.patterns.certificate import certify
from rconv_fast.patterns.descent import descend
from rconv_fast.patterns.least_squares import WeightedSolver, value_gram
from rconv_fast.patterns.packing import find_columns, rank_of
from rconv_fast.patterns.problem import Reading
from rconv_fast.patterns.robust import DESCENT, GENTLE, SHARP, SOFT
from rconv_fast.solve import ThroughRows, WeightRows

POOLS = {
    "1d": nn.MaxPool1d(3, 2, 1),
    "2d": nn.MaxPool2d(2),
    "overlap": nn.MaxPool2d(3, 2, 1),
    "dilated": nn.MaxPool2d(2, 2, dilation=2),
    "ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "3d": nn.MaxPool3d(2, 2),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_windows_are_those_of_torch(pool: nn.Module) -> None:
    ndim = int(type(pool).__name__[-2])
    size = (9, 8, 7)[:ndim]
    x = torch.randn(2, 3, *size)
    as_tuple = lambda v: (v,) * ndim if isinstance(v, int) else tuple(v)  # noqa: E731
    sizes = [as_tuple(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    windows = Windows.create(size, *sizes, pool.ceil_mode)
    pool.return_indices = True
    value, index = pool(x)
    assert windows.out_size == value.shape[2:]
    outputs = windows.gather(x.flatten(2))
    assert torch.equal(outputs.amax(-1), value.flatten(2))
    assert torch.equal(
        windows.index.expand(*outputs.shape).gather(-1, outputs.argmax(-1)[..., None])[..., 0], index.flatten(2)
    )


@pytest.mark.parametrize(("size", "out"), [((7, 5), (3, 2)), ((6,), (4,)), ((4, 4, 4), (1, 2, 3))])
def test_adaptive_windows_are_those_of_torch(size: tuple[int, ...], out: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, *size)
    pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(size) - 1]
    assert torch.equal(Windows.adaptive(size, out).gather(x.flatten(2)).amax(-1), pool(x, out).flatten(2))


def test_what_windows_share_out_comes_back_as_sums_and_extremes() -> None:
    windows = Windows.create((5,), (3,), (1,), (1,), (1,))
    values = torch.rand(1, 1, *windows.index.shape)
    for u in range(5):
        own = values[0, 0][windows.index == u]
        assert torch.isclose(windows.add(values)[0, 0, u], own.sum())
        assert torch.isclose(windows.largest(values)[0, 0, u], own.max())
        assert torch.isclose(windows.smallest(values)[0, 0, u], own.min())


def test_the_normal_matrix_of_values_is_that_of_their_rows(geometry: ConvGeometry) -> None:
    if geometry.n_input * geometry.in_channels > 600:
        pytest.skip("a dense matrix of this one is large")
    weight = random_weight(geometry, dtype=torch.float64)
    row_weight = torch.rand(1, geometry.out_channels, *geometry.out_size, dtype=torch.float64)
    rows = WeightRows.create(geometry, weight, torch.zeros_like(row_weight), row_weight.sqrt())
    n = geometry.in_channels * geometry.n_input
    gram = value_gram(geometry, weight, row_weight[0].flatten(1)).view(n, n)
    torch.testing.assert_close(gram, rows.normal())


def features(channels: int, size: int) -> Tensor:
    """What a ReLU leaves of a convolution of a photo."""
    return F.conv2d(photo(size), torch.randn(channels, 3, 5, 5, dtype=torch.float64) / 5, padding=2).relu()


LAYERS: dict[str, Callable[[], Layer]] = {
    "picture": lambda: pooled_layer(photo(16, channels=1), 24),
    "overlapping": lambda: pooled_layer(photo(16, channels=1), 24, (3, 2, 1)),
    "features": lambda: pooled_layer(features(8, 8), 24, image=False),
    "groups": lambda: pooled_layer(features(4, 8), 32, image=False, groups=2),
    "two samples": lambda: pooled_layer(photo(12, batch=2, channels=1), 48),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_behind_a_pool_comes_back_exactly(make: Callable[[], Layer]) -> None:
    layer = make()
    budget = Budget.seconds(20)
    attempts = (alternate(layer.problem, schedule, budget) for schedule in (SHARP, SOFT, DESCENT, GENTLE))
    found = next((attempt.fit for attempt in attempts if attempt.certified), None)
    assert found is not None
    assert float((found.x - layer.x).abs().max()) < 1e-8
    known = layer.problem.hidden.known
    assert torch.equal(found.pattern[known], layer.truth[known])
    assert found.evidence.proof == "pattern"


@pytest.mark.parametrize("seed", range(4))
def test_a_pattern_that_coarse_gradients_certify_is_searched_on_until_it_stays(seed: int) -> None:
    # At this tolerance one with a few positions wrong may be certified on the way.
    torch.manual_seed(seed)
    layer = pooled_layer(photo(16, channels=1), 24)
    coarse = replace(layer.problem, tolerance=1e-2)
    found = alternate(coarse, SHARP, Budget.seconds(20)).fit
    assert found is not None
    known = layer.problem.hidden.known
    assert torch.equal(found.pattern[known], layer.truth[known])


def test_a_wrong_pattern_is_not_certified() -> None:
    layer = pooled_layer(photo(16, channels=1), 24)
    right = layer.truth
    assert certify(layer.problem, right, layer.x) is not None
    b, f, v = layer.problem.hidden.known.nonzero()[7].tolist()
    wrong = right.clone()
    wrong[b, f, v] = (right[b, f, v] + 1) % 4
    assert certify(layer.problem, wrong, layer.x) is None


def test_too_few_equations_are_not_certified_by_the_right_pattern() -> None:
    layer = pooled_layer(photo(16), 4)
    assert certify(layer.problem, layer.truth, layer.x) is None


def test_coordinate_descent_finds_the_positions_at_the_true_input() -> None:
    layer = pooled_layer(features(8, 8), 24, image=False)
    hidden = layer.problem.hidden
    known = hidden.known
    wrong = torch.where(torch.rand(known.shape) < 0.2, (layer.truth + 1) % 4, layer.truth)
    found = descend(layer.problem.front, hidden, layer.x, wrong, 0.05)
    before, after = ((p != layer.truth)[known].double().mean() for p in (wrong, found))
    assert after < 0.2 * before


def test_the_first_of_equal_outputs_is_the_position_as_in_torch() -> None:
    windows = Windows.create((4, 4), (2, 2), (2, 2), (0, 0), (1, 1))
    flat = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    _, index = F.max_pool2d(flat, 2, return_indices=True)
    rounded = flat + 1e-14 * torch.rand_like(flat)
    assert torch.equal(windows.first_largest(rounded.flatten(2)), index.flatten(2))


def test_overlapping_windows_leave_few_candidates() -> None:
    hidden = pooled_layer(photo(16, channels=1), 24, (3, 2, 1)).problem.hidden
    inside = hidden.windows.inside.expand_as(hidden.candidates)
    assert hidden.candidates[hidden.known].sum() < 0.6 * inside[hidden.known].sum()


def test_dense_and_iterative_solves_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pooled_layer(photo(12, channels=1), 24)
    reading: Reading = layer.problem.hidden.tight(layer.truth)
    weight = torch.ones(24, dtype=torch.float64)
    solver = WeightedSolver(layer.problem.front)
    dense = solver.solve(reading, [weight], 1e-2, None)
    monkeypatch.setattr("rconv_fast.patterns.least_squares.MAX_DENSE", 0)
    monkeypatch.setattr("rconv_fast.patterns.least_squares.ITERATIONS", 400)
    torch.testing.assert_close(solver.solve(reading, [weight], 1e-2, None), dense, rtol=1e-6, atol=1e-8)


def test_rows_through_a_map_are_the_rows_of_what_it_makes() -> None:
    layer = pooled_layer(photo(8, channels=1), 6)
    block = layer.problem.front.rows(layer.problem.hidden.tight(layer.truth), layer.x)[1]
    matrix = torch.randn(64, 5, dtype=torch.float64)
    constant = torch.randn_like(layer.x)
    to, back = (lambda v: (matrix @ v).view(1, 1, 8, 8)), (lambda y: matrix.mT @ y.flatten())
    rows = ThroughRows.create(block, torch.Size((5,)), to, back, constant)
    v, y = torch.randn(5, dtype=torch.float64), torch.randn_like(block.rhs)
    torch.testing.assert_close(rows.apply(v) - rows.rhs, block.apply(to(v) + constant) - block.rhs)
    torch.testing.assert_close((rows.apply(v) * y).sum(), (v * rows.adjoint(y)).sum())
    torch.testing.assert_close(rows.normal(), rows.scaled(2.0).normal() / 4)
    assert rows.count == block.count
    assert rows.to(torch.float32).apply(v.float()).dtype == torch.float32


def assert_columns_are_found(patches: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
    """Which filters are active on each patch, up to the order of the patches."""
    columns = (patches @ weight.T + bias > 0).T.astype(float)
    found, _ = find_columns(columns @ patches, columns.sum(1), weight, bias, len(patches), Budget.seconds(20))
    assert found is not None
    assert sorted(map(tuple, found.T)) == sorted(map(tuple, columns.T))


def test_columns_of_a_hidden_matrix_are_found_by_packing() -> None:
    rng = np.random.default_rng(3)
    n, filters, size = 9, 60, 12
    patches = rng.standard_normal((n, size))
    weight, bias = rng.standard_normal((filters, size)), 0.3 * rng.standard_normal(filters)
    assert_columns_are_found(patches, weight, bias)


def test_columns_are_found_where_neighbours_are_nearly_alike() -> None:
    rng = np.random.default_rng(3)
    n, filters, size = 16, 90, 40
    waves = np.cos(np.linspace(0, np.pi, n)[:, None] * np.arange(1, 2 * n)) / np.arange(1, 2 * n) ** 1.5
    patches = np.maximum(waves @ rng.standard_normal((2 * n - 1, size)), 0)
    weight, bias = rng.standard_normal((filters, size)) / size**0.5, 0.1 * rng.standard_normal(filters)
    assert_columns_are_found(patches, weight, bias)


def test_no_column_is_sought_where_products_depend_on_each_other() -> None:
    rng = np.random.default_rng(3)
    weight, bias, patches = rng.standard_normal((60, 12)), np.zeros(60), rng.standard_normal((9, 12))
    patches[8] = patches[7]
    columns = (patches @ weight.T + bias > 0).T.astype(float)
    assert rank_of(columns @ patches) == 8
    assert find_columns(columns @ patches, columns.sum(1), weight, bias, 9, Budget.seconds(20)) == (None, 0)


def test_overlapping_patches_are_put_in_their_places() -> None:
    geometry = ConvGeometry.create("test", 2, 1, (6, 6), 3, 2, 1)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1, stride=2)[0].mT.numpy()
    shuffled = np.random.default_rng(0).permutation(len(patches))
    assert np.array_equal(shuffled[arrange(geometry, patches[shuffled])], np.arange(len(patches)))

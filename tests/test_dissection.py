"""The nested-dissection factor of the weight constraints against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rconv_fast.errors import ArgumentError
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve.dissection import fronts, sweep, tree
from rconv_fast.solve.dissection.factor import DissectionFactor


def geometry(*args: object, **kwargs: object) -> ConvGeometry:
    return ConvGeometry.create("test", *args, **kwargs)  # type: ignore[arg-type]


TALL = {
    "square 5x5 stride 2": geometry(3, 12, (17, 13), 5, 2, 2),
    "one axis": geometry(2, 9, (70,), 3, 1, 1),
    "one axis, long kernel": geometry(1, 4, (90,), 9, 2, 11),
    "groups": geometry(4, 8, (9, 11), 3, 1, 1, 1, 2),
    "dilation": geometry(1, 4, (14, 15), 3, 1, 2, 2),
    "dilation and stride": geometry(1, 10, (13, 12), 3, 2, 3, 3),
    "padding above kernel": geometry(2, 9, (12, 9), 2, 1, 3),
    "three axes": geometry(1, 9, (8, 7, 6), 3, 2, 1),
    "oblong": geometry(2, 8, (6, 31), (1, 5), (1, 2), (0, 2)),
    "fully connected": geometry(20, 30, (1,), 1),
}
GAPPED = {
    "stride above kernel": geometry(3, 16, (13, 13), 2, 3),
    "leftover edge": geometry(1, 9, (10, 11), 3, 3),
    "dilation leaves a sublattice": geometry(1, 9, (15, 15), 3, 2, 0, 2),
}


def dense(g: ConvGeometry, weight: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """``diag(w) A``, column by column."""
    unit = torch.eye(g.in_channels * g.n_input, dtype=weight.dtype).reshape(-1, g.in_channels, *g.input_size)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[g.ndim]
    matrix = convolution(unit, weight, None, g.stride, g.padding, g.dilation, g.groups).flatten(1).T
    return matrix if row_weights is None else row_weights.reshape(-1, 1) * matrix


def random_weight(g: ConvGeometry) -> Tensor:
    return torch.rand(g.out_channels, g.in_channels // g.groups, *g.kernel_size, dtype=torch.float64) - 0.5


def random_rows(g: ConvGeometry, known: float) -> Tensor:
    rows = torch.rand(g.out_channels, *g.out_size, dtype=torch.float64) + 0.5
    return rows * (torch.rand(rows.shape) < known)


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def _forget_trees() -> None:
    tree.dissect.cache_clear()
    sweep.eliminated_in_order.cache_clear()


@pytest.fixture(autouse=True)
def _small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small pictures often enough to have a tree."""
    torch.manual_seed(0)
    monkeypatch.setattr(tree, "LEAF_UNKNOWNS", 20)
    _forget_trees()
    yield
    _forget_trees()


@pytest.mark.parametrize("g", (TALL | GAPPED).values(), ids=(TALL | GAPPED).keys())
def test_structure_each_row_and_each_unknown_once(g: ConvGeometry) -> None:
    kinds = tree.dissect(g)
    eliminated = np.concatenate([k.positions[:, : k.n_eliminated].ravel() for k in kinds])
    assert np.array_equal(np.sort(eliminated), np.arange(g.n_input))
    rows = np.concatenate([k.rows.ravel() for k in kinds])
    assert len(np.unique(rows)) == len(rows)
    # the rows left out lie in the padding
    empty = dense(g, random_weight(g)).reshape(g.out_channels, g.n_output, -1).abs().sum((0, 2)) == 0
    assert set(range(g.n_output)) - set(rows.tolist()) <= set(torch.nonzero(empty).flatten().tolist())


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "row weights"])
@pytest.mark.parametrize("g", TALL.values(), ids=TALL.keys())
def test_normal_matrix(g: ConvGeometry, weighted: bool, damping: float) -> None:
    weight, rows = random_weight(g), random_rows(g, 1.0) if weighted else None
    factor = DissectionFactor.factor(g, weight, rows, damping=damping)
    matrix = dense(g, weight, rows)
    normal = matrix.T @ matrix + damping * torch.eye(matrix.shape[1], dtype=torch.float64)
    v = torch.randn(g.in_channels, *g.input_size, dtype=torch.float64)
    x = factor.solve_normal(v)
    assert x.shape == v.shape
    assert relative(normal @ x.flatten(), v.flatten()) < 1e-9
    assert relative(x.flatten(), torch.linalg.solve(normal, v.flatten())) < 1e-8
    assert factor.rank_estimate == matrix.shape[1]


@pytest.mark.parametrize("g", TALL.values(), ids=TALL.keys())
def test_halves_of_the_solve(g: ConvGeometry) -> None:
    factor = DissectionFactor.factor(g, random_weight(g))
    v, w = torch.randn(2, g.in_channels * g.n_input, dtype=torch.float64)
    assert relative(factor.solve_r(factor.solve_rt(v)).flatten(), factor.solve_normal(v)) < 1e-14
    # <R^-1 v, w> = <v, R^-T w>
    assert torch.allclose(factor.solve_r(v).flatten() @ w, v @ factor.solve_rt(w), rtol=1e-10)


@pytest.mark.parametrize("g", TALL.values(), ids=TALL.keys())
def test_some_rows_unknown(g: ConvGeometry) -> None:
    weight, rows = random_weight(g), random_rows(g, 0.5)
    factor = DissectionFactor.factor(g, weight, rows, damping=0.01)
    matrix = dense(g, weight, rows)
    normal = matrix.T @ matrix + 0.01 * torch.eye(matrix.shape[1], dtype=torch.float64)
    v = torch.randn(matrix.shape[1], dtype=torch.float64)
    assert relative(factor.solve_normal(v), torch.linalg.solve(normal, v)) < 1e-10


@pytest.mark.parametrize("g", TALL.values(), ids=TALL.keys())
def test_missing_rows_are_reported(g: ConvGeometry) -> None:
    weight, rows = random_weight(g), random_rows(g, 0.5)
    factor = DissectionFactor.factor(g, weight, rows)
    matrix = dense(g, weight, rows)
    deficient = int(torch.linalg.matrix_rank(matrix)) < int((matrix != 0).any(0).sum())
    assert factor.is_singular == deficient
    if deficient:
        assert factor.rank_estimate < matrix.shape[1] - factor.n_untouched
        with pytest.raises(torch.linalg.LinAlgError, match="factor with damping > 0"):
            factor.solve_normal(torch.ones(matrix.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("g", GAPPED.values(), ids=GAPPED.keys())
def test_untouched_unknowns_stay_zero(g: ConvGeometry) -> None:
    weight = random_weight(g)
    matrix = dense(g, weight)
    truth = torch.randn(matrix.shape[1], dtype=torch.float64)
    factor = DissectionFactor.factor(g, weight)
    touched = (matrix != 0).any(0)
    assert factor.n_untouched == int((~touched).sum()) > 0
    assert factor.rank_estimate == int(touched.sum())
    x = factor.solve_normal(matrix.T @ (matrix @ truth))
    assert x[~touched].abs().max() < 1e-15
    assert relative(x[touched], truth[touched]) < 1e-9


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "row weights"])
def test_many_vectors_at_once(weighted: bool) -> None:
    g = TALL["groups"]
    factor = DissectionFactor.factor(g, random_weight(g), random_rows(g, 1.0) if weighted else None)
    v = torch.randn(5, g.in_channels, *g.input_size, dtype=torch.float64)
    y = factor.solve_rt(v)
    assert relative(y, torch.stack([factor.solve_rt(single) for single in v], dim=1)) < 1e-13
    assert relative(factor.solve_r(y), torch.stack([factor.solve_r(single) for single in y.unbind(1)])) < 1e-13
    assert relative(factor.solve_normal(v), factor.solve_r(y)) < 1e-14


def test_least_squares_as_lstsq() -> None:
    g = TALL["square 5x5 stride 2"]
    weight, rows = random_weight(g), random_rows(g, 1.0)
    matrix, rhs = dense(g, weight, rows), torch.randn(g.out_channels * g.n_output, dtype=torch.float64)
    factor = DissectionFactor.factor(g, weight, rows)
    x = factor.solve_normal(matrix.T @ rhs)
    x = x + factor.solve_normal(matrix.T @ (rhs - matrix @ x))
    assert relative(x, torch.linalg.lstsq(matrix, rhs[:, None]).solution[:, 0]) < 1e-10


def test_triangle_as_dense_qr() -> None:
    g = TALL["dilation"]
    weight = random_weight(g)
    matrix = dense(g, weight)
    order = np.concatenate([k.positions[:, : k.n_eliminated].ravel() for k in tree.dissect(g) if k.n_fronts])
    factor = DissectionFactor.factor(g, weight, torch.ones(g.out_channels, *g.out_size))
    # any topological order of the tree has the same diagonal
    dense_r = torch.linalg.qr(matrix[:, order], mode="r").R
    assert torch.allclose(factor._diagonal, dense_r.diagonal().abs(), rtol=1e-10)


def test_square_system_with_condition_1e6() -> None:
    g = geometry(3, 12, (32, 32), 5, 2, 2)
    weight, truth = random_weight(g), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    outputs = F.conv2d(truth, weight, None, 2, 2)
    factor = DissectionFactor.factor(g, weight)
    x = torch.zeros_like(truth)
    for _ in range(3):
        residual = outputs - F.conv2d(x, weight, None, 2, 2)
        step = F.conv_transpose2d(residual, weight, None, 2, 2, output_padding=1)
        x = x + factor.solve_normal(step[0])
    assert float((x - truth).abs().max()) < 1e-9


def test_translated_fronts_share_their_factor() -> None:
    g = geometry(1, 6, (64, 64), 3, 2, 1)
    weight = random_weight(g)
    shared = DissectionFactor.factor(g, weight)
    single = DissectionFactor.factor(g, weight, torch.ones(g.out_channels, *g.out_size))
    assert shared.memory_bytes < single.memory_bytes / 2
    v = torch.randn(1, 64, 64, dtype=torch.float64)
    assert relative(shared.solve_normal(v), single.solve_normal(v)) < 1e-12


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_batches_do_not_change_the_factor(monkeypatch: pytest.MonkeyPatch, damping: float) -> None:
    g = TALL["groups"]
    weight, rows = random_weight(g), random_rows(g, 0.9)
    v = torch.randn(g.in_channels, *g.input_size, dtype=torch.float64)
    together = DissectionFactor.factor(g, weight, rows, damping=damping).solve_normal(v)
    monkeypatch.setattr(fronts, "BATCH_BYTES", 1)
    assert relative(DissectionFactor.factor(g, weight, rows, damping=damping).solve_normal(v), together) < 1e-12


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "row weights"])
def test_estimate_counts_the_bytes(weighted: bool) -> None:
    g = TALL["square 5x5 stride 2"]
    rows = torch.ones(g.out_channels, *g.out_size) if weighted else None
    factor = DissectionFactor.factor(g, random_weight(g), rows)
    n_bytes, flops = DissectionFactor.estimate(g, row_weights=weighted)
    assert factor.memory_bytes == n_bytes
    assert flops > 0


def test_float32_factor_for_float64_vectors() -> None:
    g = TALL["groups"]
    weight = random_weight(g)
    factor = DissectionFactor.factor(g, weight, dtype=torch.float32)
    v = torch.randn(g.in_channels, *g.input_size, dtype=torch.float64)
    x = factor.solve_normal(v)
    assert x.dtype == torch.float64
    assert relative(x, DissectionFactor.factor(g, weight).solve_normal(v)) < 1e-4


def test_damping_below_rounding_says_so() -> None:
    g = geometry(2, 2, (16, 16), 3, 2, 1)
    with pytest.raises(torch.linalg.LinAlgError, match="damping must exceed"):
        DissectionFactor.factor(g, random_weight(g), damping=1e-30)


def test_arguments() -> None:
    g = TALL["groups"]
    weight = random_weight(g)
    with pytest.raises(ArgumentError, match=r"factor: weight must have shape \(8, 2, 3, 3\), got \(8, 1, 3, 3\)"):
        DissectionFactor.factor(g, weight[:, :1])
    with pytest.raises(ArgumentError, match="factor: row_weights must have shape"):
        DissectionFactor.factor(g, weight, torch.ones(3))
    with pytest.raises(ArgumentError, match="factor: damping must be >= 0"):
        DissectionFactor.factor(g, weight, damping=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_geometry(seed: int) -> None:
    generator = np.random.default_rng(seed)
    ndim = int(generator.integers(1, 4))
    groups, channels = (int(n) for n in generator.integers(1, 3, 2))
    kernel, stride, dilation = (generator.integers(1, 4, ndim) for _ in range(3))
    padding = generator.integers(0, 5, ndim)
    size = generator.integers(7, {1: 80, 2: 16, 3: 10}[ndim], ndim)
    g = geometry(
        groups * channels,
        groups * int(generator.integers(1, 12)),
        size,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )
    torch.manual_seed(seed)
    weight, rows = random_weight(g), random_rows(g, float(generator.uniform(0.3, 1)))
    factor = DissectionFactor.factor(g, weight, rows, damping=0.01)
    matrix = dense(g, weight, rows)
    normal = matrix.T @ matrix + 0.01 * torch.eye(matrix.shape[1], dtype=torch.float64)
    v = torch.randn(matrix.shape[1], dtype=torch.float64)
    assert relative(factor.solve_normal(v), torch.linalg.solve(normal, v)) < 1e-9
    undamped = DissectionFactor.factor(g, weight, rows)
    assert undamped.n_untouched == int((matrix == 0).all(0).sum())
    if not undamped.is_singular and undamped.condition_estimate < 1e4:
        x = undamped.solve_normal(matrix.T @ (matrix @ v))
        assert relative(matrix @ x, matrix @ v) < 1e-8

"""Non-negativity completes the equations where it can, and only says so where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from rconv_fast.solve import Evidence, MapRows, Solution, System, nonnegative, solve, solve_nonnegative
from rconv_fast.solve.nonnegative import certificate, has_full_rank
from rconv_fast.solve.rows import balance

TOLERANCE = 1e-9


def linear(matrix: list[list[float]] | Tensor, x: Tensor) -> System:
    """The system ``matrix x = matrix x_true`` as matrix-free rows."""
    m = torch.as_tensor(matrix, dtype=torch.float64)
    forward: Callable[[Tensor], Tensor] = lambda v: m @ v.reshape(-1)  # noqa: E731
    value = forward(x)
    return System(x.shape, (MapRows.create(forward, x.shape, value, torch.ones_like(value)),))


def sparse_values(n: int, share: float = 0.5) -> Tensor:
    x = torch.rand(1, 1, n, dtype=torch.float64) + 0.1
    return x * (torch.rand(1, 1, n) > share)


@pytest.mark.parametrize("open_directions", [1, 12, 50])
def test_zeros_fix_what_the_equations_leave_open(open_directions: int) -> None:
    n = 300
    x = sparse_values(n)
    system = linear(torch.randn(n - open_directions, n, dtype=torch.float64), x)
    start = solve(system)
    assert not bool(start.determined.all())
    found = solve_nonnegative(system, start, tolerance=TOLERANCE)
    assert bool(found.determined.all())
    assert found.residual < 1e-12
    assert float((found.x - x).abs().max()) < 1e-9
    assert torch.equal(found.x == 0, x == 0)
    assert found.proof == "nonnegative"


@pytest.mark.parametrize("rows", [60, 100])
def test_many_solutions_are_not_called_determined(rows: int) -> None:
    n = 300
    x = sparse_values(n)
    system = linear(torch.randn(rows, n, dtype=torch.float64), x)
    start = solve(system)
    found = solve_nonnegative(system, start, tolerance=TOLERANCE)
    assert torch.equal(found.determined, start.determined)
    if found is not start:
        assert found.residual < TOLERANCE
        assert float(found.x.min()) > -1e-9


def test_no_nonnegative_solution_leaves_the_start() -> None:
    n = 80
    x = torch.rand(1, 1, n, dtype=torch.float64) - 0.5
    system = linear(torch.randn(n - 2, n, dtype=torch.float64), x)
    start = solve(system)
    assert solve_nonnegative(system, start, tolerance=TOLERANCE) is start


@pytest.mark.parametrize(
    ("matrix", "values", "unique"),
    [
        ([[1, -1]], [1, 0], False),  # the ray (1, 1)
        ([[1, 1]], [1, 0], False),  # the edge from (1, 0) to (0, 1)
        ([[1, 0, 0], [0, 1, 1]], [1, 0, 0], True),  # x2 + x3 = 0
        ([[1, 0, 0], [0, 1, -1]], [1, 0, 0], False),  # x2 = x3 may grow
        ([[1, 0, 0], [0, 1, 0]], [1, 1, 0], False),  # nothing holds x3
        ([[1, 2, 0], [0, 0, 1]], [1, 1, 0], False),  # x3 = 0, but x1 + 2 x2 stays open
        ([[2, 1, 0], [0, 1, 0], [0, 1, 3]], [1, 2, 3], True),  # no zeros, full rank
    ],
)
def test_certificate_of_small_polytopes(matrix: list[list[float]], values: list[float], unique: bool) -> None:
    x = torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)
    system = balance(linear(matrix, x), 1.0)
    proof = certificate(system, x > 0)
    assert (proof is not None and has_full_rank(system, x > 0)) == unique
    found = solve_nonnegative(linear(matrix, x), _open(x), tolerance=TOLERANCE)
    assert bool(found.determined.all()) == unique


def _open(x: Tensor) -> Solution:
    """A start at the answer, of which nothing is determined."""
    nothing = torch.zeros(x.shape, dtype=torch.bool)
    return Solution(x, nothing, Evidence(0, x.numel(), 0, 0.0, 1.0, "start", "none"))


def test_certificate_is_a_combination_of_rows() -> None:
    n = 200
    x = sparse_values(n)
    m = torch.randn(n - 20, n, dtype=torch.float64)
    w = certificate(balance(linear(m, x), 1.0), x > 0)
    assert w is not None
    w = w.reshape(-1)
    zero = x.reshape(-1) == 0
    assert float(w[zero].min()) > 0
    assert float(w[~zero].abs().max()) < 1e-6
    y = torch.linalg.lstsq(m.mT, w[:, None]).solution
    assert torch.allclose(m.mT @ y, w[:, None], atol=1e-8)


def lenet_o(seed: int) -> nn.Sequential:
    """The authors' LeNet-O with ReLU in its last layers; with some seeds filters of the last layer die."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(12, 16, 5, 2, 2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 12, 5, 1, 2),
        nn.ReLU(),
        nn.Conv2d(12, 3, 5, 1, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 100),
    )
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return model.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_invert_through_a_rank_deficient_layer(dtype: torch.dtype) -> None:
    image = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None, :, :200, :200].double() / 255
    x = F.interpolate(image, size=(32, 32), mode="area")
    model = lenet_o(2).to(dtype)
    loss = F.cross_entropy(model(x.to(dtype)), torch.tensor([1]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    found = rconv_fast.invert(model, gradients, (3, 32, 32))
    last = found.layers[0]
    assert last.rank < last.unknowns  # the equations alone leave the last convolution's input open
    assert last.proof == "nonnegative"
    assert any("x >= 0" in note for note in found.notes)
    assert found.verified
    psnr = -10 * float((found.inputs.double() - x).square().mean().log10())
    assert psnr > (200 if dtype == torch.float64 else 90)


def test_the_normal_matrix_of_a_sum() -> None:
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    row = nonnegative.SumRow((x > 0).to(x), x.new_ones(1))
    units = torch.eye(6, dtype=x.dtype).view(6, 2, 1, 3)
    matrix = torch.stack([row.apply(unit) for unit in units], dim=1)
    torch.testing.assert_close(row.normal(), matrix.mT @ matrix)

"""Sketches of equations, and the factor of weight rows with a sketch, against dense matrices."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from layers import random_grad_output, random_input, random_weight
from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import GradientRows, PointRows, System, WeightRows, preconditioners, solve
from rconv_fast.solve.dissection.border import is_square, open_directions
from rconv_fast.solve.dissection.sketch import SketchRows, sketch_size
from rconv_fast.solve.preconditioners import SketchedDissection
from rconv_fast.solve.rows import balance
from rconv_fast.testing import geometry as make
from rconv_fast.testing import random_geometry

DOUBLE = {"dtype": torch.float64}
GEOMETRIES = {
    "square 5x5 stride 2": make((3, 12), (12, 12), 5, stride=2, padding=2),
    "groups": make((4, 32), (7, 6), 3, groups=2, padding=1),
    "1-D": make((2, 6), (15,), 3, padding=1),
    "3-D": make((1, 9), (4, 5, 6), 3, stride=(1, 2, 1), padding=1),
}


def rows_of(g: ConvGeometry, batch: int, share: float = 1.0) -> tuple[Tensor, GradientRows, WeightRows]:
    x, weight, grad = (
        random_input(g, batch, **DOUBLE),
        random_weight(g, **DOUBLE),
        random_grad_output(g, batch, **DOUBLE),
    )
    known = (torch.rand_like(grad) < share).double()
    gradient = GradientRows.create(g, apply_gradient(g, x, grad), grad)
    return x, gradient, WeightRows.create(g, weight, apply_weight(g, x, weight), known)


def matrix_of(system: System) -> Tensor:
    unit = torch.eye(system.unknowns, **DOUBLE).reshape(-1, *system.shape)
    return torch.stack([torch.cat([part.flatten() for part in system.apply(e)]) for e in unit], dim=1)


def test_many_adjoints_at_once_are_single_ones() -> None:
    generator = random.Random(5)
    for _ in range(40):
        g = random_geometry(generator)
        _, gradient, _ = rows_of(g, 2)
        y = torch.randn(3, *gradient.rhs.shape, **DOUBLE)
        together = gradient.adjoints(y)
        for one, single in zip(together, y, strict=True):
            assert torch.allclose(one, gradient.adjoint(single), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_a_sketch_holds_for_the_solution_and_has_its_adjoint(g: ConvGeometry) -> None:
    x, gradient, _ = rows_of(g, 2)
    points = PointRows.create(x, torch.ones_like(x))
    sketch = SketchRows.create([gradient, points], 11, x.shape, x)
    assert sketch.count == 11
    assert torch.allclose(sketch.apply(x), sketch.rhs, rtol=1e-10)
    y = torch.randn_like(sketch.rhs)
    assert torch.allclose(torch.sum(sketch.adjoint(y) * x), y @ sketch.apply(x), rtol=1e-10)
    dense = matrix_of(System(x.shape, (sketch,)))
    assert torch.allclose(dense.square().sum(0), sketch.diagonal().flatten())
    assert torch.allclose(dense.mT @ dense, sketch.normal())


def test_no_more_combinations_than_rows() -> None:
    x, gradient, _ = rows_of(make((1, 2), (20, 20), 2), 1)
    assert SketchRows.create([gradient], 20, x.shape, x).count == gradient.count == 8


@pytest.mark.parametrize("share", [1.0, 0.95])
@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_the_preconditioner_inverts_its_system(g: ConvGeometry, share: float) -> None:
    _, gradient, outputs = rows_of(g, 2, share)
    system = balance(System((2, g.in_channels, *g.input_size), (gradient, outputs)), 1.0)
    preconditioner = SketchedDissection.create(system)
    matrix = matrix_of(preconditioner.system)
    v = torch.randn(system.shape, **DOUBLE)
    product = preconditioner((matrix.T @ (matrix @ v.flatten())).reshape(v.shape))
    assert float((product - v).norm() / v.norm()) < 0.1, "float32 factors, damping and one application"


def test_a_sketch_solved_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gradient, outputs = rows_of(GEOMETRIES["square 5x5 stride 2"], 2)
    system = balance(System(torch.Size((2, 3, 12, 12)), (gradient, outputs)), 1.0)
    whole = SketchedDissection.create(system).z
    monkeypatch.setattr(preconditioners, "TOGETHER", 5)
    assert whole.shape[0] == 864
    assert whole.shape[1] > 5
    assert torch.allclose(SketchedDissection.create(system).z, whole, rtol=1e-10, atol=1e-12)


def test_weight_rows_that_are_singular_are_completed_by_the_sketch() -> None:
    g = GEOMETRIES["square 5x5 stride 2"]
    x, gradient, outputs = rows_of(g, 1)
    weight = outputs.weight.clone()
    weight[-1] = weight[0]  # 36 of 432 equations say the same as others
    repeated = WeightRows.create(g, weight, apply_weight(g, x, weight), torch.ones_like(outputs.rhs))
    system = balance(System(x.shape, (gradient, repeated)), 1.0)
    preconditioner = SketchedDissection.create(system)
    assert preconditioner is not None
    assert preconditioner.factors[0].condition_estimate < 1e6, "damped"
    found = solve(System(x.shape, (gradient, repeated)), solver="hybrid")
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-9


def test_rows_that_are_few_are_taken_as_they_are() -> None:
    """The filters of such a layer can leave more directions nearly open at the border than a sketch would have."""
    g = make((1, 4), (20, 20), 3, stride=2, padding=1)
    x, gradient, outputs = rows_of(g, 1)
    assert gradient.count == 36 <= 2 * sketch_size(outputs)
    system = balance(System(x.shape, (gradient, outputs)), 1.0)
    preconditioner = SketchedDissection.create(system)
    assert [type(block) for block in preconditioner.system.blocks] == [GradientRows, WeightRows]
    assert preconditioner.z.shape == (400, 36)
    matrix = matrix_of(preconditioner.system)
    v = torch.randn(system.shape, **DOUBLE)
    product = preconditioner((matrix.T @ (matrix @ v.flatten())).reshape(v.shape))
    assert float((product - v).norm() / v.norm()) < 1e-3
    found = solve(System(x.shape, (gradient, outputs)), solver="hybrid")
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-9


@pytest.mark.parametrize("numbers", [(1, 4, 3, 2, 1, 24), (3, 12, 5, 2, 2, 16), (1, 1, 3, 1, 1, 20)], ids=str)
def test_the_winding_of_the_symbol_counts_what_a_square_convolution_leaves_open(numbers: tuple[int, ...]) -> None:
    channels, filters, kernel, stride, padding, size = numbers
    g = make((channels, filters), (size, size), kernel, stride=stride, padding=padding)
    assert is_square(g)
    for seed in range(3):
        torch.manual_seed(seed)
        weight = torch.nn.Conv2d(channels, filters, kernel).double().weight.detach()
        units = torch.eye(channels * size**2, **DOUBLE).view(-1, channels, size, size)
        singular = torch.linalg.svdvals(apply_weight(g, units, weight).flatten(1))
        nearly_open = int((singular < 1e-3 * singular[0]).sum())
        assert nearly_open <= open_directions(g, weight) < len(singular) / 3


def test_a_convolution_that_leaves_nothing_open_has_no_winding() -> None:
    g = make((2, 2), (30, 31), 3, padding=1)
    weight = 0.1 * torch.randn(2, 2, 3, 3, **DOUBLE)
    weight[:, :, 1, 1] += torch.eye(2, **DOUBLE)
    assert open_directions(g, weight) == 0
    weight = weight.roll(1, 3)  # looks at its left neighbour: the first column's equations are lost, two filters' each
    assert open_directions(g, weight) == 2 * 30


def test_weight_rows_alone_need_no_sketch() -> None:
    """A layer whose own gradient is not shared has no other equations."""
    x, _, outputs = rows_of(GEOMETRIES["square 5x5 stride 2"], 2)
    for system in (
        System(x.shape, (outputs,)),
        System(
            x.shape,
            (WeightRows.create(outputs.geometry, outputs.weight, outputs.rhs, torch.rand_like(outputs.rhs) + 0.5),),
        ),
    ):
        preconditioner = SketchedDissection.create(balance(system, 1.0))
        assert preconditioner is not None
        assert len(preconditioner.system.blocks) == 1
    found = solve(System(x.shape, (outputs,)), solver="hybrid")
    assert float((found.x - x).abs().max()) < 1e-9


def test_the_estimate_and_the_factor_agree_on_what_is_shared() -> None:
    _, _, outputs = rows_of(GEOMETRIES["square 5x5 stride 2"], 2)
    assert outputs.uniform
    for changed in (0.5, 0.0):
        weight = outputs.row_weight.clone()
        weight[1, 0, 0, 0] = changed
        unlike = WeightRows.create(outputs.geometry, outputs.weight, outputs.rhs, weight)
        assert not unlike.uniform
        system = balance(System(torch.Size((2, 3, 12, 12)), (unlike,)), 1.0)
        preconditioner = SketchedDissection.create(system)
        assert preconditioner is None or len(preconditioner.factors) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_square_first_layer_is_solved_and_proven_by_the_dissection_alone(seed: int) -> None:
    torch.manual_seed(seed)
    g = make((3, 12), (32, 32), 5, stride=2, padding=2)
    x, weight = torch.rand(1, 3, 32, 32, **DOUBLE), torch.rand(12, 3, 5, 5, **DOUBLE) - 0.5
    grad, output = torch.randn(1, 12, 16, 16, **DOUBLE), apply_weight(g, x, weight)
    gradient = GradientRows.create(g, apply_gradient(g, x, grad), grad)
    system = System(x.shape, (gradient, WeightRows.create(g, weight, output, torch.ones_like(output))))
    found = solve(system, rtol=1e-15)
    assert found.solver == "cgls+dissection"
    assert found.proof == "cholesky"
    assert found.iterations <= 12
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-10


def test_a_sketch_that_leaves_equations_unsatisfied_is_no_answer() -> None:
    """More filters repeat each other than a sketch has rows: gradient rows close the gap, all of them."""
    torch.manual_seed(0)
    g = make((2, 8), (16, 16), 4, stride=2, padding=1)
    x, weight = torch.rand(1, 2, 16, 16, **DOUBLE), torch.randn(8, 2, 4, 4, **DOUBLE)
    weight[-1] = weight[0]
    grad, output = torch.randn(1, 8, 8, 8, **DOUBLE), apply_weight(g, x, weight)
    gradient = GradientRows.create(g, apply_gradient(g, x, grad), grad)
    system = System(x.shape, (gradient, WeightRows.create(g, weight, output, torch.ones_like(output))))
    assert gradient.count > 64
    found = solve(system, solver="hybrid", rtol=1e-14)
    assert found.residual < 1e-11
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "options"),
    [
        ((2, 3), (7, 9), 3, {"stride": 2, "padding": 1}),
        ((4, 6), (8, 8), 3, {"padding": 2, "dilation": 2, "groups": 2}),
        ((2, 2), (11,), 5, {"stride": 3, "padding": 2}),
        ((1, 2), (5, 4, 6), 2, {"stride": 2}),
    ],
    ids=str,
)
def test_rows_written_out_are_the_rows(channels: tuple, size: tuple, kernel: int, options: dict) -> None:
    g = make(channels, size, kernel, **options)
    shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    block = GradientRows(g, torch.randn(2, g.out_channels, *g.out_size, **DOUBLE), torch.zeros(shape, **DOUBLE))
    n = block.rhs.numel()
    units = torch.eye(n, **DOUBLE).view(n, *shape)
    torch.testing.assert_close(block.dense(0, n), torch.stack([block.adjoint(unit) for unit in units]))
    torch.testing.assert_close(block.dense(1, 3), block.dense(0, n)[1:3])

"""A system by its stride phases: the small matrices it falls apart into, and their factors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from layers import gradient_matrix
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import (
    MapRows,
    PointRows,
    System,
    solve,
)
from rconv_fast.solve.phases import factors
from rconv_fast.solve.phases.factors import GramFactor
from rconv_fast.solve.phases.gram import group_filters, output_gram, phase_gram, phase_rows
from rconv_fast.solve.phases.solve import count_phases, solve_by_phases
from rconv_fast.testing import geometry as make
from rconv_fast.testing import random_geometry
from systems import DOUBLE, RTOL, Case, assert_same_answer, dense, reference


def phase_columns(geometry: ConvGeometry, index: int, batch: int) -> Tensor:
    """Columns (b, i) of the gradient-constraint matrix that belong to one phase."""
    mask = torch.zeros(geometry.input_size, dtype=torch.bool)
    mask[torch.meshgrid(*(torch.tensor(p) for p in geometry.phases[index].positions), indexing="ij")] = True
    return mask.reshape(-1).repeat(batch).nonzero().flatten()


def test_phase_gram_is_that_of_the_matrix(geometry: ConvGeometry) -> None:
    batch = 2
    case = Case(geometry, batch)
    filters = geometry.out_channels // geometry.groups
    matrix = gradient_matrix(geometry, case.g).to_dense().reshape(geometry.groups, -1, batch * geometry.n_input)
    seen = []
    for group in range(geometry.groups):
        gram = matrix[group].mT @ matrix[group]
        rest = gram.clone()
        g = group_filters(geometry, case.g, group)
        assert g.shape[1] == filters
        for index, phase in enumerate(geometry.phases):
            columns = phase_columns(geometry, index, batch)
            expected = gram[columns][:, columns]
            torch.testing.assert_close(phase_gram(geometry, phase, output_gram(g)), expected)
            rows = phase_rows(geometry, phase, g)
            torch.testing.assert_close(rows.mT @ rows, expected)
            rest[columns[:, None], columns] = 0
            seen.append(columns)
        assert not rest.any(), "nothing couples two phases"
    per_group = torch.cat(seen[: len(geometry.phases)])
    assert torch.equal(per_group.sort().values, torch.arange(batch * geometry.n_input)), "phases cover all"


def test_gram_factor_is_the_inverse(geometry: ConvGeometry) -> None:
    case = Case(geometry, 2)
    shift = torch.rand(case.x.shape, **DOUBLE)
    per_group = geometry.in_channels // geometry.groups
    shift = shift.reshape(2, geometry.groups, per_group, -1).mean(2, keepdim=True).expand(-1, -1, per_group, -1)
    shift = shift.reshape(case.x.shape) + 0.1
    factor = GramFactor.create([(geometry, case.gradient.grad_output)], shift)
    assert factor is not None
    product = case.gradient.adjoint(case.gradient.apply(case.x)) + shift * case.x
    torch.testing.assert_close(factor.solve(product), case.x, rtol=1e-9, atol=1e-9)


def test_normal_matrices_and_their_diagonals(geometry: ConvGeometry) -> None:
    case = Case(geometry, 2, live=0.7)
    points = PointRows.create(case.x, torch.rand_like(case.x))
    for block in (case.gradient, case.outputs, case.outputs.scaled(3.0), case.gradient.scaled(0.5), points):
        matrix, _ = dense(case.system(block))
        normal = matrix.mT @ matrix
        torch.testing.assert_close(block.normal(), normal)
        torch.testing.assert_close(block.diagonal().expand(case.x.shape), normal.diagonal().reshape(case.x.shape))


def test_the_normal_matrix_of_a_map() -> None:
    x = torch.randn(2, 3, 6, **DOUBLE)
    weight = torch.rand(2, 3, 3, **DOUBLE)
    block = MapRows.create(lambda x: torch.nn.functional.avg_pool1d(x, 2), x.shape, weight, weight)
    matrix, _ = dense(System(x.shape, (block,)))
    torch.testing.assert_close(block.normal(), matrix.mT @ matrix)


def check_phases(case: Case) -> int:
    solution = solve_by_phases(case.gradient, case.x.shape, RTOL)
    system = case.system(case.gradient)
    expected = reference(system)
    assert solution.rank == expected.rank
    assert (solution.unknowns, solution.rows) == (case.x.numel(), case.gradient.count)
    assert_same_answer(solution, case, expected)
    assert solution.residual < 1e-12
    return expected.rank - case.x.numel()


def test_solution_by_phases_is_the_minimum_norm_one(geometry: ConvGeometry) -> None:
    check_phases(Case(geometry, 2))


def test_solution_by_phases_of_random_geometries() -> None:
    generator = random.Random(1)
    deficits = []
    while len(deficits) < 40:
        geometry = random_geometry(generator, largest=6)
        if geometry.n_input * geometry.in_channels <= 150:
            deficits.append(check_phases(Case(geometry, generator.randint(1, 2), live=0.8)))
    assert deficits.count(0) > 3, "some of full rank"
    assert sum(deficit < 0 for deficit in deficits) > 10, "some not"


@pytest.mark.parametrize("stack_bytes", [0, 2**27])
def test_one_phase_of_a_stack_may_be_singular(stack_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four phases of 16 positions; half of the filters repeat others, which is too much for the one with one offset."""
    monkeypatch.setattr(factors, "STACK_BYTES", stack_bytes)
    case = Case(make((3, 16), (8, 8), 3, stride=2, padding=1), 1)
    case.g[:, 8:] = case.g[:, :8]
    solution = solve_by_phases(case.gradient, case.x.shape, RTOL)
    expected = reference(case.system(case.gradient))
    assert solution.rank == expected.rank == 3 * (64 - 8)
    assert solution.solver == "phase-svd"
    assert int(solution.determined.sum()) == 3 * 48
    assert_same_answer(solution, case, expected)


def test_filters_without_gradient_count_for_nothing() -> None:
    case = Case(make((2, 9), (5, 5), 3, padding=1))
    case.g[:, 4:] = 0
    assert case.gradient.count == 4 * 9 * 2
    assert [count.rows for count in count_phases(case.gradient)] == [36]
    assert check_phases(case) == 0


@pytest.mark.parametrize(("filters", "full"), [(128, False), (256, True)])
def test_the_papers_count_is_not_enough_with_a_stride(filters: int, full: bool) -> None:
    """K=3, s=2, 28x28: 9 * 128 = 1152 equations for 784 pixels, but 128 for the 196 pixels of one phase."""
    case = Case(make((1, filters), (28, 28), 3, stride=2, padding=1))
    assert 9 * filters >= 784, "recoverable by the papers' count"
    counts = {(count.rows // filters, count.unknowns): count.rows for count in count_phases(case.gradient)}
    assert counts == {(1, 196): filters, (2, 196): 2 * filters, (4, 196): 4 * filters}
    solution = solve(case.system(case.gradient))
    even = torch.zeros(28, 28, dtype=torch.bool)
    even[::2, ::2] = True
    if full:
        assert solution.rank == 784
        assert solution.determined.all()
        assert float((solution.x - case.x).abs().max()) < 1e-11
    else:
        assert solution.rank == 784 - 196 + 128
        assert torch.equal(solution.determined[0, 0], ~even)
        assert float((solution.x - case.x)[0, 0][~even].abs().max()) < 1e-11
        assert float((solution.x - case.x)[0, 0][even].abs().max()) > 0.1

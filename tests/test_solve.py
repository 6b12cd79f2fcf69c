"""The solvers against dense linear algebra: values, rank, and exactly which values are determined."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layers import gradient_matrix, random_grad_output, random_input, random_weight
from rconv_fast.budget import Budget
from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import (
    GradientRows,
    MapRows,
    PointRows,
    Rows,
    System,
    WeightRows,
    hybrid,
    plan,
    precision,
    solve,
    solve_nonnegative,
)
from rconv_fast.solve.deflated import DeflatedInverse
from rconv_fast.solve.dense import PseudoInverse
from rconv_fast.solve.dissection.sketch import SketchRows
from rconv_fast.solve.krylov import refine
from rconv_fast.solve.phases import factors
from rconv_fast.solve.phases.factors import GramFactor
from rconv_fast.solve.phases.gram import group_filters, output_gram, phase_gram, phase_rows
from rconv_fast.solve.phases.solve import count_phases, solve_by_phases
from rconv_fast.solve.preconditioners import (
    MAX_INVERTED_CONDITION,
    SketchedDissection,
    jacobi,
    normal_inverse,
    phase_cholesky,
)
from rconv_fast.solve.rows import balance
from rconv_fast.testing import geometry as make
from rconv_fast.testing import random_geometry

DOUBLE = {"dtype": torch.float64}
RTOL = 1e-13
# Singular values of the random systems below are either above 1e-6 or rounding of the largest.
RANK_TOLERANCE = 1e-9


class Case:
    """An input x, and the equations that one convolution's gradients and outputs are for it."""

    def __init__(self, geometry: ConvGeometry, batch: int = 1, live: float = 1.0) -> None:
        self.geometry = geometry
        self.x = random_input(geometry, batch, **DOUBLE)
        self.weight = random_weight(geometry, **DOUBLE)
        self.g = random_grad_output(geometry, batch, **DOUBLE)
        self.g = self.g * (torch.rand_like(self.g) < live)
        self.known = torch.rand_like(self.g) < live

    @property
    def gradient(self) -> GradientRows:
        return GradientRows.create(self.geometry, apply_gradient(self.geometry, self.x, self.g), self.g)

    @property
    def outputs(self) -> WeightRows:
        output = apply_weight(self.geometry, self.x, self.weight)
        nan = torch.where(self.known, output, torch.nan)  # values that are not known must not be read
        return WeightRows.create(self.geometry, self.weight, nan, self.known.double())

    def system(self, *blocks: Rows) -> System:
        return System(self.x.shape, blocks or (self.gradient, self.outputs))


def half_blind(case: Case) -> Case:
    """Nothing is known of the right half of the outputs, and they pass no gradient."""
    half = case.g.shape[-1] // 2
    case.g[..., half:] = 0
    case.known[..., half:] = False
    return case


def dense(system: System) -> tuple[Tensor, Tensor]:
    """The matrix of a system, column by column, and its right-hand side."""
    units = torch.eye(system.shape.numel(), dtype=torch.float64).reshape(-1, *system.shape)
    columns = [torch.cat([part.reshape(-1) for part in system.apply(unit)]) for unit in units]
    return torch.stack(columns, dim=1), torch.cat([part.reshape(-1) for part in system.rhs])


class Reference:
    """What the singular value decomposition says of a dense system."""

    def __init__(self, matrix: Tensor, rhs: Tensor) -> None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
        self.rank = int((s > RANK_TOLERANCE * s[0]).sum())
        kept = s[: self.rank]
        self.condition = float(kept[0] / kept[-1]) if self.rank else 1.0
        self.x = vh[: self.rank].mT @ ((u[:, : self.rank].mT @ rhs) / kept)
        self.determined = vh[self.rank :].abs().amax(0) < 1e-6 if self.rank < len(vh) else self.x == self.x


def reference(system: System) -> Reference:
    return Reference(*dense(system))


def assert_same_answer(solution, case: Case, expected: Reference, tolerance: float = 1e-11) -> None:
    shape = case.x.shape
    assert torch.equal(solution.determined, expected.determined.reshape(shape))
    error = (solution.x.reshape(-1) - expected.x).abs().max()
    assert error <= tolerance * expected.condition * expected.x.abs().max()
    fixed = solution.determined
    assert (solution.x - case.x)[fixed].abs().sum() <= tolerance * expected.condition * case.x.numel()


# Stride phases


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


# All equations together


def check_hybrid(case: Case, system: System) -> str:
    solution = solve(system, solver="hybrid", rtol=RTOL)
    expected = reference(system)
    assert_same_answer(solution, case, expected, tolerance=1e-9)
    assert (solution.unknowns, solution.rows) == (case.x.numel(), system.count)
    if expected.rank == case.x.numel() or solution.solver == "normal-eigh":
        assert solution.rank == expected.rank
    else:
        assert expected.rank <= solution.rank < case.x.numel()
    assert solution.residual < 1e-11
    return solution.solver


def test_hybrid_is_the_dense_least_squares_solution(geometry: ConvGeometry) -> None:
    case = Case(geometry, 2, live=0.7)
    check_hybrid(case, case.system())


def test_small_systems_are_inverted_as_on_a_gpu(geometry: ConvGeometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.MAX_INVERTED_UNKNOWNS, "cpu", 4096)
    case = Case(geometry, 2, live=0.7)
    matrix, _ = dense(balance(case.system(), 1.0))
    condition = float(torch.linalg.cond(matrix)) if len(matrix) >= matrix.shape[1] else math.inf
    solver = check_hybrid(case, case.system())
    assert (solver == "cgls+inverse") == (condition < MAX_INVERTED_CONDITION)


def test_an_ill_conditioned_system_is_not_inverted() -> None:
    case = half_blind(Case(make((2, 8), (8, 8), 3, stride=2, padding=1)))
    assert normal_inverse(balance(case.system(), 1.0)) is None, "values that no equation fixes"
    weight = torch.ones(1, 1, 6, **DOUBLE)
    nearly = WeightRows(make((1, 1), (6,), 1), torch.ones(1, 1, 1, **DOUBLE), weight, weight)
    for least, inverted in ((1e-5, True), (1e-7, False)):
        weight[..., -1] = least
        assert (normal_inverse(System(torch.Size((1, 1, 6)), (nearly,))) is not None) == inverted


def test_neither_float32_nor_a_map_is_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.MAX_INVERTED_UNKNOWNS, "cpu", 4096)
    case = Case(make((3, 16), (12, 12), 5, stride=2, padding=2))
    every = MapRows.create(lambda x: x, case.x.shape, case.x, torch.ones_like(case.x))
    single = System(case.x.shape, tuple(block.to(torch.float32) for block in (case.gradient, case.outputs)))
    assert solve(case.system(), solver="hybrid").solver == "cgls+inverse"
    assert solve(case.system(case.gradient, every), solver="hybrid").solver != "cgls+inverse"
    assert solve(single, solver="hybrid", rtol=1e-6).solver != "cgls+inverse"


def test_hybrid_of_random_geometries() -> None:
    generator = random.Random(2)
    solvers = []
    while len(solvers) < 40:
        geometry = random_geometry(generator, largest=6)
        if geometry.n_input * geometry.in_channels <= 120:
            case = Case(geometry, generator.randint(1, 2), live=generator.choice([0.5, 0.8, 1.0]))
            if case.gradient.count and case.outputs.count:
                solvers.append(check_hybrid(case, case.system()))
    assert {"normal-eigh"} < set(solvers), "both direct and iterated ones"


WIDE = make((3, 16), (12, 12), 5, stride=2, padding=2)
"""Gradient rows for part of the unknowns, and outputs: 5.3 rows an unknown together."""


@pytest.mark.parametrize("kind", ["jacobi", "phase-cholesky", "dissection", "inverse"])
def test_every_preconditioner_leads_to_the_same_answer(kind: str) -> None:
    case = Case(WIDE, 2)
    system = balance(case.system(), 1.0)
    if kind == "jacobi":
        preconditioner = jacobi(system, torch.float64)
    elif kind == "phase-cholesky":
        preconditioner = phase_cholesky(system, torch.float64)
    elif kind == "inverse":
        preconditioner = normal_inverse(system)
    else:
        preconditioner = SketchedDissection.create(system)
        system = preconditioner.system
    result = refine(system, preconditioner, inner_rtol=1e-11, rtol=RTOL, max_iterations=2000)
    assert result.converged
    assert float((result.x - case.x).abs().max()) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_the_answer_goes_to_its_rounding_where_the_residual_is_there_long_before(seed: int) -> None:
    """A residual recomputed as soon as it vanishes, not when ``M^T r`` does, gave 1e-12 here."""
    torch.manual_seed(seed)
    case = Case(make((3, 32), (24, 24), 5, stride=2, padding=2), live=0.5)
    found = solve(case.system(), solver="hybrid")
    assert found.solver == "cgls+phase-cholesky"
    assert float((found.x - case.x).abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("case", "solver"),
    [
        (lambda: Case(make((3, 32), (12, 12), 3, stride=2, padding=1), 1, live=0.6), "cgls+phase-cholesky"),
        (lambda: Case(make((3, 12), (32, 32), 5, stride=2, padding=2)), "cgls+dissection"),
        (lambda: Case(make((8, 32), (10, 10), 3, stride=1, padding=1), 2, live=0.5), "cgls+jacobi"),
    ],
)
def test_the_plan_fits_the_system(case, solver: str) -> None:
    case = case()
    if solver == "cgls+jacobi":
        case.g[:, 1:] = 0  # one live filter: the gradient rows say little
    solution = solve(case.system(), solver="hybrid", rtol=RTOL)
    assert solution.solver == solver
    assert solution.converged
    assert solution.determined.all()
    assert float((solution.x - case.x).abs().max()) < 1e-8


def test_auto_is_direct_where_the_gradient_rows_suffice() -> None:
    case = Case(make((3, 64), (8, 8), 3, padding=1))
    assert solve(case.system()).solver == "phase-cholesky"
    case = Case(make((3, 6), (8, 8), 3, padding=1))
    assert solve(case.system()).solver.startswith("cgls")
    assert solve(case.system(case.gradient)).solver == "phase-svd"


def test_two_convolutions_of_one_input() -> None:
    """A residual block: neither branch's equations suffice, both together do."""
    main = Case(make((6, 5), (8, 8), 3, padding=1), live=0.3)
    main.g = random_grad_output(main.geometry, 1, **DOUBLE)
    skip = Case(make((6, 5), (8, 8), 1, stride=2))
    skip.x = main.x
    blocks = (main.gradient, main.outputs, skip.gradient, skip.outputs)
    alone = [reference(main.system(*blocks[:2])), reference(main.system(*blocks[2:]))]
    assert all(part.rank < main.x.numel() for part in alone)
    solution = solve(main.system(*blocks), rtol=RTOL)
    assert solution.rank == main.x.numel()
    assert_same_answer(solution, main, reference(main.system(*blocks)), tolerance=1e-9)


def test_two_convolutions_of_one_stride_share_their_phases() -> None:
    first = Case(make((4, 20), (8, 8), 3, stride=2, padding=1))
    second = Case(make((4, 30), (8, 8), 1, stride=2))
    second.x = first.x
    solution = solve(first.system(first.gradient, first.outputs, second.gradient, second.outputs), rtol=RTOL)
    assert solution.solver == "cgls+phase-cholesky"
    assert solution.determined.all()
    assert float((solution.x - first.x).abs().max()) < 1e-9


def test_values_known_directly() -> None:
    case = half_blind(Case(make((2, 8), (8, 8), 3, stride=2, padding=1)))
    open_values = ~reference(case.system()).determined.reshape(case.x.shape)
    assert 10 < open_values.sum() < case.x.numel()
    points = PointRows.create(torch.where(open_values, case.x, torch.nan), open_values.double())
    assert points.count == int(open_values.sum())
    check_hybrid(case, case.system(case.gradient, case.outputs, points))


def test_rows_of_any_linear_map() -> None:
    case = Case(make((2, 4), (8, 8), 3, stride=2, padding=1))

    def pool(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    value = pool(case.x)
    rows = MapRows.create(pool, case.x.shape, value, torch.ones_like(value))
    check_hybrid(case, case.system(case.gradient, case.outputs, rows))


def test_a_map_that_holds_parameters_gives_rows_without_a_graph() -> None:
    """A convolution of the model's and an average behind it, as one map."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.AvgPool2d(2)).double()
    x = torch.rand(1, 2, 8, 8, **DOUBLE)
    value = layers(x).detach()
    rows = MapRows.create(layers, x.shape, value, torch.ones_like(value))
    for part in (rows.apply(x), rows.diagonal(), rows.adjoint(value)):
        assert not part.requires_grad


def test_a_map_that_holds_parameters_keeps_their_dtype_in_a_mixed_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIXED_PRECISION_UNKNOWNS", 0)
    layer = torch.nn.Linear(12, 40).double()
    x = torch.randn(1, 12, 1, **DOUBLE)
    rows = MapRows.create(
        lambda x: layer(x.flatten(1)) - layer.bias,
        x.shape,
        (layer(x.flatten(1)) - layer.bias).detach(),
        torch.ones(1, 40, **DOUBLE),
    )
    found = solve(System(x.shape, (rows,)), solver="hybrid")
    assert found.solver == "cgls+jacobi+float32"
    assert float((found.x - x).abs().max()) < 1e-12


def test_known_zeros_leave_fewer_unknowns() -> None:
    """The support of a ReLU output: the equations suffice for the values that are not zero, only for them."""
    case = Case(make((4, 4), (6, 6), 3, stride=2, padding=1))
    support = torch.rand_like(case.x) < 0.35
    case.x = case.x * support
    everything = case.system()
    assert reference(everything).rank < case.x.numel()
    system = replace(everything, support=support)
    matrix, rhs = dense(everything)
    expected = Reference(matrix[:, support.reshape(-1)], rhs)
    assert expected.rank == int(support.sum()), "the case is one where the support decides"
    solution = solve(system, rtol=RTOL)
    assert (solution.unknowns, solution.rank) == (expected.rank, expected.rank)
    assert solution.determined.all()
    assert not solution.x[~support].any()
    assert float((solution.x - case.x).abs().max()) < 1e-10


# Precision


def test_float32_gradients_are_solved_to_their_rounding() -> None:
    case = Case(make((3, 64), (8, 8), 3, padding=1))
    weight_gradient = apply_gradient(case.geometry, case.x, case.g)
    rounded = GradientRows.create(case.geometry, weight_gradient.float().double(), case.g.float().double())
    solution = solve(case.system(rounded))
    assert float((solution.x - case.x).abs().max()) < 1e-5


def test_solving_in_float32() -> None:
    case = Case(make((3, 64), (8, 8), 3, padding=1))
    solution = solve(case.system(case.gradient.to(torch.float32)), rtol=1e-6)
    assert solution.x.dtype == torch.float32
    assert float((solution.x - case.x).abs().max()) < 1e-4
    system = System(case.x.shape, (case.gradient.to(torch.float32), case.outputs.to(torch.float32)))
    solution = solve(system, solver="hybrid", rtol=1e-6)
    assert solution.x.dtype == torch.float32
    assert float((solution.x - case.x).abs().max()) < 1e-4


@pytest.mark.parametrize("filters", [6, 40], ids=["jacobi", "phase-cholesky"])
def test_float32_products_do_not_cost_accuracy(filters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIXED_PRECISION_UNKNOWNS", 1)
    case = Case(make((4, filters), (12, 12), 3, padding=1), 2)
    if filters == 6:
        monkeypatch.setattr(plan, "JACOBI_FLOPS", 0.0)
        case.g[:, 1:] = 0
    solution = solve(case.system(), solver="hybrid", rtol=1e-14)
    assert solution.solver.endswith("+float32")
    assert solution.converged
    assert solution.determined.all()
    assert float((solution.x - case.x).abs().max()) < 1e-11


# What is determined


@pytest.mark.parametrize("shape", [((3, 20), (9, 9), 2, 3), ((2, 12), (10, 9), 3, 2), ((2, 3), (8, 8), 1, 2)], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["float64", "float32 products"])
def test_the_probe_marks_exactly_what_is_open(shape: tuple, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems too large to be decided by eigenvalues: a random vector is projected on the row space."""
    monkeypatch.setattr(hybrid, "MAX_DENSE_UNKNOWNS", 0)
    monkeypatch.setattr(hybrid, "MAX_DENSE_OPEN_UNKNOWNS", 0)
    monkeypatch.setattr(plan, "MIXED_PRECISION_UNKNOWNS", 0 if mixed else 10**9)
    channels, size, kernel, stride = shape
    case = half_blind(Case(make(channels, size, kernel, stride=stride), 2))
    expected = reference(case.system())
    assert 0 < expected.determined.sum() < case.x.numel(), "some are open, some are not"
    solution = solve(case.system(), solver="hybrid", rtol=RTOL)
    assert solution.solver != "normal-eigh"
    assert torch.equal(solution.determined, expected.determined.reshape(case.x.shape))
    assert float((solution.x - case.x)[solution.determined].abs().max()) < 1e-9
    assert expected.rank <= solution.rank < case.x.numel()


def test_equations_that_contradict_each_other_show_in_the_residual() -> None:
    case = Case(make((3, 64), (8, 8), 3, padding=1))
    wrong = case.gradient
    wrong = replace(wrong, rhs=wrong.rhs + 0.1 * torch.randn_like(wrong.rhs) * wrong.rhs.abs().mean())
    for solver in ("auto", "hybrid"):
        solution = solve(case.system(wrong, case.outputs), solver=solver)
        assert solution.converged
        assert solution.residual > 1e-3


def test_the_process_keeps_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a solve changes a setting of the whole process")

    kinds = {type(torch.backends.cudnn), type(torch.backends.cuda.matmul)}
    kinds |= {type(torch.backends.cudnn.conv)} if hasattr(torch.backends.cudnn, "conv") else set()
    for kind in kinds:
        monkeypatch.setattr(kind, "__setattr__", forbidden)
    case = Case(make((3, 32), (12, 12), 3, stride=2, padding=1))
    assert solve(case.system(), solver="hybrid", rtol=RTOL).converged


@pytest.mark.parametrize("exact", [True, False])
def test_float32_products_that_are_rounded_are_not_used(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (plan, precision):
        monkeypatch.setattr(place, "float32_is_exact", lambda _: exact)
    monkeypatch.setattr(plan, "MIXED_PRECISION_UNKNOWNS", 1)
    case = Case(make((4, 6), (12, 12), 3, padding=1), 2)
    assert solve(case.system(), solver="hybrid").solver.endswith("+float32") == exact
    single = System(case.x.shape, tuple(block.to(torch.float32) for block in (case.gradient, case.outputs)))
    solution = solve(single, solver="hybrid", rtol=1e-6)
    assert solution.x.dtype == torch.float32
    assert float((solution.x - case.x).abs().max()) < 1e-4


def test_a_spent_budget_ends_every_loop() -> None:
    case = Case(make((3, 5), (60, 60), 5, stride=2, padding=2))
    start = time.perf_counter()
    found = solve(case.system(), solver="hybrid", budget=Budget.seconds(0.0))
    assert time.perf_counter() - start < 5
    assert not found.converged
    assert not found.determined.any()
    assert found.proof == "none"
    open_still = solve_nonnegative(case.system(), found, tolerance=1e-9, budget=Budget.seconds(0.0))
    assert not open_still.determined.any()


# By eigenvalues


def assert_pseudo_inverse(system: System, kind: type[PseudoInverse] | type[DeflatedInverse] = PseudoInverse) -> None:
    """Rank, determined values, null space and solution as numpy's on the columns of the support."""
    support = torch.ones(system.shape, dtype=torch.bool) if system.support is None else system.support
    free = support.flatten()
    matrix = dense(system)[0][:, free]
    expected, inverse = Reference(matrix, matrix.sum(dim=1)), kind.create(system)
    assert inverse.rank == expected.rank
    assert torch.equal(inverse.determined[free], expected.determined)
    assert bool(inverse.determined[~free].all()), "what is known to be 0 is determined"
    null = inverse.null
    assert null.shape[1] == len(matrix.mT) - expected.rank
    assert bool((null[~free] == 0).all())
    assert torch.allclose(null.mT @ null, torch.eye(null.shape[1], **DOUBLE), atol=1e-10)
    assert torch.allclose(matrix @ null[free], torch.zeros(len(matrix), null.shape[1], **DOUBLE), atol=1e-9)
    right = torch.zeros(system.shape, **DOUBLE)
    right[support] = matrix.mT @ matrix.sum(dim=1)
    assert torch.allclose(inverse.solve(right)[support], expected.x.flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("restricted", [False, True], ids=["all values", "on a support"])
@pytest.mark.parametrize("filters", [1, 4, 20], ids=["wide", "wide, more rows than the limit", "tall"])
def test_the_pseudo_inverse_is_that_of_the_dense_matrix(filters: int, restricted: bool) -> None:
    case = Case(make((2, filters), (7, 6), 3, stride=2, padding=1), 2)
    system = case.system()
    assert (system.count < 0.6 * system.unknowns) == (filters == 1)
    if restricted:
        system = replace(system, support=torch.rand(system.shape) < 0.7)
    assert_pseudo_inverse(system)


@pytest.mark.parametrize("restricted", [False, True], ids=["all values", "on a support"])
def test_an_inverse_with_few_null_vectors_is_that_of_the_dense_matrix(restricted: bool) -> None:
    support = torch.rand(2, 2, 7, 6) < 0.7 if restricted else None
    tall = Case(make((2, 20), (7, 6), 3, stride=2, padding=1), 2)
    for system in (tall.system(), half_blind(tall).system()):
        assert_pseudo_inverse(replace(system, support=support), DeflatedInverse)
    untouched = Case(make((2, 9), (8, 8), 1, stride=3), 1)
    assert_pseudo_inverse(untouched.system(), DeflatedInverse)


def test_many_null_vectors_are_left_to_the_eigenvalues() -> None:
    assert DeflatedInverse.create(Case(make((2, 1), (7, 6), 3, stride=2, padding=1), 2).system()) is None
    torch.manual_seed(0)
    matrix = torch.randn(200, 60, **DOUBLE) @ torch.randn(60, 100, **DOUBLE)
    rows = SketchRows(matrix.view(200, 1, 1, 100), torch.zeros(200, **DOUBLE))
    assert DeflatedInverse.create(System(torch.Size((1, 1, 100)), (rows,))) is None


def test_an_eigenvalue_routine_that_gives_up_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    assert_pseudo_inverse(half_blind(Case(make((2, 20), (7, 6), 3, stride=2, padding=1), 2)).system())


def test_values_that_no_equation_holds_stay_outside_the_eigenvalues() -> None:
    case = Case(make((2, 9), (8, 8), 1, stride=3), 1)
    assert_pseudo_inverse(case.system())
    assert PseudoInverse.create(case.system()).vectors.shape == (18, 18)


def test_no_equation_at_all_determines_nothing() -> None:
    case = Case(make((2, 3), (5, 5), 3), 1)
    g = case.geometry
    empty = GradientRows.create(g, torch.zeros(3, 2, 3, 3, **DOUBLE), torch.zeros(1, 3, 3, 3, **DOUBLE))
    inverse = PseudoInverse.create(System(torch.Size((1, 2, 5, 5)), (empty,)))
    assert inverse.rank == 0
    assert not inverse.determined.any()
    assert inverse.null.shape == (50, 50)

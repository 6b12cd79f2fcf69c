"""The solvers against dense linear algebra: values, rank, and exactly which values are determined."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layers import random_grad_output
from rconv_fast.budget import Budget
from rconv_fast.constraints.operators import apply_gradient
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import (
    GradientRows,
    MapRows,
    PointRows,
    System,
    WeightRows,
    hybrid,
    plan,
    precision,
    solve,
    solve_nonnegative,
)
from rconv_fast.solve.krylov import refine
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
from systems import DOUBLE, RTOL, Case, Reference, assert_same_answer, dense, half_blind, reference

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

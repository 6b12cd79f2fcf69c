"""Zeros of a ReLU held during the iteration: the same answer in fewer steps, and never another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.solve import GradientRows, System, WeightRows, hybrid, plan, solve, tiles
from rconv_fast.solve.active import solve_with_zeros
from rconv_fast.solve.krylov import NO_LIMIT
from rconv_fast.solve.preconditioners import inverse_diagonal
from rconv_fast.solve.rounded import RoundedSystem
from rconv_fast.solve.rows import balance
from rconv_fast.testing import geometry as make

DOUBLE = {"dtype": torch.float64}


def behind_relu(filters: int, seed: int, lowest: float = 0.0) -> tuple[Tensor, System]:
    """A convolution of a smooth picture cut off at `lowest`, and what is known of it behind its own ReLU."""
    torch.manual_seed(seed)
    g = make((4, filters), (32, 32), 5, stride=2, padding=2)
    x = F.avg_pool2d(torch.randn(1, 4, 36, 36, **DOUBLE), 5, 1).clamp_min(lowest)
    weight = torch.randn(filters, 4, 5, 5, **DOUBLE)
    output = apply_weight(g, x, weight)
    known = (output > 0).double()
    grad = torch.randn_like(output) * known
    gradient = GradientRows.create(g, apply_gradient(g, x, grad), grad)
    return x, System(x.shape, (gradient, WeightRows.create(g, weight, output, known)))


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat these systems as the large ones they stand for."""
    monkeypatch.setattr(plan, "MIXED_PRECISION_UNKNOWNS", 1)
    monkeypatch.setattr(plan, "GRADIENT_COVERAGE", 2.0)
    monkeypatch.setattr(hybrid, "MAX_DENSE_UNKNOWNS", 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_answer_in_fewer_iterations(seed: int) -> None:
    x, system = behind_relu(34, seed)
    usual = solve(system, solver="hybrid")
    found = solve(system, solver="hybrid", nonnegative=True)
    assert found.iterations < 0.7 * usual.iterations
    assert found.converged
    assert found.residual < 2e-13
    assert float((found.x - x).abs().max()) < 1e-10
    assert float(found.x.min()) > -1e-10
    assert found.determined.all()
    assert (found.proof, usual.proof) == ("nonnegative", "probe")


@pytest.mark.parametrize("seed", range(4))
def test_products_in_bfloat16_lead_to_the_same_answer_and_proof(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "has_bfloat16", lambda _: True)  # slower where it is not so
    monkeypatch.setattr(tiles, "pays", lambda _: True)
    x, system = behind_relu(34, seed)
    assert isinstance(tiles.products(system, torch.bfloat16), RoundedSystem)
    found = solve(system, solver="hybrid", nonnegative=True)
    assert found.residual < 2e-13
    assert float((found.x - x).abs().max()) < 1e-10
    assert found.proof == "nonnegative"


def test_a_false_promise_of_no_negative_values_changes_no_answer() -> None:
    x, system = behind_relu(34, 0, lowest=-0.05)
    assert float(x.min()) < 0
    found = solve(system, solver="hybrid", nonnegative=True)
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-10


def test_equations_that_contradict_each_other_are_left_to_least_squares() -> None:
    _, system = behind_relu(34, 1)
    gradient, outputs = system.blocks
    wrong = replace(system, blocks=(replace(gradient, rhs=gradient.rhs * 1.01), outputs))
    balanced = balance(wrong, 1.0)
    options = {"inner_dtype": torch.float32, "rtol": 1e-13, "max_iterations": 400, "budget": NO_LIMIT}
    assert solve_with_zeros(balanced, inverse_diagonal(balanced, torch.float32), **options) is None
    usual = solve(wrong, solver="hybrid")
    found = solve(wrong, solver="hybrid", nonnegative=True)
    assert torch.allclose(found.x, usual.x)
    assert found.residual == usual.residual > 1e-4


def test_holding_zeros_proves_nothing() -> None:
    """Two channels that no filter tells apart: every share of their sum is an answer, none of them the only one."""
    x, system = behind_relu(34, 2)
    gradient, outputs = system.blocks
    weight = outputs.weight.clone()
    weight[:, 1] = weight[:, 0]
    g = outputs.geometry
    output = apply_weight(g, x, weight)
    same = WeightRows.create(g, weight, output, (output > 0).double())
    blind = GradientRows.create(g, torch.zeros_like(gradient.rhs), torch.zeros_like(gradient.grad_output))
    found = solve(System(x.shape, (blind, same)), solver="hybrid", nonnegative=True)
    assert not found.determined[:, :2].any()
    assert found.rank < found.unknowns


def mostly_known(hidden: int) -> tuple[Tensor, System]:
    """Outputs that suffice but for a corner of `hidden` squared of them, and a few gradient rows."""
    torch.manual_seed(hidden)
    g = make((2, 16), (48, 48), 3, stride=2, padding=1)
    x, weight = torch.randn(1, 2, 48, 48, **DOUBLE), torch.randn(16, 2, 3, 3, **DOUBLE)
    output, grad = apply_weight(g, x, weight), torch.randn(1, 16, 24, 24, **DOUBLE)
    known = torch.ones_like(output)
    known[..., :hidden, :hidden] = 0
    gradient = GradientRows.create(g, apply_gradient(g, x, grad), grad)
    return x, System(x.shape, (gradient, WeightRows.create(g, weight, output, known)))


def test_a_few_gradient_rows_are_left_out_where_the_outputs_suffice() -> None:
    x, system = mostly_known(0)
    found = solve(system, solver="hybrid")
    assert found.solver == "cgls+jacobi of outputs+float32"
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-9


def test_what_the_outputs_leave_open_gradient_rows_fix() -> None:
    x, system = mostly_known(3)
    found = solve(system, solver="hybrid")
    assert found.solver == "cgls+jacobi+float32"
    assert found.determined.all()
    assert float((found.x - x).abs().max()) < 1e-7

"""Small systems by their eigenvalues, and by an inverse with few null vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rconv_fast.solve import (
    GradientRows,
    System,
)
from rconv_fast.solve.deflated import DeflatedInverse
from rconv_fast.solve.dense import PseudoInverse
from rconv_fast.solve.dissection.sketch import SketchRows
from rconv_fast.testing import geometry as make
from systems import DOUBLE, Case, Reference, dense, half_blind


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

"""An answer with zeros is called the only one without negative values where it is, and never where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rconv_fast.solve import System, WeightRows
from rconv_fast.solve.krylov import NO_LIMIT
from rconv_fast.solve.preconditioners import inverse_diagonal
from rconv_fast.solve.rows import balance
from rconv_fast.solve.signs import fixed_by_signs
from rconv_fast.testing import geometry as make

N, ROWS = 60, 90


def equations(matrix: Tensor) -> System:
    """``M x = b`` as a layer that is a matrix product."""
    rows, n = matrix.shape
    ones = torch.ones(1, rows, 1, dtype=torch.float64)
    block = WeightRows.create(make((n, rows), (1,), 1), matrix.unsqueeze(-1), ones, ones)
    return balance(System(torch.Size((1, n, 1)), (block,)), 1.0)


def closed_to(direction: Tensor, generator: torch.Generator) -> System:
    """Equations that see everything but one direction."""
    matrix = torch.randn(ROWS, N, dtype=torch.float64, generator=generator)
    direction = direction / direction.norm()
    return equations(matrix - (matrix @ direction)[:, None] * direction)


def proven(system: System, zeros: Tensor) -> bool:
    return fixed_by_signs(
        system,
        zeros.view(system.shape),
        inverse_diagonal(system, torch.float64),
        inner_dtype=torch.float64,
        max_iterations=400,
        budget=NO_LIMIT,
    )


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


ZEROS = torch.arange(N) < N // 2


def test_equations_of_full_rank_fix_every_answer(draw: torch.Generator) -> None:
    for _ in range(20):
        assert proven(equations(torch.randn(ROWS, N, dtype=torch.float64, generator=draw)), ZEROS)


def test_a_direction_that_would_make_some_zeros_negative_is_no_other_answer(draw: torch.Generator) -> None:
    for _ in range(20):
        direction = torch.randn(N, dtype=torch.float64, generator=draw)
        direction[ZEROS] -= direction[ZEROS].mean()
        assert proven(closed_to(direction, draw), ZEROS)


def test_a_direction_along_which_zeros_only_grow_is_one(draw: torch.Generator) -> None:
    for _ in range(20):
        direction = torch.randn(N, dtype=torch.float64, generator=draw)
        direction[ZEROS] = direction[ZEROS].abs()
        assert not proven(closed_to(direction, draw), ZEROS)
        assert not proven(closed_to(-direction, draw), ZEROS)


def test_a_direction_that_leaves_the_zeros_alone_is_one(draw: torch.Generator) -> None:
    for _ in range(20):
        direction = torch.randn(N, dtype=torch.float64, generator=draw) * ~ZEROS
        assert not proven(closed_to(direction, draw), ZEROS)


def test_values_that_no_equation_holds_are_not_fixed(draw: torch.Generator) -> None:
    matrix = torch.randn(ROWS, N, dtype=torch.float64, generator=draw)
    matrix[:, 0] = 0
    assert not proven(equations(matrix), ZEROS)

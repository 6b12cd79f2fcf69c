"""An answer with zeros is called the only one without negative values where it is, and never where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rconv_fast.solve import System, WeightRows
from rconv_fast.solve.krylov import NO_LIMIT
from rconv_fast.solve.preconditioners import inverse_diagonal
from rconv_fast.solve.rounded import RoundedSystem
from rconv_fast.solve.rows import balance
from rconv_fast.solve.signs import _inverse_bound, fixed_by_signs
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


@pytest.mark.parametrize("open_by", [0.3, 0.1, 0.01])
def test_products_in_bfloat16_show_no_more_than_is_true(open_by: float, draw: torch.Generator) -> None:
    """The a of ``N_P >= D_P / a`` against the least eigenvalue, of a direction that rounding may hide."""
    shown = 0
    for _ in range(10):
        matrix, direction = (torch.randn(n, N, dtype=torch.float64, generator=draw) for n in (ROWS, 1))
        direction = direction * ~ZEROS / (direction * ~ZEROS).norm()
        system = equations(matrix - (1 - open_by) * matrix @ direction.mT @ direction)
        part = (~ZEROS).view(system.shape).float()
        diagonal = inverse_diagonal(system, torch.float32)
        a = _inverse_bound(system, RoundedSystem.create(system), part, diagonal, 400, NO_LIMIT)
        units = torch.eye(N, dtype=torch.float64).view(N, *system.shape)[~ZEROS]
        columns = torch.stack([system.apply(unit)[0].flatten() for unit in units], 1)
        scaled = columns * diagonal.double().flatten()[~ZEROS].sqrt()
        least = float(torch.linalg.svdvals(scaled)[-1]) ** 2
        assert a is None or a > 1 / least
        shown += a is not None
    assert shown or open_by < 0.1  # a direction below the rounding is not found at all

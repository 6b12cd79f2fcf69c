"""Layers with hardly more equations than values: given up where the pace says so, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rconv_fast.solve.krylov import PACED_FROM, Pace

RTOL, MOST = 1e-13, 2000


def given_up(residual: Callable[[int], float]) -> int:
    """The iteration that a fall of the residual is given up at, 0 for none."""
    pace = Pace(RTOL, MOST)
    return next((i for i in range(1, MOST + 1) if pace.hopeless(i, residual(i))), 0)


@pytest.mark.parametrize("iterations", [900, 1900, 2900])
def test_a_steady_pace_is_trusted_to_speed_up_by_half(iterations: int) -> None:
    assert given_up(lambda i: RTOL ** (i / iterations)) == 0


@pytest.mark.parametrize("iterations", [3100, 10_000])
def test_a_steady_pace_that_takes_too_long_is_given_up_at_the_first_look(iterations: int) -> None:
    assert given_up(lambda i: RTOL ** (i / iterations)) == PACED_FROM


@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_pace_that_slows_down_for_good_is_given_up(power: int) -> None:
    assert PACED_FROM <= given_up(lambda i: float(i) ** -power) < MOST


def test_a_residual_that_does_not_fall_is_given_up() -> None:
    assert given_up(lambda _: 0.1) == PACED_FROM

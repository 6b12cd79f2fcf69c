"""The arithmetic of positions: sizes, stride phases, closed-form counts, and the errors about them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from layers import convolve, random_input, random_weight
from rconv_fast.constraints.layout import INT32_MAX, Axis, ConstraintLayout
from rconv_fast.errors import ArgumentError
from rconv_fast.geometry import ConvGeometry, as_tuple
from rconv_fast.testing import random_geometry


def test_out_size_is_that_of_torch(geometry: ConvGeometry) -> None:
    assert convolve(geometry, random_input(geometry), random_weight(geometry)).shape[2:] == geometry.out_size


def test_phases_hold_every_position_and_every_meeting_once(geometry: ConvGeometry) -> None:
    positions = [p for phase in geometry.phases for p in itertools.product(*phase.positions)]
    assert sorted(positions) == list(itertools.product(*map(range, geometry.input_size)))
    for phase in geometry.phases:
        assert phase.n_positions == len(list(itertools.product(*phase.positions)))
        for k in itertools.product(*map(range, geometry.kernel_size)):
            met = {
                tuple(u * s + t * d - p for u, s, t, d, p in zip(us, *steps(geometry, k), strict=True))
                for us in itertools.product(*map(range, geometry.out_size))
            }
            touched = met & set(itertools.product(*phase.positions))
            in_taps = all(t in taps for t, taps in zip(k, phase.taps, strict=True))
            assert in_taps or not touched


def steps(geometry: ConvGeometry, k: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return geometry.stride, k, geometry.dilation, geometry.padding


def test_phases_of_stride_2_kernel_3() -> None:
    geometry = ConvGeometry.create("test", 1, 1, (6,), (3,), 2, 1)
    assert [(phase.taps, list(phase.positions[0])) for phase in geometry.phases] == [
        (((1,),), [0, 2, 4]),
        (((0, 2),), [1, 3, 5]),
    ]


def test_n_meetings_is_a_count() -> None:
    generator = random.Random(0)
    for _ in range(500):
        size, n_rows, n_entries = (generator.randint(1, 9) for _ in range(3))
        row_step, entry_step, padding = (
            generator.randint(1, 4),
            generator.randint(1, 4),
            generator.randint(0, 9),
        )
        axis = Axis(size, n_rows, row_step, n_entries, entry_step, padding)
        pairs = itertools.product(range(n_rows), range(n_entries))
        assert axis.n_meetings == sum(0 <= r * row_step + e * entry_step - padding < size for r, e in pairs)


def test_layout_survives_its_numbers() -> None:
    generator = random.Random(0)
    for _ in range(20):
        geometry = random_geometry(generator)
        for layout in (ConstraintLayout.of_gradient(geometry, 3), ConstraintLayout.of_weight(geometry)):
            assert ConstraintLayout.from_numbers(layout.numbers) == layout


@pytest.mark.parametrize(("side", "dtype"), [(15446, torch.int32), (15450, torch.int64)])
def test_indices_widen_at_two_to_the_31(side: int, dtype: torch.dtype) -> None:
    # side 15446: (3*side - 2)^2 entries, just below 2^31; no matrix is built.
    geometry = ConvGeometry.create("test", 1, 1, (side, side), 3, padding=1)
    layout = ConstraintLayout.of_gradient(geometry, 1)
    assert layout.nnz == (3 * side - 2) ** 2
    assert (layout.nnz <= INT32_MAX) == (dtype == torch.int32)
    assert layout.index_dtype == dtype


@pytest.mark.parametrize(("padding", "dtype"), [(400, torch.int32), (60_000, torch.int64)])
def test_indices_widen_where_padded_positions_need_it(padding: int, dtype: torch.dtype) -> None:
    geometry = ConvGeometry.create("test", 1, 1, (2, 20_000), 1, stride=(padding + 1, 10_000), padding=(padding, 0))
    layout = ConstraintLayout.of_weight(geometry)
    assert max(layout.nnz, layout.n_cols, layout.n_rows) < 100_000
    assert layout.index_dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": (4, 4, 4, 4)}, r"^test: input_size must have 1 to 3 axes, got \(4, 4, 4, 4\)$"),
        ({"kernel_size": (3,)}, r"^test: kernel_size must have 2 entries or be an int, got \(3,\)$"),
        ({"stride": 0}, r"^test: stride must be >= 1 on every axis, got \(0, 0\)$"),
        ({"padding": -1}, r"^test: padding must be >= 0 on every axis, got \(-1, -1\)$"),
        ({"dilation": (1, 0)}, r"^test: dilation must be >= 1 on every axis, got \(1, 0\)$"),
        ({"input_size": (0, 4)}, r"^test: input_size must be >= 1 on every axis, got \(0, 4\)$"),
        ({"groups": 4}, r"^test: groups must divide in_channels \(2\), got 4$"),
        ({"kernel_size": 5}, r"^test: kernel_size must fit into the padded input .*, got \(5, 5\)$"),
    ],
)
def test_wrong_sizes_say_so_in_one_line(arguments: dict[str, object], message: str) -> None:
    sizes = {"in_channels": 2, "out_channels": 4, "input_size": (4, 4), "kernel_size": 3, **arguments}
    with pytest.raises(ArgumentError, match=message):
        ConvGeometry.create("test", **sizes)


def test_as_tuple_expands_an_int() -> None:
    assert as_tuple(3, 2, "test", "stride") == (3, 3)
    assert as_tuple([1, 2], 2, "test", "stride") == (1, 2)

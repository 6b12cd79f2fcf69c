"""Equations behind a norm with statistics of its own: the true input satisfies them, and they find it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layers import convolve, random_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import Solution, System, solve
from rconv_fast.solve.curved import CurvedSystem, place_by_zeros, solve_curved
from rconv_fast.solve.norm_conv import NormalisedConv, hidden_classes
from rconv_fast.solve.normalised import NormSets
from rconv_fast.solve.rows import Rows

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """One layer ``relu(norm(conv(x)))`` with autograd's gradients, as the equations see it."""

    x: Tensor
    grad_output: Tensor
    conv: NormalisedConv


def make_case(geometry: ConvGeometry, sets: NormSets, *, batch: int = 2, mean: bool = False, seen: float = 0.5) -> Case:
    """`seen`: the share of outputs that are known; behind the others no gradient comes."""
    x = torch.rand(batch, geometry.in_channels, *geometry.input_size, dtype=torch.float64)
    weight = random_weight(geometry, dtype=torch.float64).requires_grad_()
    o = convolve(geometry, x, weight)
    o.retain_grad()
    average = sets.mean(o)
    sigma = (sets.mean((o - average).square()) + EPS).sqrt()
    xhat = (o - average) / sigma
    known = (torch.rand(o.shape, dtype=torch.float64) < seen).double()
    h = torch.randn(o.shape, dtype=torch.float64) * known
    (h * xhat).sum().backward()
    assert weight.grad is not None
    assert o.grad is not None
    detached = xhat.detach()
    conv = NormalisedConv(
        geometry=geometry,
        weight=weight.detach(),
        sets=sets,
        h=h,
        q=sets.mean(h * detached),
        sigma=sigma.detach(),
        trust=torch.ones_like(sigma).detach(),
        mean=average.detach() if mean else None,
        shift=torch.zeros_like(detached[:1]),
        xhat=torch.where(known > 0, detached, torch.nan),
        known=known,
        grad_weight=weight.grad,
    )
    return Case(x, o.grad, conv)


SMALL_GEOMETRIES = {
    "1d": ConvGeometry.create("test", 2, 12, (14,), (3,), 2, 1),
    "2d": ConvGeometry.create("test", 2, 10, (7, 7), (3, 3), 2, 1),
    "2d groups": ConvGeometry.create("test", 4, 12, (6, 6), (3, 3), 1, 1, 1, 2),
    "2d no padding": ConvGeometry.create("test", 2, 14, (8, 8), (4, 4), 2, 0),
    "3d": ConvGeometry.create("test", 1, 14, (5, 5, 5), (3, 3, 3), 2, 1),
}
SETS = {"batch": NormSets(), "layer": NormSets(1), "group": NormSets(2)}


@pytest.fixture(params=SMALL_GEOMETRIES.values(), ids=SMALL_GEOMETRIES.keys())
def small(request: pytest.FixtureRequest) -> ConvGeometry:
    return request.param


def blocks(case: Case) -> list[Rows]:
    system = CurvedSystem(case.x.shape, (), (case.conv,))
    return list(system.around(case.x).blocks)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS.keys())
def test_the_true_input_satisfies_every_equation_around_itself(small: ConvGeometry, sets: NormSets, mean: bool) -> None:
    if mean and sets.groups is not None:
        pytest.skip("only batch norm keeps running means")
    case = make_case(small, sets, mean=mean)
    torch.testing.assert_close(case.conv.gradient(case.x), case.grad_output)
    for rows in case.conv.rows(case.x):
        torch.testing.assert_close(rows.apply(case.x), rows.rhs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS.keys())
def test_around_an_estimate_they_hold_up_to_its_square(small: ConvGeometry, sets: NormSets) -> None:
    case = make_case(small, sets)
    direction = torch.randn_like(case.x)

    def miss(distance: float) -> float:
        (rows,) = case.conv.rows(case.x + distance * direction)[1:]
        return float((rows.apply(case.x) - rows.rhs).norm())

    assert miss(1e-3) < 0.02 * miss(1e-2)


@pytest.mark.parametrize("mean", [False, True])
def test_adjoints_and_normal_matrices_belong_to_the_products(small: ConvGeometry, mean: bool) -> None:
    case = make_case(small, NormSets(), mean=mean)
    for rows in blocks(case):
        x, y = torch.randn_like(case.x), torch.randn_like(rows.rhs)
        torch.testing.assert_close((rows.apply(x) * y).sum(), (x * rows.adjoint(y)).sum())
        torch.testing.assert_close(rows.normal() @ x.flatten(), rows.adjoint(rows.apply(x)).flatten())
        torch.testing.assert_close(rows.scaled(3.0).apply(x), 3 * rows.apply(x))
        assert rows.to(torch.float32).apply(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 3)])
def test_hidden_classes_are_all_that_a_norm_hides(kernel: int, stride: int, padding: int, dilation: int) -> None:
    if padding >= (kernel - 1) * dilation + 1:
        pytest.skip("outputs that read padding only")
    geometry = ConvGeometry.create("test", 1, 24, (13,), (kernel,), stride, padding, dilation)
    weight = random_weight(geometry, dtype=torch.float64)
    units = torch.eye(13, dtype=torch.float64).unsqueeze(1)
    outputs = convolve(geometry, units, weight)
    centred = outputs - outputs.mean(dim=2, keepdim=True)
    untouched = ~outputs.flatten(1).any(dim=1)
    hidden = 13 - int(torch.linalg.matrix_rank(centred.flatten(1)))
    classes = hidden_classes(geometry)
    assert len(classes) + int(untouched.sum()) == hidden
    constants = convolve(geometry, classes.double().unsqueeze(1), weight)
    torch.testing.assert_close(constants, constants[..., :1].expand_as(constants))


def solved(case: Case, *, by_zeros: bool = False) -> Solution:
    system = CurvedSystem(case.x.shape, (), (case.conv,))
    found = solve_curved(system, lambda linear: solve(linear, rtol=1e-15))
    return place_by_zeros(system, found) if by_zeros else found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_with_the_mean_everything_is_found(name: str, batch: int) -> None:
    geometry = SMALL_GEOMETRIES[name]
    wide = ConvGeometry.create("test", geometry.in_channels, 40, geometry.input_size, geometry.kernel_size, 2, 1)
    case = make_case(wide, NormSets(), batch=batch, mean=True)
    found = solved(case)
    assert bool(found.determined.all())
    assert found.rank == found.unknowns
    torch.testing.assert_close(found.x, case.x, atol=1e-9, rtol=0)


def test_without_the_mean_everything_is_found_but_one_constant_a_hidden_class() -> None:
    geometry = ConvGeometry.create("test", 2, 40, (7, 7), (3, 3), 2, 1)  # only even positions never meet padding
    case = make_case(geometry, NormSets())
    found = solved(case)
    even = torch.zeros(7, 7, dtype=torch.bool)
    even[::2, ::2] = True
    assert torch.equal(found.determined, (~even).expand_as(found.determined))
    assert found.unknowns - found.rank == 2
    torch.testing.assert_close(found.x[..., ~even], case.x[..., ~even], atol=1e-9, rtol=0)
    offsets = (found.x - case.x)[..., even]
    torch.testing.assert_close(offsets, offsets[:1, :, :1].expand_as(offsets), atol=1e-9, rtol=0)


def test_zeros_of_a_relu_place_the_hidden_constants() -> None:
    geometry = ConvGeometry.create("test", 2, 60, (8, 8), (4, 4), 2, 0)
    case = make_case(geometry, NormSets())
    x = (case.x - 0.5).relu()
    o = convolve(geometry, x, case.conv.weight)
    everything = torch.ones_like(o)
    sigma = (o.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + EPS).sqrt()
    xhat = (o - NormSets().mean(o)) / sigma
    conv = NormalisedConv(
        geometry,
        case.conv.weight,
        NormSets(),
        everything,
        everything,
        sigma,
        everything,
        None,
        everything * 0,
        xhat,
        everything,
        None,
    )
    found = solved(Case(x, o, conv))
    assert not bool(found.determined.any())
    placed = solved(Case(x, o, conv), by_zeros=True)
    assert bool(placed.determined.all())
    torch.testing.assert_close(placed.x, x, atol=1e-9, rtol=0)


def test_equations_of_one_point_are_linear_where_all_is_known() -> None:
    case = make_case(SMALL_GEOMETRIES["2d"], NormSets(), seen=1.1)
    system = CurvedSystem(case.x.shape, (), (case.conv,))
    assert system.is_linear
    first: System = system.around(None)
    for here, there in zip(first.blocks, system.around(case.x).blocks, strict=True):
        torch.testing.assert_close(here.apply(case.x), there.apply(case.x))


def test_a_group_of_every_channel_is_torchs_norm() -> None:
    o = torch.randn(3, 8, 5, dtype=torch.float64)
    for groups in (1, 2, 8):
        sets = NormSets(groups)
        deviation = (sets.mean(sets.centre(o).square()) + 1e-5).sqrt()
        torch.testing.assert_close(sets.centre(o) / deviation, F.group_norm(o, groups))

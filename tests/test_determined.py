"""What is called determined is fixed by the equations: against null vectors that hide, and against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rconv_fast import ConvRecovery, recover_conv_input
from rconv_fast.constraints.operators import apply_gradient, apply_weight
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import GradientRows, System, WeightRows, rank
from rconv_fast.solve.dissection.sketch import SketchRows
from rconv_fast.solve.rows import balance
from rconv_fast.testing import geometry as make

DOUBLE = {"dtype": torch.float64}


def patterns(size: tuple[int, int]) -> dict[str, Tensor]:
    """Pictures that look the same at every place, so that one filter can be blind to them everywhere."""
    row, column = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
    return {
        "constant": torch.ones(size, **DOUBLE),
        "checkerboard": (1 - 2 * ((row + column) % 2)).double(),
        "stripes": (1 - 2 * (row % 2)).double().expand(size),
    }


def blind(
    size: tuple[int, int], pattern: str, filters: int, *, outputs: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[ConvRecovery, Tensor]:
    """A layer whose filters and whose output gradients are blind to one picture; also its true input."""
    x = torch.rand(1, 1, *size, **DOUBLE)
    look, seen = patterns((3, 3))[pattern], patterns((size[0] - 2, size[1] - 2))[pattern]
    w = torch.randn(filters, 1, 3, 3, **DOUBLE)
    w = (w - (w * look).mean(dim=(2, 3), keepdim=True) * look).requires_grad_()
    o = F.conv2d(x, w)
    g = torch.randn_like(o)
    g = g - (g * seen).mean(dim=(2, 3), keepdim=True) * seen
    (grad_weight,) = torch.autograd.grad(o, w, g)
    known = {"weight": w.detach().to(dtype), "output": o.detach().to(dtype)} if outputs else {}
    return recover_conv_input(grad_weight.to(dtype), g.to(dtype), size, **known, dtype=dtype), x


@pytest.mark.parametrize("pattern", ["constant", "checkerboard", "stripes"])
@pytest.mark.parametrize("size", [(19, 23), (33, 37), (91, 85)], ids=str)
def test_a_null_vector_spread_over_the_picture_is_seen(size: tuple[int, int], pattern: str) -> None:
    torch.manual_seed(size[0])
    found, x = blind(size, pattern, 4)
    assert found.rows > found.unknowns
    assert found.rank < found.unknowns
    assert not found.determined.any(), "the null vector moves every value"
    assert float((found.input - x).abs().max()) > 1e-4
    assert found.proof in ("eigenvalues", "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", [(12, 12), (20, 17)], ids=str)
def test_gradients_alone_that_miss_one_direction_prove_nothing(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Rounding leaves the Gram matrix of float32 gradients a Cholesky factor, and a condition number of only 1e4."""
    for seed in range(3):
        torch.manual_seed(seed)
        found, _ = blind(size, "constant", math.prod(size) // 9 + 8, outputs=False, dtype=dtype)
        assert found.rows > found.unknowns
        assert found.rank == found.unknowns - 1
        assert not found.determined.any()


def test_every_claim_names_its_proof() -> None:
    torch.manual_seed(0)
    proofs = {}
    for size, filters in (((12, 12), 40), ((16, 16), 6), ((40, 40), 6)):
        x = torch.rand(1, 2, *size, **DOUBLE)
        w = torch.randn(filters, 2, 3, 3, **DOUBLE, requires_grad=True)
        o = F.conv2d(x, w, padding=1)
        g = torch.randn_like(o)
        (grad_weight,) = torch.autograd.grad(o, w, g)
        found = recover_conv_input(grad_weight, g, size, weight=w, output=o.detach(), padding=1)
        assert found.determined.all()
        assert float((found.input - x).abs().max()) < 1e-9
        proofs[size] = (found.solver.partition("+")[0], found.proof)
    assert proofs == {
        (12, 12): ("phase-cholesky", "cholesky"),
        (16, 16): ("cgls", "cholesky"),
        (40, 40): ("cgls", "probe"),
    }


# The probe


def projector(open_directions: Tensor) -> rank.Recover:
    """A perfect solver of equations that leave these directions (n, k) open."""
    q, _ = torch.linalg.qr(open_directions)

    def recover(rhs: list[Tensor], _: rank.Accept) -> Tensor:
        z = rhs[0].flatten()
        return (z - q @ (q.mT @ z)).view_as(rhs[0])

    return recover


def identity(n: int, count: int | None = None) -> System:
    """Rows ``x = b`` for n values; `count` of them say something."""
    weight = torch.ones(1, 1, n, **DOUBLE)
    block = WeightRows(make((1, 1), (n,), 1), torch.ones(1, 1, 1, **DOUBLE), weight, weight)
    object.__setattr__(block, "count", n if count is None else count)
    return System(torch.Size((1, 1, n)), (block,))


def test_no_random_direction_escapes_the_probe() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (5, 100, 3000):
        for _ in range(60):
            recover = projector(torch.randn(n, 1, generator=generator, **DOUBLE))
            assert not rank.probe(identity(n), recover).all()


def test_the_probe_knows_what_a_few_values_leave_open() -> None:
    n = 50
    directions = torch.zeros(n, 3, **DOUBLE)
    directions[:10] = torch.randn(10, 3, **DOUBLE)
    determined = rank.probe(identity(n), projector(directions)).flatten()
    assert determined.tolist() == [False] * 10 + [True] * 40
    assert rank.probe(identity(n), projector(torch.zeros(n, 0, **DOUBLE))).all()


def test_fewer_equations_than_values_never_have_full_rank() -> None:
    found = rank.probe(identity(50, count=49), projector(torch.zeros(50, 0, **DOUBLE)))
    assert not found.any(), "the solver contradicts the count, so nothing it says counts"


# Bounds


def scaled_rows(size: Tensor) -> System:
    """Rows ``size x = b``, one a value."""
    weight = torch.ones(1, 1, 1, **DOUBLE)
    size = size.view(1, 1, -1)
    block = WeightRows(make((1, 1), (size.numel(),), 1), weight, size, torch.zeros_like(size))
    return System(torch.Size((1, 1, size.numel())), (block,))


@pytest.mark.parametrize("n", [3, 40, 3000])
def test_a_good_preconditioner_proves_full_rank_and_no_preconditioner_proves_it_of_a_singular_system(n: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        size = torch.logspace(0, -5, n, **DOUBLE)[torch.randperm(n)]
        inverse = size.square().reciprocal() * (1 + 1e-3 * torch.randn(n, **DOUBLE))
        assert rank.contracts(scaled_rows(size), lambda v, p=inverse: v * p)
        assert not rank.contracts(scaled_rows(size), lambda v, p=inverse: 0.5 * v * p), "too far to tell in a few steps"
        assert not rank.contracts(scaled_rows(size), lambda v, p=inverse: 3 * v * p), "an iteration that diverges"
        size[seed % n] = 0.0
        assert not rank.contracts(scaled_rows(size), lambda v, p=inverse: v * p)


@pytest.mark.parametrize("smallest", [1e-9, 1e-12, 0.0])
def test_a_direction_beyond_rounding_is_not_proven(smallest: float) -> None:
    """The inverse of what rounding made of a matrix is no proof for the matrix."""
    torch.manual_seed(0)
    n = 60
    u, _ = torch.linalg.qr(torch.randn(n, n, **DOUBLE))
    v, _ = torch.linalg.qr(torch.randn(n, n, **DOUBLE))
    matrix = (u * torch.logspace(0, -3, n, **DOUBLE).index_fill(0, torch.tensor([n - 1]), smallest)) @ v.mT
    block = SketchRows(matrix.view(n, 1, 1, n), torch.zeros(n, **DOUBLE))
    rounded = matrix.float().double()
    inverse = torch.linalg.inv(rounded.mT @ rounded)
    system = System(torch.Size((1, 1, n)), (block,))
    assert not rank.contracts(system, lambda x: (inverse @ x.flatten()).view(x.shape))


def small(filters: int) -> tuple[ConvGeometry, System]:
    torch.manual_seed(filters)
    g = make((2, filters), (8, 7), 3, padding=1)
    x, w = torch.rand(1, 2, 8, 7, **DOUBLE), torch.randn(filters, 2, 3, 3, **DOUBLE)
    grad = torch.randn(1, filters, *g.out_size, **DOUBLE)
    outputs = apply_weight(g, x, w)
    rows = WeightRows.create(g, w, outputs, (torch.rand_like(outputs) < 0.8).double())
    return g, System(x.shape, (GradientRows.create(g, apply_gradient(g, x, grad), grad), rows))


def dense(system: System) -> Tensor:
    units = torch.eye(math.prod(system.shape), **DOUBLE).view(-1, *system.shape)
    return torch.stack([torch.cat([part.flatten() for part in system.apply(unit)]) for unit in units], dim=1)


@pytest.mark.parametrize("filters", [1, 2, 3, 9])
def test_a_factor_proves_full_rank_and_only_that(filters: int) -> None:
    _, system = small(filters)
    system = balance(system, 1.0)
    singular = torch.linalg.svdvals(dense(system))
    condition = rank.factored_condition(system)
    full = system.count >= system.unknowns and float(singular[-1]) > 1e-9 * float(singular[0])
    assert math.isfinite(condition) == full
    if full:
        assert 0.3 < condition / float(singular[0] / singular[-1]) < 1.01

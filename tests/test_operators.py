"""The matrix-free products: against autograd, against each other, against the matrices the builders write."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from layers import convolve, gradient_matrix, random_grad_output, random_input, random_weight, weight_matrix
from rconv_fast.constraints import operators
from rconv_fast.constraints.operators import apply_gradient, apply_weight, apply_weight_adjoint
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import adjoint_test, random_geometry

BATCH = 3
DOUBLE = {"dtype": torch.float64}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max() + 1))


def draw(geometry: ConvGeometry) -> tuple[Tensor, Tensor, Tensor]:
    x = random_input(geometry, BATCH, **DOUBLE)
    return x, random_weight(geometry, **DOUBLE), random_grad_output(geometry, BATCH, **DOUBLE)


def check_against_autograd(geometry: ConvGeometry) -> None:
    x, weight, g = draw(geometry)
    x.requires_grad_()
    weight.requires_grad_()
    output = convolve(geometry, x, weight)
    grad_x, grad_weight = torch.autograd.grad(output, (x, weight), g)
    x, weight = x.detach(), weight.detach()
    assert_equal(apply_weight(geometry, x, weight), output.detach())
    assert_equal(apply_weight_adjoint(geometry, g, weight), grad_x)
    assert_equal(apply_gradient(geometry, x, g), grad_weight)


def test_products_are_those_of_autograd(geometry: ConvGeometry) -> None:
    check_against_autograd(geometry)


def test_products_of_random_geometries_are_those_of_autograd() -> None:
    generator = random.Random(0)
    for _ in range(60):
        check_against_autograd(random_geometry(generator))


def test_adjoints(geometry: ConvGeometry) -> None:
    x, weight, g = draw(geometry)
    adjoint_test(
        lambda v: apply_weight(geometry, v, weight),
        lambda v: apply_weight_adjoint(geometry, v, weight),
        x,
        torch.randn_like(g),
    )
    adjoint_test(
        lambda v: apply_gradient(geometry, v, g),
        lambda v: apply_weight_adjoint(geometry, g, v),
        x,
        torch.randn_like(weight),
    )


def test_weight_products_are_those_of_the_csr_matrix(geometry: ConvGeometry) -> None:
    x, weight, g = draw(geometry)
    matrix = weight_matrix(geometry, weight).to_dense()
    forward, backward = apply_weight(geometry, x, weight), apply_weight_adjoint(geometry, g, weight)
    for b in range(BATCH):
        assert_equal(forward[b].reshape(-1), matrix @ x[b].reshape(-1))
        assert_equal(backward[b].reshape(-1), matrix.mT @ g[b].reshape(-1))


def test_gradient_products_are_those_of_the_csr_matrix(geometry: ConvGeometry) -> None:
    x, weight, g = draw(geometry)
    matrix = gradient_matrix(geometry, g).to_dense()
    filters, channels = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
    forward, backward = apply_gradient(geometry, x, g), apply_weight_adjoint(geometry, g, weight)
    for group in range(geometry.groups):
        f = slice(group * filters, (group + 1) * filters)
        rows = matrix.reshape(geometry.out_channels, geometry.n_taps, -1)[f].reshape(filters * geometry.n_taps, -1)
        for c in range(channels):
            channel = group * channels + c
            assert_equal(forward[f, c].reshape(-1), rows @ x[:, channel].reshape(-1))
            assert_equal(backward[:, channel].reshape(-1), rows.mT @ weight[f, c].reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_keep_dtype_and_device(geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> None:
    options = {"dtype": dtype, "device": device}
    x, weight = random_input(geometry, BATCH, **options), random_weight(geometry, **options)
    g = random_grad_output(geometry, BATCH, **options)
    for result in (
        apply_weight(geometry, x, weight),
        apply_weight_adjoint(geometry, g, weight),
        apply_gradient(geometry, x, g),
    ):
        assert (result.dtype, result.device.type) == (dtype, device.type)


def test_non_contiguous_operands(geometry: ConvGeometry) -> None:
    x, weight, g = draw(geometry)

    def strided(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    assert_equal(apply_weight(geometry, strided(x), strided(weight)), apply_weight(geometry, x, weight))
    assert_equal(apply_weight_adjoint(geometry, strided(g), strided(weight)), apply_weight_adjoint(geometry, g, weight))
    assert_equal(apply_gradient(geometry, strided(x), strided(g)), apply_gradient(geometry, x, g))


@pytest.mark.parametrize(
    "numbers",
    [(3, 7, 224, 7, 2, 3), (1, 2, 130, 4, 4, 0), (4, 3, 99, 5, 2, 2), (2, 4, 100, 6, 3, 5), (3, 5, 70, 5, 2, 0)],
    ids=str,
)
def test_the_adjoint_by_stride_phases_is_the_adjoint(numbers: tuple[int, ...]) -> None:
    channels, filters, size, kernel, stride, padding = numbers
    g = ConvGeometry.create("test", channels, filters, (size, size - 1), (kernel, kernel), stride, padding)
    y, w = torch.randn(2, filters, *g.out_size), torch.randn(filters, channels, kernel, kernel)
    assert operators._phases_are_faster(g, y)
    found, expected = apply_weight_adjoint(g, y, w), apply_weight_adjoint(g, y.double(), w.double())
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) < 1e-6 * float(expected.norm())

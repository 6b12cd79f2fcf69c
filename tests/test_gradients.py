"""First and second derivatives of the builders."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from layers import (
    convolve,
    gradient_matrix,
    random_grad_output,
    random_input,
    random_mask,
    random_weight,
    sizes,
    weight_matrix,
)
from rconv_fast.constraints import ops
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import GEOMETRIES

SOME = ["same 3x3", "stride 2, odd input", "padding > input", "unlike axes", "groups 2", "1-D", "3-D"]


@pytest.mark.parametrize("name", SOME)
def test_values_differentiate_twice(name: str, device: torch.device) -> None:
    geometry, options = GEOMETRIES[name], {"dtype": torch.float64, "device": device}
    grad_output = random_grad_output(geometry, **options).requires_grad_()
    weight = random_weight(geometry, **options).requires_grad_()
    mask = random_mask(geometry, device=device)

    def gradient_values(g: torch.Tensor, **more: bool) -> torch.Tensor:
        return ops.gradient_components(g, geometry.input_size, geometry.kernel_size, **sizes(geometry), **more)[0]

    def weight_values(w: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return ops.weight_components(w, geometry.input_size, **sizes(geometry), **more)[0]

    for function, tensor in (
        (gradient_values, grad_output),
        (lambda g: gradient_values(g, drop_zeros=True), grad_output),
        (weight_values, weight),
        (lambda w: weight_values(w, mask=mask), weight),
    ):
        # Fast mode projects on random directions, which is enough for maps that copy.
        assert gradcheck(function, tensor, fast_mode=True)
        assert gradgradcheck(function, tensor, fast_mode=True)


def test_the_product_differentiates_like_the_convolution(geometry: ConvGeometry) -> None:
    x = random_input(geometry, 1, dtype=torch.float64)
    weight = random_weight(geometry, dtype=torch.float64).requires_grad_()
    output = convolve(geometry, x, weight)
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, weight, cotangent)
    product = weight_matrix(geometry, weight) @ x.reshape(-1, 1)
    (gradient,) = torch.autograd.grad(product, weight, cotangent.reshape(-1, 1))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_float32_gradients_are_those_of_float64(geometry: ConvGeometry) -> None:
    grad_output = random_grad_output(geometry)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = grad_output.detach().clone().to(dtype).requires_grad_()
        gradient_matrix(geometry, leaf).values().square().sum().backward()
        gradients.append(leaf.grad.double())
    single, double = gradients
    assert (single - double).norm() <= 1e-5 * double.norm()


def test_a_masked_row_sends_no_gradient() -> None:
    weight = torch.ones(1, 1, 2, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    weight_matrix(ConvGeometry.create("test", 1, 1, 4, 2), weight, mask=mask).values().sum().backward()
    assert weight.grad.tolist() == [[[2.0, 2.0]]]


def test_no_graph_without_requires_grad() -> None:
    values, _, _ = ops.gradient_components(torch.ones(1, 1, 3), 3, 1)
    assert not values.requires_grad
    with torch.no_grad():
        values, _, _ = ops.gradient_components(torch.ones(1, 1, 3, requires_grad=True), 3, 1)
    assert not values.requires_grad

"""recover_conv_input: the input of one convolution, what the result says of it, what bad arguments get."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from layers import convolve, gradient_matrix, random_grad_output, random_input, random_weight, sizes
from rconv_fast import ConvRecovery, RconvError, constraint_operator, recover, recover_conv_input
from rconv_fast.errors import ArgumentError, ArgumentTypeError
from rconv_fast.geometry import ConvGeometry
from rconv_fast.testing import geometry as make

DOUBLE = {"dtype": torch.float64}


class Layer:
    """A convolution, its private input, and everything that autograd says of them."""

    def __init__(self, geometry: ConvGeometry, batch: int = 1, **options: Any) -> None:
        options = {**DOUBLE, **options}
        self.geometry = geometry
        self.x = random_input(geometry, batch, **options)
        self.weight = random_weight(geometry, **options).requires_grad_()
        self.bias = torch.randn(geometry.out_channels, **options)
        output = convolve(geometry, self.x, self.weight)
        self.grad_output = random_grad_output(geometry, batch, **options)
        (self.grad_weight,) = torch.autograd.grad(output, self.weight, self.grad_output)
        self.output = output.detach() + self.bias.reshape(1, -1, *(1,) * geometry.ndim)

    def recover(self, **options: Any) -> ConvRecovery:
        return recover_conv_input(
            self.grad_weight,
            self.grad_output,
            self.geometry.input_size,
            **{**sizes(self.geometry), **options},
        )

    def recover_with_output(self, **options: Any) -> ConvRecovery:
        return self.recover(weight=self.weight, bias=self.bias, output=self.output, **options)

    def error(self, found: ConvRecovery) -> float:
        return float((found.input - self.x).abs().max())


ENOUGH = {
    "1-D": (make((2, 24), (30,), 5, stride=2, padding=2), 1),
    "2-D": (make((3, 32), (9, 8), 3, padding=1), 1),
    "3-D": (make((2, 40), (5, 4, 6), 3, padding=1), 1),
    "a batch": (make((3, 64), (8, 8), 3, padding=1), 3),
    "groups": (make((4, 48), (8, 6), 3, padding=1, groups=2), 1),
    "groups and a batch": (make((4, 120), (8, 6), 3, padding=1, groups=2), 2),
    "depthwise": (make((3, 90), (6, 6), 3, padding=1, groups=3), 1),
    "dilation": (make((2, 40), (9, 9), 3, padding=2, dilation=2), 1),
    "stride and dilation": (make((2, 40), (10, 7), 3, stride=2, padding=3, dilation=3), 1),
    "unlike axes": (make((2, 60), (9, 6), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 1),
}


@pytest.mark.parametrize(("geometry", "batch"), ENOUGH.values(), ids=ENOUGH.keys())
def test_gradients_alone(geometry: ConvGeometry, batch: int) -> None:
    layer = Layer(geometry, batch)
    found = layer.recover()
    assert layer.error(found) < 1e-10
    assert found.rank == found.unknowns == layer.x.numel()
    assert found.rows == layer.grad_weight.numel()
    assert found.determined.all()
    assert found.determined.shape == found.input.shape == layer.x.shape
    assert found.determined.dtype == torch.bool
    assert found.converged
    assert found.residual < 1e-13
    assert found.solver == "phase-cholesky"
    assert 1 <= found.condition < 1e6


FEW = {
    "1-D": (make((2, 4), (30,), 5, stride=2, padding=2), 1),
    "2-D": (make((3, 12), (16, 16), 5, stride=2, padding=2), 1),
    "3-D": (make((2, 3), (5, 4, 6), 3, padding=1), 1),
    "a batch": (make((3, 6), (8, 8), 3, padding=1), 3),
    "groups": (make((4, 8), (8, 6), 3, padding=1, groups=2), 2),
    "unlike axes": (make((2, 9), (9, 6), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 1),
}


@pytest.mark.parametrize(("geometry", "batch"), FEW.values(), ids=FEW.keys())
def test_outputs_join_in_where_gradients_do_not_suffice(geometry: ConvGeometry, batch: int) -> None:
    layer = Layer(geometry, batch)
    alone = layer.recover()
    assert alone.rank < alone.unknowns
    assert not alone.determined.all()
    assert layer.error(alone) > 1e-2
    found = layer.recover_with_output()
    assert layer.error(found) < 1e-8
    assert found.rank == found.unknowns
    assert found.determined.all()
    assert found.converged
    assert found.rows == layer.grad_weight.numel() + layer.output.numel()


def test_only_known_outputs_are_read() -> None:
    layer = Layer(make((3, 3), (10, 10), 5, padding=2))
    known = torch.rand_like(layer.output) < 0.5
    layer.output = torch.where(known, layer.output, 1e6)
    found = layer.recover_with_output(known=known)
    assert layer.error(found) < 1e-8
    assert found.rows == layer.grad_weight.numel() + int(known.sum())
    nothing = layer.recover_with_output(known=torch.zeros_like(known))
    assert nothing.rows == layer.grad_weight.numel()


def test_undetermined_values_are_the_minimum_norm_choice() -> None:
    layer = Layer(make((1, 2), (6, 6), 3, padding=1))
    found = layer.recover()
    assert (found.rank, found.unknowns) == (18, 36)
    assert not found.determined.any()
    assert found.input.norm() < layer.x.norm()
    rows = gradient_matrix(layer.geometry, layer.grad_output).to_dense()
    expected = torch.linalg.pinv(rows) @ layer.grad_weight.reshape(-1)
    torch.testing.assert_close(found.input.reshape(-1), expected)


def test_positions_that_no_offset_meets_are_open() -> None:
    layer = Layer(make((2, 16), (8, 8), 1, stride=2))
    found = layer.recover_with_output()
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[::2, ::2] = True
    assert torch.equal(found.determined, expected.expand_as(found.determined))
    assert float(found.input[~found.determined].abs().max()) < 1e-13
    assert float((found.input - layer.x)[found.determined].abs().max()) < 1e-12


@pytest.mark.parametrize("solver", ["auto", "direct", "hybrid"])
def test_solvers_agree(solver: str) -> None:
    layer = Layer(make((3, 40), (8, 8), 3, padding=1))
    found = layer.recover_with_output(solver=solver)
    assert layer.error(found) < 1e-10
    assert found.solver.startswith("cgls" if solver == "hybrid" else "phase")


def test_direct_leaves_the_outputs_aside() -> None:
    layer = Layer(make((3, 6), (8, 8), 3, padding=1))
    found = layer.recover_with_output(solver="direct")
    assert found.solver == "phase-svd"
    assert found.rows == layer.grad_weight.numel()
    assert not found.determined.any()


def test_results_have_the_dtype_and_device_of_the_gradients(dtype: torch.dtype, device: torch.device) -> None:
    layer = Layer(make((3, 40), (8, 8), 3, padding=1), dtype=dtype, device=device)
    found = layer.recover()
    assert (found.input.dtype, found.input.device.type) == (dtype, device.type)
    assert found.determined.device.type == device.type
    assert layer.error(found) < (1e-10 if dtype == torch.float64 else 1e-4)
    assert isinstance(found.rank, int)
    assert isinstance(found.residual, float)


def test_float32_data_are_solved_in_float64() -> None:
    """Rounding enters once, with the data: the answer is that of the rounded float64 system."""
    layer = Layer(make((3, 40), (8, 8), 3, padding=1), dtype=torch.float32)
    grad_weight = torch.nn.grad.conv2d_weight(
        layer.x.double(), layer.weight.shape, layer.grad_output.double(), padding=1
    )
    found = recover_conv_input(grad_weight, layer.grad_output, (8, 8), padding=1)
    assert layer.error(found) < 1e-6
    in_single = recover_conv_input(grad_weight, layer.grad_output, (8, 8), padding=1, dtype=torch.float32)
    assert layer.error(in_single) > layer.error(found)


def test_rtol_decides_what_counts_as_determined() -> None:
    layer = Layer(make((1, 40), (4, 4), 1))
    u, s, vh = torch.linalg.svd(layer.grad_output.reshape(40, 16), full_matrices=False)
    s[-1] = 1e-10 * s[0]
    layer.grad_output = ((u * s) @ vh).reshape(1, 40, 4, 4)
    layer.grad_weight = (layer.grad_output * layer.x).sum((0, 2, 3)).reshape(40, 1, 1, 1)
    assert layer.recover(solver="direct").rank == 16
    found = layer.recover(solver="direct", rtol=1e-8)
    assert found.rank == 15
    assert not found.determined.all()


def test_an_integer_input_size_is_one_axis() -> None:
    layer = Layer(make((2, 24), (30,), 5, stride=2, padding=2))
    found = recover_conv_input(layer.grad_weight, layer.grad_output, 30, stride=2, padding=2)
    assert layer.error(found) < 1e-10


def test_arguments_are_left_as_they_were() -> None:
    layer = Layer(make((3, 12), (8, 8), 3, padding=1))
    names = ("grad_weight", "grad_output", "weight", "bias", "output")
    before = {name: getattr(layer, name).detach().clone() for name in names}
    layer.recover_with_output()
    for name in names:
        assert torch.equal(getattr(layer, name), before[name]), name
    assert layer.weight.grad is None


def test_wrong_outputs_show_in_the_residual() -> None:
    layer = Layer(make((3, 12), (16, 16), 5, stride=2, padding=2))
    layer.output = layer.output + 0.1 * torch.randn_like(layer.output)
    assert layer.recover_with_output().residual > 1e-4


def nan_like(t: Tensor) -> Tensor:
    return torch.full_like(t, math.nan)


BAD = {
    "stride and shapes disagree": (
        {"stride": 2},
        ArgumentError,
        r"grad_output must have shape \(B, 12, 4, 4\)",
    ),
    "padding and shapes disagree": ({"padding": 0}, ArgumentError, "grad_output must have shape"),
    "negative padding": ({"padding": -1}, ArgumentError, "padding must be >= 0 on every axis"),
    "stride zero": ({"stride": 0}, ArgumentError, "stride must be >= 1 on every axis"),
    "stride of three axes": ({"stride": (1, 1, 1)}, ArgumentError, "stride must have 2 entries or be an int"),
    "groups that do not divide": ({"groups": 5}, ArgumentError, "groups must divide out_channels"),
    "no groups": ({"groups": 0}, ArgumentError, "groups must be >= 1"),
    "unknown solver": (
        {"solver": "magic"},
        ArgumentError,
        "solver must be one of auto, direct, hybrid, got 'magic'",
    ),
    "weight of another shape": ({"weight": torch.ones(12, 3, 3, 2)}, ArgumentError, "weight must have shape"),
    "output of another shape": (
        {"output": torch.ones(1, 12, 8, 7)},
        ArgumentError,
        "output must have grad_output's",
    ),
    "bias of another shape": ({"bias": torch.ones(11)}, ArgumentError, r"bias must have shape \(12,\)"),
    "known of another shape": (
        {"known": torch.ones(1, 12, 7, 8, dtype=torch.bool)},
        ArgumentError,
        "known must have shape",
    ),
    "known not bool": ({"known": torch.ones(1, 12, 8, 8)}, ArgumentTypeError, "known must be a bool tensor"),
    "output without weight": ({"weight": None}, ArgumentError, "weight must be given with output, got None"),
    "known without output": (
        {"output": None, "known": torch.ones(1, 12, 8, 8, dtype=torch.bool)},
        ArgumentError,
        "output must be given with known",
    ),
    "integer weight": (
        {"weight": torch.ones(12, 3, 3, 3, dtype=torch.int64)},
        ArgumentTypeError,
        "weight must be of a real",
    ),
    "NaN in the bias": (
        {"bias": torch.full((12,), math.nan)},
        ArgumentError,
        "bias must be finite, got NaN or Inf",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    layer = Layer(make((3, 12), (8, 8), 3, padding=1))
    given = {"weight": layer.weight, "bias": layer.bias, "output": layer.output, "padding": 1}
    check(kind, message, layer.grad_weight, layer.grad_output, (8, 8), **{**given, **change})


BAD_GRADIENTS = {
    "NaN": (lambda w, g: (nan_like(w), g), ArgumentError, "grad_weight must be finite, got NaN or Inf"),
    "infinite": (lambda w, g: (w, g / 0.0), ArgumentError, "grad_output must be finite, got NaN or Inf"),
    "zero": (lambda w, g: (w, 0 * g), ArgumentError, "grad_output must not be zero"),
    "a list": (
        lambda w, g: (w.tolist(), g),
        ArgumentTypeError,
        "grad_weight must be a torch.Tensor, got list",
    ),
    "integers": (
        lambda w, g: (w, g.long()),
        ArgumentTypeError,
        "grad_output must be of a real floating type",
    ),
    "complex": (lambda w, g: (w.to(torch.complex128), g), ArgumentTypeError, "grad_weight must be of a real"),
    "no spatial axis": (lambda w, g: (w[:, :, 0, 0], g), ArgumentError, "grad_weight must have shape"),
    "no batch": (lambda w, g: (w, g[0]), ArgumentError, "grad_output must have shape"),
    "an empty batch": (lambda w, g: (w, g[:0]), ArgumentError, "grad_output must .* B >= 1"),
    "another number of filters": (
        lambda w, g: (w[:5], g),
        ArgumentError,
        r"grad_output must have shape \(B, 5,",
    ),
    "another kernel": (lambda w, g: (w[..., :2], g), ArgumentError, "grad_output must have shape"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS.keys())
def test_bad_gradients(change: Any, kind: type[Exception], message: str) -> None:
    layer = Layer(make((3, 12), (8, 8), 3, padding=1))
    check(kind, message, *change(layer.grad_weight, layer.grad_output), (8, 8), padding=1)


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), (0, 8), (8, 9)], ids=str)
def test_bad_input_size(size: tuple[int, ...]) -> None:
    layer = Layer(make((3, 12), (8, 8), 3, padding=1))
    check(ArgumentError, "must", layer.grad_weight, layer.grad_output, size, padding=1)


def check(kind: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        recover_conv_input(*args, **kwargs)
    assert isinstance(caught.value, RconvError)
    assert isinstance(caught.value, TypeError if kind is ArgumentTypeError else ValueError)
    assert str(caught.value).startswith("recover_conv_input: ")
    assert "\n" not in str(caught.value)


def test_the_docstring_is_true() -> None:
    assert doctest.testmod(recover).failed == 0
    assert doctest.testmod(recover).attempted >= 6


def test_the_operator_is_the_system_that_is_solved() -> None:
    torch.manual_seed(3)
    x = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    conv = torch.nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=1).double()
    output = conv(x)
    known = torch.rand_like(output) < 0.7
    g = torch.randn_like(output)
    (grad_weight,) = torch.autograd.grad(output, conv.weight, g, retain_graph=True)
    given = {"weight": conv.weight, "bias": conv.bias, "output": output, "known": known}
    operator, rhs = constraint_operator(grad_weight, g, (7, 6), **given, stride=(2, 1), padding=1)
    assert operator.shape == (len(rhs), x.numel())
    assert np.allclose(operator @ x.numpy().ravel(), rhs.numpy())
    v, y = np.random.default_rng(0).normal(size=x.numel()), np.random.default_rng(1).normal(size=len(rhs))
    assert np.isclose(y @ (operator @ v), (operator.T @ y) @ v)
    found = scipy.sparse.linalg.lsmr(operator, rhs.numpy(), atol=1e-14, btol=1e-14, maxiter=2000)[0]
    solved = recover_conv_input(grad_weight, g, (7, 6), **given, stride=(2, 1), padding=1)
    assert np.abs(found - x.numpy().ravel()).max() < 1e-8
    assert np.abs(found - solved.input.numpy().ravel()).max() < 1e-8


def test_the_operator_names_itself_in_errors() -> None:
    g = torch.ones(1, 2, 4, 4)
    with pytest.raises(RconvError, match=r"^constraint_operator: weight must be given with output, got None$"):
        constraint_operator(torch.ones(2, 1, 3, 3), g, (4, 4), output=g, padding=1)

"""Every activation's inverse and derivative in terms of its output, against autograd; which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rconv_fast.layers import activation
from rconv_fast.layers.activation import ActivationRule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.registry import unsupported
from rconv_fast.layers.valley import GELU, LEFT, RIGHT, ValleyRule, valley_of_module

# Table 1 of R-CONV, then what else fits. Each module beside the functional calls that must mean the same.
TABLE_1 = {
    "Sigmoid": (nn.Sigmoid(), [("sigmoid", (), {})]),
    "LogSigmoid": (nn.LogSigmoid(), [("logsigmoid", (), {})]),
    "Tanh": (nn.Tanh(), [("tanh", (), {})]),
    "Softplus": (nn.Softplus(), [("softplus", (), {})]),
    "ReLU": (nn.ReLU(), [("relu", (), {}), ("relu", (True,), {}), ("relu_", (), {}), ("clamp", (0.0,), {})]),
    "LeakyReLU": (
        nn.LeakyReLU(0.2),
        [("leaky_relu", (0.2,), {}), ("leaky_relu", (), {"negative_slope": 0.2})],
    ),
    "ELU": (nn.ELU(), [("elu", (), {}), ("elu", (), {"inplace": True})]),
    "SELU": (nn.SELU(), [("selu", (), {})]),
}
EXTRAS = {
    "LeakyReLU by default": (nn.LeakyReLU(), [("leaky_relu", (), {})]),
    "LeakyReLU of slope 0": (nn.LeakyReLU(0.0), []),
    "LeakyReLU in place": (nn.LeakyReLU(0.1, inplace=True), [("leaky_relu", (0.1, True), {})]),
    "ELU 0.5": (nn.ELU(0.5), [("elu", (0.5,), {})]),
    "ELU 2": (nn.ELU(2.0), [("elu", (), {"alpha": 2.0})]),
    "CELU": (nn.CELU(), [("celu", (), {})]),
    "CELU 0.5": (nn.CELU(0.5), [("celu", (0.5,), {})]),
    "Softplus 3": (nn.Softplus(3.0, threshold=6.0), [("softplus", (3.0, 6.0), {})]),
    "Softsign": (nn.Softsign(), [("softsign", (), {})]),
    "Hardtanh": (nn.Hardtanh(), [("hardtanh", (), {}), ("clamp", (), {"min": -1.0, "max": 1.0})]),
    "Hardtanh of other ends": (nn.Hardtanh(-0.5, 2.0), [("hardtanh", (-0.5, 2.0), {})]),
    "ReLU6": (nn.ReLU6(), [("relu6", (), {}), ("hardtanh", (0.0, 6.0), {}), ("clamp", (0, 6), {})]),
    "Hardsigmoid": (nn.Hardsigmoid(), [("hardsigmoid", (), {})]),
    "RReLU": (nn.RReLU().eval(), []),
    "PReLU": (nn.PReLU(init=0.3).double(), []),
    "Identity": (nn.Identity(), []),
}
MODULES = {**TABLE_1, **EXTRAS}


@pytest.fixture(params=MODULES.values(), ids=MODULES.keys())
def module(request: pytest.FixtureRequest) -> nn.Module:
    return request.param[0]


def samples(dtype: torch.dtype = torch.float64) -> Tensor:
    """Pre-activations (1, 1, n) on both sides of every kink, none on one."""
    return torch.cat([torch.linspace(-7.03, 8.01, 301), torch.tensor([-1e-3, 1e-3])]).to(dtype)[None, None]


def forward_and_slope(function: Callable[[Tensor], Tensor], o: Tensor) -> tuple[Tensor, Tensor]:
    o = o.clone().requires_grad_()
    a = function(o.clone())
    (slope,) = torch.autograd.grad(a.sum(), o)
    return a.detach(), slope


def inverted(module: nn.Module) -> activation.Activation:
    found = activation.of_module(module)
    assert found is not None
    return found


def test_derivative_is_autograds(module: nn.Module) -> None:
    a, slope = forward_and_slope(module, samples())
    torch.testing.assert_close(inverted(module).derivative(a), slope, rtol=1e-9, atol=1e-14)


def test_inverse_undoes_the_forward(module: nn.Module) -> None:
    o = samples()
    a, slope = forward_and_slope(module, o)
    alive = slope > 0
    assert alive.sum() > 25
    found = inverted(module).inverse(a)[alive]
    # The rounding of a comes back divided by the slope.
    assert ((found - o[alive]).abs() <= 4e-16 * (1 + o[alive].abs() + a[alive].abs() / slope[alive])).all()


def test_range_holds_every_output(module: nn.Module) -> None:
    a, slope = forward_and_slope(module, samples())
    found = inverted(module)
    assert found.low <= float(a.min())
    assert float(a.max()) <= found.high
    flat = torch.isin(a[slope == 0], torch.tensor(found.flats, dtype=a.dtype))
    assert flat.all()


def test_kinks_are_where_the_derivative_jumps(module: nn.Module) -> None:
    found = inverted(module)
    o = torch.linspace(-8, 8, 160_001, dtype=torch.float64)[None, None] + 1e-6
    a, slope = forward_and_slope(module, o)
    jumps = (slope.diff().abs() > 0.01).nonzero()[:, 2]
    near = sorted({round(float(a[0, 0, j]), 3) + 0.0 for j in jumps})
    assert near == pytest.approx(sorted(found.kinks), abs=2e-3)


def test_dtype_is_kept(module: nn.Module, dtype: torch.dtype) -> None:
    a, _ = forward_and_slope(module.to(dtype), samples(dtype))
    module.double()
    found = inverted(module)
    assert found.derivative(a).dtype == dtype
    assert found.inverse(a).dtype == dtype


def test_an_unknown_output_stays_unknown() -> None:
    """Where the derivative is 0 an activation says nothing of its input, and nothing infinite comes out."""
    rule = ActivationRule(activation.sigmoid())
    o = torch.tensor([[-800.0, 0.3, 800.0]], dtype=torch.float64)
    known = rule.pull_value(Knowledge.full(torch.sigmoid(o)), 0, [None])
    assert known.weight[0].gt(0).tolist() == [False, True, False]
    assert known.value.isfinite().all()
    assert float(known.value[0, 1]) == pytest.approx(0.3, abs=1e-15)


CALLS = [(name, module, call) for name, (module, calls) in MODULES.items() for call in calls]


@pytest.mark.parametrize(
    ("module", "call"),
    [entry[1:] for entry in CALLS],
    ids=[f"{name}: {call[0]}{call[1]}{call[2] or ''}" for name, _, call in CALLS],
)
def test_functional_forms_are_the_modules(module: nn.Module, call: tuple) -> None:
    name, args, kwargs = call
    function = next(getattr(place, name) for place in (F, torch) if hasattr(place, name))
    a, slope = forward_and_slope(lambda o: function(o, *args, **kwargs), samples())
    expected, _ = forward_and_slope(module, samples())
    torch.testing.assert_close(a, expected, rtol=0, atol=1e-15)
    found, of_module = activation.of_function(name, *args, **kwargs), inverted(module)
    assert found is not None
    assert (found.low, found.high) == (of_module.low, of_module.high)
    assert (found.kinks, found.flats) == (of_module.kinks, of_module.flats)
    torch.testing.assert_close(found.derivative(a), slope, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["atan", "arctan"])
def test_arctan_has_no_module(name: str) -> None:
    a, slope = forward_and_slope(torch.atan, samples())
    found = activation.of_function(name)
    assert found is not None
    torch.testing.assert_close(found.derivative(a), slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.inverse(a), samples(), rtol=1e-12, atol=0)
    assert (found.low, found.high) == (-math.pi / 2, math.pi / 2)


def test_prelu_has_a_slope_a_channel() -> None:
    module = nn.PReLU(3).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.1, 0.5, 2.0]))
    o = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    a, slope = forward_and_slope(module, o)
    found = inverted(module)
    torch.testing.assert_close(found.derivative(a), slope, rtol=1e-15, atol=0)
    torch.testing.assert_close(found.inverse(a), o, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "module",
    [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()],
    ids=str,
)
def test_activations_that_fall_then_rise_are_inverted_on_either_side(module: nn.Module) -> None:
    assert activation.of_module(module) is None, "no function of the output alone"
    valley = valley_of_module(module)
    assert valley is not None
    o = torch.linspace(-2.9, 4, 301, dtype=torch.float64)
    a, slope = forward_and_slope(module, o)
    side = ValleyRule(valley).at(ValleyRule(valley).piece_of(o))
    # torch's own backward of Hardswish has its constants in single precision
    torch.testing.assert_close(side.pull_gradient(torch.ones_like(a), a, 0, o.shape), slope, rtol=1e-6, atol=1e-9)
    known = side.pull_value(Knowledge.full(a), 0, [None])
    clear = slope.abs() > 1e-3
    torch.testing.assert_close(known.value[clear], o[clear], rtol=1e-9, atol=1e-11)


def test_outputs_that_have_underflowed_say_nothing_of_their_inputs() -> None:
    o = torch.tensor([-60.0, 1.0], dtype=torch.float64)
    a = nn.functional.gelu(o)
    side = ValleyRule(GELU).at(torch.tensor([LEFT, RIGHT]))
    known = side.pull_value(Knowledge.full(a), 0, [None])
    assert known.weight[0] == 0 < known.weight[1]
    assert side.pull_gradient(torch.ones_like(a), a, 0, a.shape)[0] == 0


def test_glu_is_refused() -> None:
    assert "not monotone" in unsupported("GLU").reason


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(-0.1), nn.ELU(-1.0), nn.CELU(-1.0), nn.PReLU(init=-0.5), nn.Softplus(-1.0), nn.RReLU()],
    ids=["LeakyReLU(-0.1)", "ELU(-1)", "CELU(-1)", "PReLU(-0.5)", "Softplus(-1)", "RReLU in training mode"],
)
def test_parameters_that_make_an_activation_ambiguous_are_refused(module: nn.Module) -> None:
    assert activation.of_module(module) is None


def test_functional_forms_with_ambiguous_parameters_are_refused() -> None:
    for name, value in (("leaky_relu", -0.1), ("elu", -1.0), ("celu", -1.0)):
        assert activation.of_function(name, value) is None, name
    found = activation.of_function("leaky_relu", 0.0)
    assert found is not None
    assert found.flats == (0.0,)

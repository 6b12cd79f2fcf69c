"""Which side of its kink each activation is on: thresholds from the data, mistakes by the bias gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rconv_fast.layers import activation
from rconv_fast.layers.activation import Activation
from rconv_fast.patterns.threshold import OTHER_FACTORS, THRESHOLD_FACTOR, Snapped, snap

EPS = {torch.float64: 2**-52, torch.float32: 2**-23}
KINDS = {
    "ReLU": (activation.relu(), lambda o: o.clamp_min(0)),
    "ReLU6": (activation.clamp("ReLU6", 0.0, 6.0), lambda o: o.clamp(0, 6)),
    "Hardtanh": (activation.clamp("Hardtanh", -1.0, 1.0), lambda o: o.clamp(-1, 1)),
    "Hardsigmoid": (activation.hardsigmoid(), lambda o: (o / 6 + 0.5).clamp(0, 1)),
}


@dataclass
class Layer:
    """An activation that was recovered with noise: its true output a, the gradients, what a solve gave."""

    kind: Activation
    a: Tensor
    grad: Tensor
    recovered: Tensor

    @property
    def grad_bias(self) -> Tensor:
        return (self.grad * self.kind.derivative(self.a)).transpose(0, 1).flatten(1).sum(dim=1)

    def snap(self, grad_bias: Tensor | None, precision: float = EPS[torch.float64]) -> Snapped:
        return snap(self.kind, self.recovered, self.grad, grad_bias, precision=precision)

    def wrong_sides(self, value: Tensor) -> int:
        """Values whose derivative is not the true one."""
        return int((self.kind.derivative(value) != self.kind.derivative(self.a)).sum())


def make_layer(name: str, noise: float, shape: tuple[int, ...] = (2, 8, 6, 6)) -> Layer:
    """No true value within 1000 noises of a kink, unless a test puts it there."""
    kind, forward = KINDS[name]
    o = 4 * torch.randn(shape, dtype=torch.float64)
    a = forward(o)
    for flat in kind.flats:
        close = ((a - flat).abs() < 1000 * noise) & (a != flat)
        a = torch.where(close, flat, a)
    return Layer(kind, a, torch.randn_like(a), a + noise * (2 * torch.rand(shape, dtype=torch.float64) - 1))


@pytest.mark.parametrize("noise", [1e-14, 1e-10, 1e-5])
@pytest.mark.parametrize("name", KINDS)
def test_the_threshold_is_found_from_the_data(name: str, noise: float) -> None:
    layer = make_layer(name, noise)
    found = layer.snap(None)
    assert layer.wrong_sides(found.value) == 0
    flat = layer.kind.derivative(layer.a) == 0
    assert flat.any()
    assert torch.equal(found.value[flat], layer.a[flat]), "flat pieces are met exactly"
    assert float((found.value - layer.a).abs().max()) <= noise
    # Wide enough for the noise, far below the values; but never below the rounding of the gradients.
    assert noise < found.threshold < 100 * max(noise, 4e-15)


def test_the_threshold_is_never_below_the_rounding_of_the_gradients() -> None:
    layer = make_layer("ReLU", 1e-7)
    layer.recovered = layer.recovered.abs()  # nothing negative shows the noise
    precision = EPS[torch.float32]
    found = layer.snap(None, precision)
    assert found.threshold >= 4 * precision * float(layer.recovered.max())
    assert layer.wrong_sides(found.value) == 0
    assert layer.wrong_sides(layer.snap(None).value) > 100, "the case is one where the precision decides"


def test_noise_that_held_zeros_hide_is_found_by_the_bias_gradients() -> None:
    """A solve that held most zeros at exactly 0 leaves others above three times what is negative."""
    layer = make_layer("ReLU", 1e-12)
    zeros = (layer.a == 0).nonzero()[::4]
    layer.recovered[tuple(zeros.T)] = 2e-11
    decided = snap(layer.kind, layer.recovered, layer.grad, layer.grad_bias, precision=EPS[torch.float64])
    assert layer.wrong_sides(decided.value) > 10
    found = snap(
        layer.kind,
        layer.recovered,
        layer.grad,
        layer.grad_bias,
        precision=EPS[torch.float64],
        others=OTHER_FACTORS,
    )
    assert layer.wrong_sides(found.value) == 0
    assert found.factor > THRESHOLD_FACTOR


def bury(layer: Layer, index: tuple[int, ...], size: float) -> None:
    """Make a unit active, but so little that the threshold takes it for a zero."""
    layer.a[index] = size
    layer.recovered[index] = size


def lift(layer: Layer, index: tuple[int, ...], size: float) -> None:
    """Make a unit a zero whose noise is above the threshold."""
    layer.a[index] = 0.0
    layer.recovered[index] = size


NOISE = 1e-9
ONE = {"a small value": [(bury, (0, 1, 2, 3))], "a large noise": [(lift, (1, 4, 0, 5))]}
TWO = {
    "two small values": [(bury, (0, 3, 2, 2)), (bury, (1, 3, 4, 0))],
    "two large noises": [(lift, (0, 3, 2, 2)), (lift, (0, 3, 5, 5))],
    "one of each": [(bury, (0, 3, 2, 2)), (lift, (0, 3, 2, 3))],
    "two filters": [(bury, (0, 0, 2, 2)), (lift, (0, 7, 2, 3))],
    "two in each of two filters": [
        (bury, (0, 0, 2, 2)),
        (lift, (0, 0, 2, 3)),
        (lift, (1, 7, 0, 0)),
        (bury, (1, 7, 0, 1)),
    ],
}


@pytest.mark.parametrize("mistakes", {**ONE, **TWO}.values(), ids={**ONE, **TWO}.keys())
def test_the_bias_gradient_repairs_wrong_units(mistakes: list) -> None:
    layer = make_layer("ReLU", NOISE)
    for make, index in mistakes:
        make(layer, index, 2 * NOISE if make is bury else 5 * NOISE)
    by_threshold = layer.snap(None)
    assert layer.wrong_sides(by_threshold.value) == len(mistakes), "the threshold alone errs here"
    found = layer.snap(layer.grad_bias)
    assert layer.wrong_sides(found.value) == 0
    assert found.toggled == len(mistakes)
    assert found.mismatch is not None
    assert found.mismatch < 1e-12
    assert float((found.value - layer.a).abs().max()) <= 5 * NOISE
    assert torch.equal(found.value[layer.a == 0], torch.zeros_like(layer.a[layer.a == 0]))


@pytest.mark.parametrize("end", [0.0, 6.0])
def test_both_ends_of_relu6_are_repaired(end: float) -> None:
    layer = make_layer("ReLU6", NOISE)
    layer.a[1, 5, 3, 3] = layer.recovered[1, 5, 3, 3] = end + (2 * NOISE if end == 0 else -2 * NOISE)
    assert layer.wrong_sides(layer.snap(None).value) == 1
    found = layer.snap(layer.grad_bias)
    assert (layer.wrong_sides(found.value), found.toggled) == (0, 1)
    layer.a[1, 5, 3, 3] = end
    layer.recovered[1, 5, 3, 3] = end + (7 * NOISE if end == 0 else -7 * NOISE)
    assert layer.wrong_sides(layer.snap(None).value) == 1
    found = layer.snap(layer.grad_bias)
    assert (layer.wrong_sides(found.value), found.toggled) == (0, 1)
    assert float(found.value[1, 5, 3, 3]) == end


@pytest.mark.parametrize("count", [1, 2])
def test_signs_of_leaky_relu_are_repaired(count: int) -> None:
    """LeakyReLU has no flat piece: what noise can turn is the sign of small values."""
    o = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    kind = activation.leaky_relu(0.2)
    a = torch.where(o > 0, o, 0.2 * o)
    layer = Layer(kind, a, torch.randn_like(a), a.clone())
    for unit in range(count):
        sign = (-1) ** unit
        layer.a[0, 2, unit, 1] = sign * NOISE
        layer.recovered[0, 2, unit, 1] = -sign * NOISE
    untouched = layer.snap(None)
    assert torch.equal(untouched.value, layer.recovered)
    found = layer.snap(layer.grad_bias)
    assert (layer.wrong_sides(found.value), found.toggled) == (0, count)
    assert float((found.value - layer.a).abs().max()) <= NOISE


def test_right_units_are_left_alone() -> None:
    layer = make_layer("ReLU", NOISE)
    found = layer.snap(layer.grad_bias)
    assert found.toggled == 0
    assert found.mismatch is not None
    assert found.mismatch < 1e-12
    assert torch.equal(found.value, layer.snap(None).value)


def test_a_bias_gradient_that_nothing_explains_changes_nothing() -> None:
    layer = make_layer("ReLU", NOISE)
    wrong = layer.grad_bias
    wrong[2] += 0.123
    found = layer.snap(wrong)
    assert found.toggled == 0
    assert torch.equal(found.value, layer.snap(None).value)
    assert found.mismatch is not None
    assert found.mismatch > 1e-4, "and says so"


def test_rounded_bias_gradients_are_no_mistake() -> None:
    """float32 gradients miss the bias gradient by their rounding; no unit may be toggled for that."""
    layer = make_layer("ReLU", 1e-6)
    found = layer.snap(layer.grad_bias.float().double(), EPS[torch.float32])
    assert found.toggled == 0
    assert layer.wrong_sides(found.value) == 0


def test_wrong_units_are_found_behind_rounded_gradients() -> None:
    layer = make_layer("ReLU", 1e-6)
    bury(layer, (0, 1, 2, 3), 2e-6)
    precision = EPS[torch.float32]
    assert layer.wrong_sides(layer.snap(None, precision).value) == 1
    found = layer.snap(layer.grad_bias.float().double(), precision)
    assert (layer.wrong_sides(found.value), found.toggled) == (0, 1)


def test_smooth_activations_are_only_clamped_to_their_range() -> None:
    a = torch.tensor([[-1e-9, 0.3, 1 + 1e-9]], dtype=torch.float64)
    found = snap(activation.sigmoid(), a, torch.ones_like(a), None, precision=EPS[torch.float64])
    assert found.value.tolist() == [[0.0, 0.3, 1.0]]

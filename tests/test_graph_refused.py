"""Models that cannot be read are refused by name; containers and wrappers of logits are looked through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import assert_recovered, attack, gradients_of, photo
from rconv_fast import Inversion, invert
from rconv_fast.errors import ArgumentError
from rconv_fast.losses import logits_in
from small_networks import CLASSES, SIZE, Network, functional


def stopped(model: nn.Module, shape: tuple[int, ...] = (3, SIZE, SIZE)) -> Inversion:
    """What is said of a model that cannot be read, whatever its gradients."""
    model.double()
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    result = invert(model, gradients, shape)
    assert result.inputs is None
    assert not result.verified
    assert "\n" not in result.reason
    return result


def test_shared_parameters_are_refused() -> None:
    shared = nn.Conv2d(24, 24, 3, 1, 1)

    def forward(net: Network, x: Tensor) -> Tensor:
        x = F.relu(net.shared(F.relu(net.conv1(x))))
        return net.fc(F.relu(net.conv2(F.relu(net.shared(x)))).flatten(1))

    model = Network(forward, shared=shared).double()
    result = attack(model, photo(SIZE)).result
    assert result.stops_at == "shared"
    assert "used more than once" in result.reason
    assert set(result.features) == {"fc", "conv2"}


def test_tied_weights_are_refused() -> None:
    model = Network(functional, other=nn.Conv2d(3, 24, 5, 2, 2))
    model.other.weight = model.conv1.weight
    model.written = lambda net, x: functional(net, x + 0 * net.other(x).mean((1, 2, 3), keepdim=True))
    result = attack(model.double(), photo(SIZE)).result
    assert result.inputs is None
    assert "used more than once" in result.reason


def test_several_inputs_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(torch.flatten(x + y, 1))

    assert "several inputs" in stopped(Two()).notes[0]


def test_an_optional_second_input_takes_its_default() -> None:
    class Scaled(Network):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return functional(self, x * scale)

    assert_recovered(Scaled(), photo(SIZE))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, x: (y, x),
        lambda y, x: {"features": x, "logits": y},
        lambda y, _: [{"out": y}],
        lambda y, _: y[None][0],
    ],
    ids=["tuple", "dict", "list of a dict", "reshaped"],
)
def test_logits_in_a_container_are_found(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    model = Network(lambda net, x: wrap(functional(net, x), x)).double()

    def loss(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_in(out), y)

    x = photo(SIZE)
    assert invert(model, gradients_of(model, x, loss=loss), x.shape[1:]).verified


def test_a_model_that_returns_nothing_of_its_input_is_named() -> None:
    assert "no tensor that depends on its input" in stopped(Network(lambda net, _: net.fc.weight)).notes[0]


def test_control_flow_on_values_is_refused() -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        return functional(net, x if x.sum() > 0 else -x)

    assert "control flow" in stopped(Network(forward)).notes[0]


@pytest.mark.parametrize("shape", [(1, SIZE, SIZE), (3, 2 * SIZE, SIZE), (3, 1, 1), (3,)], ids=str)
def test_a_shape_the_model_does_not_take(shape: tuple[int, ...]) -> None:
    model = Network(functional).double()
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ArgumentError, match="input_shape must be one that the model accepts") as caught:
        invert(model, gradients, shape)
    assert str(caught.value).endswith(f"got {shape}")


WRAPPED = {
    "log_softmax and nll": (nn.LogSoftmax(1), "nll", F.nll_loss),
    "log_softmax and cross entropy": (nn.LogSoftmax(1), "cross_entropy", F.cross_entropy),
    "sigmoid and bce": (nn.Sigmoid(), "binary_cross_entropy", F.binary_cross_entropy),
}


@pytest.mark.parametrize(("wrapper", "name", "loss"), WRAPPED.values(), ids=WRAPPED.keys())
def test_what_wraps_the_logits_is_looked_through(
    wrapper: nn.Module, name: str, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    classes = 1 if name == "binary_cross_entropy" else CLASSES
    model = nn.Sequential(nn.Conv2d(3, 48, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 36, classes), wrapper)
    x = photo(SIZE)
    y = torch.ones(1, 1).double() if classes == 1 else torch.tensor([3])
    result = invert(model.double(), gradients_of(model, x, y, loss), x.shape[1:], loss=name)
    assert result.verified, result.summary()
    assert torch.equal(result.labels.reshape(-1).double(), y.reshape(-1).double())

"""How a model's forward is read: whatever way it is written, and refused by name where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import assert_recovered, attack, gradients_of, photo
from rconv_fast import invert
from rconv_fast.walk.reader import build_graph
from small_networks import CLASSES, SIZE, Network, functional


def methods(net: Network, x: Tensor) -> Tensor:
    x = net.conv1(x).relu()
    x = net.conv2(x).sigmoid()
    return net.fc(x.view(x.size(0), -1))


def reshape_by_shape(net: Network, x: Tensor) -> Tensor:
    x = net.conv2(net.conv1(x).tanh()).relu()
    n = x.shape[0]
    return net.fc(x.reshape(n, x.shape[1] * 36))


def channels_last_and_back(net: Network, x: Tensor) -> Tensor:
    x = F.relu(net.conv1(x)).permute(0, 2, 3, 1).contiguous()
    x = x.transpose(2, 3).transpose(1, 2).transpose(1, 3).swapaxes(2, 3).clone()
    x = F.relu(net.conv2(x.permute(0, 2, 3, 1)))
    return net.fc(x.permute(0, 3, 1, 2).flatten(1))


def unsqueezed(net: Network, x: Tensor) -> Tensor:
    x = F.relu(net.conv1(x)).unsqueeze(1).squeeze(1)
    return net.fc(F.relu(net.conv2(x)).flip(2).roll(1, 3).flatten(start_dim=1))


def normalised(net: Network, x: Tensor) -> Tensor:
    """Pre-processing inside the model."""
    x = (x - 0.45) / 0.225
    return functional(net, 2 * x + 1)


def functional_convolution(net: Network, x: Tensor) -> Tensor:
    x = F.leaky_relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, stride=2, padding=2), 0.2)
    x = F.relu(F.conv2d(x, net.conv2.weight, bias=net.conv2.bias, padding=1))
    return F.linear(x.flatten(1), net.fc.weight, net.fc.bias)


def functional_dropout(net: Network, x: Tensor) -> Tensor:
    return functional(net, F.dropout(x, 0.5, training=False))


def padded_by_hand(net: Network, x: Tensor) -> Tensor:
    x = F.pad(x, (1, 1, 1, 1))
    return functional(net, x[:, :, 1:-1, 1:-1])


WRITTEN = (
    functional,
    methods,
    reshape_by_shape,
    channels_last_and_back,
    unsqueezed,
    normalised,
    functional_convolution,
    functional_dropout,
    padded_by_hand,
)


@pytest.mark.parametrize("forward", WRITTEN, ids=lambda forward: forward.__name__)
def test_every_way_to_write_a_forward(forward: Callable[..., Tensor]) -> None:
    assert_recovered(Network(forward), photo(SIZE))


def test_modules_are_taken_in_the_order_of_use() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_head = nn.Linear(48 * 36, CLASSES)
            self.b_second = nn.Conv2d(24, 48, 3, 1, 1)
            self.unused_activation = nn.GELU()
            self.c_first = nn.Conv2d(3, 24, 5, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b_second(F.relu(self.c_first(x))))
            return self.a_head(x.flatten(1))

    done = assert_recovered(Backwards(), photo(SIZE))
    assert [layer.name for layer in done.result.layers] == ["b_second", "c_first"]


def test_one_activation_module_used_many_times() -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        return net.fc(net.act(net.conv2(net.act(net.conv1(x)))).flatten(1))

    assert_recovered(Network(forward, act=nn.ReLU()), photo(SIZE))
    assert_recovered(Network(forward, act=nn.ReLU(inplace=True)), photo(SIZE))


def test_in_place_activations_and_sums() -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x), inplace=True)
        y = net.conv2(x)
        y += net.skip(x)
        return net.fc(y.relu_().flatten(1))

    assert_recovered(Network(forward, skip=nn.Conv2d(24, 48, 1)), photo(SIZE))


def test_concatenated_branches() -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(net.left(x)), torch.tanh(net.right(x))], dim=1)
        return net.fc(F.relu(net.conv2(x)).flatten(1))

    branches = {"left": nn.Conv2d(3, 16, 5, 2, 2), "right": nn.Conv2d(3, 8, 3, 2, 1)}
    network = Network(forward, **branches)
    del network.conv1
    done = assert_recovered(network, photo(SIZE))
    assert {layer.name for layer in done.result.layers} == {"conv2", "left + right"}


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: a + b, lambda a, b: b - a, torch.add, torch.sub, lambda a, b: a.add(b), lambda a, b: (-a).sub(b)],
    ids=["a + b", "b - a", "torch.add", "torch.sub", "add method", "negated and sub method"],
)  # fmt: skip
def test_residual_sums(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x))
        x = F.relu(combine(net.conv2(x), net.skip(x)))
        return net.fc(x.flatten(1))

    assert_recovered(Network(forward, skip=nn.Conv2d(24, 48, 1, bias=False)), photo(SIZE))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("first", [True, False], ids=["a", "b"])
def test_a_known_branch_leaves_the_other_one_known(first: bool, sign: int) -> None:
    """The head sees one branch by itself and the sum: the other branch's outputs are equations as well."""

    def forward(net: Network, x: Tensor) -> Tensor:
        a, b = net.left(x), torch.tanh(net.right(x))
        a, b = (a, b) if first else (b, a)
        total = a + b if sign > 0 else a - b
        seen = b if first else a
        return net.fc(torch.cat([F.relu(total), seen], 1).flatten(1))

    branches = {"left": nn.Conv2d(3, 12, 5, 2, 2), "right": nn.Conv2d(3, 12, 3, 2, 1), "fc": nn.Linear(864, CLASSES)}
    network = Network(forward, **branches)
    del network.conv1, network.conv2
    assert_recovered(network, photo(SIZE))


def test_nested_and_listed_modules() -> None:
    class Block(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.body = nn.ModuleList([nn.Conv2d(*sizes), nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.body:
                x = part(x)
            return x

    blocks = nn.Sequential(Block(3, 24, 5, 2, 2), nn.Sequential(Block(24, 48, 3, 1, 1)))
    model = nn.Sequential(blocks, nn.Flatten(), nn.Linear(48 * 36, CLASSES))
    done = assert_recovered(model, photo(SIZE))
    assert [layer.name for layer in done.result.layers] == ["0.1.0.body.0", "0.0.body.0"]


def test_subclasses_of_layers() -> None:
    class Named(nn.Conv2d):
        """Keeps its parent's forward."""

    class Centred(nn.Conv2d):
        """Calls another forward, which is traced into."""

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x - 0.5, self.weight, self.bias, self.stride, self.padding)

    model = nn.Sequential(
        Centred(3, 24, 5, 2, 2), nn.ReLU(), Named(24, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, CLASSES),
    )  # fmt: skip
    assert_recovered(model, photo(SIZE))


PADDINGS = {
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, pointwise": {"kernel_size": 1, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate, unlike axes": {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "circular, strided": {"kernel_size": 5, "padding": 2, "padding_mode": "circular", "stride": 2},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own
@pytest.mark.parametrize("options", PADDINGS.values(), ids=PADDINGS.keys())
@pytest.mark.parametrize("place", ["first layer", "hidden layer"])
def test_padding_modes(options: dict, place: str) -> None:
    convs = [nn.Conv2d(3, 32, **options), nn.Conv2d(32, 64, 3, padding=1)]
    if place == "hidden layer":
        convs = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, **options)]
    body = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten())
    features = body(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    assert_recovered(nn.Sequential(*body, nn.Linear(features, CLASSES)), photo(SIZE))


REARRANGEMENTS = {
    "zero padding": nn.ZeroPad2d((1, 2, 0, 1)),
    "constant padding of 0": nn.ConstantPad2d(1, 0.0),
    "reflection padding": nn.ReflectionPad2d(2),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(2),
    "channel shuffle": nn.ChannelShuffle(4),
    "nearest upsampling": nn.Upsample(scale_factor=2),
    "flatten and back": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (24, 6, 6))),
    "identity": nn.Identity(),
    "dropout in evaluation mode": nn.Dropout2d(0.5).eval(),
}


@pytest.mark.parametrize("layer", REARRANGEMENTS.values(), ids=REARRANGEMENTS.keys())
def test_layers_that_only_move_values(layer: nn.Module) -> None:
    first = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), layer)
    channels = first(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    body = nn.Sequential(first, nn.Conv2d(channels, 48, 3, 1, 1), nn.ReLU(), nn.Flatten())
    features = body(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    assert_recovered(nn.Sequential(body, nn.Linear(features, CLASSES)), photo(SIZE))


def test_steps_are_in_forward_order_with_their_operands() -> None:
    model = Network(functional).double()
    graph = build_graph(model, gradients_of(model, photo(SIZE)), (3, SIZE, SIZE), 1)
    assert [step.label for step in graph.steps.values()] == [
        "x", "conv1", "relu", "conv2", "relu_1", "flatten", "fc",
    ]  # fmt: skip
    names = list(graph.steps)
    assert graph.input == names[0]
    assert graph.output == names[-1]
    for before, step in zip(names, list(graph.steps.values())[1:], strict=False):
        assert step.inputs == (before,)
        assert graph.consumers[before] == [(step.name, 0)]
    assert graph.steps["conv2"].shape == (1, 48, 6, 6)


class Skip(nn.Module):
    """``f(x + g(x))``."""

    def __init__(self, inside: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inside, self.after = inside, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inside(x))


def test_every_way_through_residual_blocks_is_gone_once() -> None:
    """Forty blocks have 2^40 ways through them."""
    torch.manual_seed(0)
    blocks = [Skip(nn.Conv2d(6, 6, 1), nn.LeakyReLU(0.2)) for _ in range(40)]
    model = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), *blocks, nn.Flatten(), nn.Linear(24, 5)).double()
    assert attack(model, photo(4, 1, 1)).result.verified


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


class Auxiliary(nn.Module):
    """Two heads and a named tuple, as torchvision's GoogLeNet has in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.other = nn.Conv2d(3, 24, 5, 2, 2), nn.Linear(24 * 36, CLASSES), nn.Linear(24 * 36, 4)

    def forward(self, x: Tensor) -> Outputs:
        x = F.leaky_relu(self.conv(x), 0.2).flatten(1)
        return Outputs(self.fc(x), self.other(x))


def test_logits_in_a_named_tuple_are_read() -> None:
    model, x = Auxiliary().double(), photo(SIZE)
    shared = torch.autograd.grad(F.cross_entropy(model(x).logits, torch.tensor([3])), list(model.parameters())[:4])
    assert invert(model, {**dict(zip(dict(model.named_parameters()), shared, strict=False))}, x.shape[1:]).verified

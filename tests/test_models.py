"""The papers' networks: their shapes, their parameters, their determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rconv_fast import models
from rconv_fast.errors import ArgumentError
from rconv_fast.geometry import ConvGeometry

# filters, kernels, strides, features in front of the head, outputs: figure 1 of the paper and the notebooks.
TABLE: dict[str, tuple[list[int], list[int], list[int], int, int]] = {
    "lenet": ([12, 12, 12, 12], [5] * 4, [2, 2, 1, 1], 768, 100),
    "lenet_o": ([12, 16, 12, 3], [5] * 4, [2, 2, 1, 1], 192, 100),
    "lenet_o_notebook": ([12, 16, 3, 3], [5] * 4, [2, 2, 1, 1], 192, 100),
    "lenet_notebook": ([12, 16, 12, 12], [5] * 4, [2, 2, 1, 1], 768, 100),
    "lenet_4_relu": ([12, 22, 3, 3], [5] * 4, [2, 2, 1, 1], 192, 100),
    "lenet_all_relu": ([77, 22, 3, 3], [5] * 4, [2, 2, 1, 1], 192, 100),
    "cnn6": ([12, 36, 36, 36, 64, 128], [4, 3, 3, 3, 3, 3], [2, 2, 1, 1, 2, 1], 3200, 1),
    "cnn6_d": ([12, 20, 36, 36, 64, 128], [4, 3, 3, 3, 3, 3], [2, 2, 1, 1, 2, 1], 3200, 1),
    "cnn6_o": ([12, 16, 3, 3, 3, 3], [5] * 6, [2, 2, 1, 1, 1, 1], 192, 10),
    "cnn3": ([32, 64, 128], [5, 5, 3], [2, 2, 2], 2048, 100),
    "cnn4_224": ([32, 256, 256, 256], [7, 5, 5, 3], [2, 2, 2, 2], 50176, 100),
    "patch_cnn_224": ([192, 256, 256], [4, 5, 3], [4, 2, 2], 50176, 100),
}
POOLED: dict[str, tuple[list[int], tuple[int, ...], list[int]]] = {  # filters, input shape, fully connected widths
    "fedavg_cnn": ([32, 64], (1, 28, 28), [3136, 512]),
    "lenet5": ([6, 16], (1, 28, 28), [400, 120, 84]),
    "flower_tutorial": ([6, 16], (3, 32, 32), [400, 120, 84]),
    "vgg_block": ([32, 64, 128], (3, 32, 32), [8192]),
    "gap_cnn": ([64, 128, 256], (3, 32, 32), [256]),
}
LEAKY_FIRST = {"lenet_o": 2, "lenet_o_notebook": 2, "lenet_notebook": 2, "lenet_4_relu": 1, "cnn6_o": 2}


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_every_model_is_in_the_table() -> None:
    assert set(models.MODELS) == {*TABLE, *POOLED}


@pytest.mark.parametrize("name", TABLE)
def test_shapes_are_those_of_the_papers(name: str) -> None:
    filters, kernels, strides, features, outputs = TABLE[name]
    model = models.MODELS[name](dtype=torch.float32)
    convs = convolutions(model)
    assert [c.out_channels for c in convs] == filters
    assert [c.kernel_size for c in convs] == [(k, k) for k in kernels]
    assert [c.stride for c in convs] == [(s, s) for s in strides]
    assert [c.in_channels for c in convs] == [3, *filters[:-1]]
    assert (model.fc.in_features, model.fc.out_features) == (features, outputs)
    side = 224 if name.endswith("224") else 32
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, outputs)


@pytest.mark.parametrize("name", POOLED)
def test_networks_as_people_train_them(name: str) -> None:
    filters, shape, widths = POOLED[name]
    model = models.MODELS[name](dtype=torch.float32)
    assert [c.out_channels for c in convolutions(model)] == filters
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)] == widths
    assert model(torch.zeros(2, *shape)).shape[0] == 2


@pytest.mark.parametrize("name", [n for n in TABLE if not n.endswith("224")])
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid), ("tanh", nn.Tanh)])
def test_activation_stands_where_the_papers_have_it(name: str, activation: str, kind: type[nn.Module]) -> None:
    model = models.MODELS[name](activation)
    found = [m for n, m in model.named_children() if n.startswith("act")]
    n_leaky = LEAKY_FIRST.get(name, 0)
    assert all(isinstance(m, nn.LeakyReLU) and m.negative_slope == 0.2 for m in found[:n_leaky])
    assert all(isinstance(m, kind) for m in found[n_leaky:])
    assert len(found) == len(TABLE[name][0])


@pytest.mark.parametrize("name", ["cnn6", "cnn6_d"])
def test_r_gap_networks_have_no_biases(name: str) -> None:
    assert not any("bias" in n for n, _ in models.MODELS[name]().named_parameters())


def test_uniform_initialisation_is_the_papers() -> None:
    values = torch.cat([p.flatten() for p in models.lenet_o().parameters()])
    assert values.dtype == torch.float64
    assert values.abs().max() <= 0.5
    # U(-0.5, 0.5): mean 0, variance 1/12, within five standard errors of about 30 000 draws.
    assert values.mean().abs() < 5 * math.sqrt(1 / 12 / len(values))
    assert abs(values.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(values))


def test_torch_initialisation_has_torchs_bounds() -> None:
    model = models.cnn3()
    for layer, reference in ((model.conv2, nn.Conv2d(32, 64, 5)), (model.fc, nn.Linear(2048, 100))):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for values, other in (
            (layer.weight.detach(), reference.weight.detach()),
            (layer.bias.detach(), reference.bias.detach()),
        ):
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.9 * bound
            assert float(values.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.1)


def test_seed_decides_and_global_state_is_left_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b, other = models.lenet_o(seed=3), models.lenet_o(seed=3), models.lenet_o(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv1.weight, other.conv1.weight)


def test_generator_is_used_and_advanced() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = models.lenet_o(seed=generator), models.lenet_o(seed=generator)
    assert torch.equal(first.conv1.weight, models.lenet_o(seed=3).conv1.weight)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_float32_model_is_the_rounded_float64_one() -> None:
    double, single = models.cnn3(), models.cnn3(dtype=torch.float32)
    assert all(torch.equal(p.float(), q) for p, q in zip(double.parameters(), single.parameters(), strict=True))


def test_layers_have_the_rows_they_promise() -> None:
    """Where a docstring says the gradient constraints suffice, each stride phase has rows for its pixels."""

    def poorest_phase(model: nn.Sequential, side: int) -> list[float]:
        ratios = []
        for c in convolutions(model):
            g = ConvGeometry.create(
                "test", c.in_channels, c.out_channels, (side, side), c.kernel_size, c.stride, c.padding
            )
            ratios.append(min(c.out_channels * p.n_taps / p.n_positions for p in g.phases))
            side = g.out_size[0]
        return ratios

    assert min(poorest_phase(models.lenet_all_relu(), 32)) >= 1
    assert poorest_phase(models.lenet_o(), 32)[0] < 1
    assert min(poorest_phase(models.cnn3(), 32)[1:]) >= 4  # a batch of four behind the first layer
    assert min(poorest_phase(models.cnn4_224(dtype=torch.float32), 224)[2:]) >= 1
    assert min(poorest_phase(models.patch_cnn_224(dtype=torch.float32), 224)[1:]) >= 1


@pytest.mark.parametrize("name", models.FIRST_LAYERS)
def test_first_layers_are_torchvisions(name: str) -> None:
    sizes = {"resnet": (64, 112), "vgg": (64, 224), "alexnet": (64, 55), "convnext": (96, 56)}
    filters, side = sizes[name]
    geometry = models.FIRST_LAYERS[name].geometry
    assert (geometry.out_channels, geometry.out_size) == (filters, (side, side))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rellu"}, r"lenet_o: activation must be one of relu, .*, got rellu$"),
        ({"init": "xavier"}, r"lenet_o: init must be 'uniform' or 'torch', got 'xavier'$"),
        ({"n_classes": 0}, r"lenet_o: n_classes must be >= 1, got 0$"),
        ({"classes": 10}, r"lenet_o: options must be among .*, got classes$"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        models.lenet_o(**options)

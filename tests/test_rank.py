"""Counts of equations: against numerical ranks, against the paper's rule, against what `invert` recovers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attacks import gradients_of
from layers import gradient_matrix, random_grad_output
from rconv_fast import RconvError, invert
from rconv_fast.audit import LayerRank, rank_analysis
from rconv_fast.audit.tally import tally
from rconv_fast.geometry import ConvGeometry

GEOMETRIES = [
    ConvGeometry.create("test", 1, 5, (9, 9), 3, 1, 1),
    ConvGeometry.create("test", 1, 6, (8, 9), 3, 2, 1),
    ConvGeometry.create("test", 1, 7, (10, 10), 3, 3, 0),
    ConvGeometry.create("test", 1, 5, (12, 7), (5, 2), (2, 3), (2, 0)),
    ConvGeometry.create("test", 1, 40, (9, 9), 3, 2, 1, 2),
    ConvGeometry.create("test", 1, 9, (8, 8), 1, 2, 0),
    ConvGeometry.create("test", 1, 4, (20,), 4, 3, 2),
    ConvGeometry.create("test", 1, 3, (5, 4, 6), 2, 2, 1),
    ConvGeometry.create("test", 1, 80, (4, 4), 4, 1, 0),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bound_is_the_rank_of_the_gradient_constraints(geometry: ConvGeometry, batch: int) -> None:
    torch.manual_seed(0)
    grad = random_grad_output(geometry, batch, dtype=torch.float64)
    samples = [gradient_matrix(geometry, g[None]).to_dense() for g in grad]
    assert tally(geometry, batch, geometry.out_channels).rank == int(torch.linalg.matrix_rank(torch.cat(samples, 1)))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_reached_positions_are_the_columns_with_an_entry(geometry: ConvGeometry) -> None:
    grad = random_grad_output(geometry, 1, dtype=torch.float64)
    columns = gradient_matrix(geometry, grad).to_dense().abs().sum(0)
    assert tally(geometry, 1, geometry.out_channels).reached == int((columns > 0).sum())


def test_one_phase_is_short_where_the_papers_count_is_not() -> None:
    geometry = ConvGeometry.create("test", 1, 128, (28, 28), 3, 2, 1)
    counted = tally(geometry, 1, 128)
    assert counted.gradients == 1152 >= 784
    assert (128, 196) in counted.phases
    assert counted.rank == 784 - (196 - 128)
    wider = tally(ConvGeometry.create("test", 1, 256, (28, 28), 3, 2, 1), 1, 256)
    assert wider.rank == 784


def strided(filters: int, channels: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(filters * 16, 12)
    ).double()


class Bottleneck(nn.Module):
    """A residual block with one filter inside: few equations there, all values by the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.fc = nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 3, 1, 1), nn.Linear(100, 12)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(x + self.wide(self.act(self.narrow(x)))).flatten(1))


def verified(model: nn.Module, x: Tensor) -> bool:
    try:
        return invert(model, gradients_of(model, x), x.shape[1:]).verified
    except RconvError:
        return False


def by_name(layers: list[LayerRank]) -> dict[str, LayerRank]:
    return {layer.name: layer for layer in layers}


def test_paper_says_recoverable_and_it_is_not() -> None:
    model, x = strided(10), torch.rand(1, 16, 8, 8, dtype=torch.float64)
    layer = by_name(rank_analysis(model, (16, 8, 8)))["0"]
    assert layer.paper_says
    assert not layer.determined
    assert layer.rank_bound == 16 * (10 + 16 + 16 + 16) + 80
    assert not verified(model, x)


def test_wide_enough_for_every_phase_is_recovered() -> None:
    model, x = strided(24), torch.rand(1, 16, 8, 8, dtype=torch.float64)
    assert by_name(rank_analysis(model, (16, 8, 8)))["0"].determined
    assert verified(model, x)


def test_paper_says_safe_and_it_is_not() -> None:
    torch.manual_seed(0)
    model, x = Bottleneck().double(), torch.rand(1, 4, 5, 5, dtype=torch.float64)
    layer = by_name(rank_analysis(model, (4, 5, 5)))["narrow"]
    assert not layer.paper_says
    assert layer.determined
    assert verified(model, x)


def test_only_positions_that_no_output_reads_are_open() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 3, 2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(64 * 9, 10))
    layer = rank_analysis(model, (1, 8, 8))[0]
    assert layer.unreached == 15
    assert layer.rank_bound == 49
    assert not layer.determined
    assert "read by no output" in layer.reason


@pytest.mark.parametrize(
    ("batch", "enough", "stops"), [(5, True, False), (6, True, True), (9, True, True), (10, False, True)]
)
def test_head_separates_half_as_many_samples_as_classes_and_perhaps_up_to_one_fewer(
    batch: int, enough: bool, stops: bool
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 10))
    head = rank_analysis(model, (20,), batch_size=batch)[-1]
    assert head.determined == enough
    assert head.stops == stops


def test_layer_without_a_method_is_not_covered() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LayerNorm([6, 6]), nn.Flatten(), nn.Linear(288, 10))
    layer = by_name(rank_analysis(model, (1, 8, 8)))["1"]
    assert not layer.covered
    assert not layer.determined
    assert layer.reason


def test_structure_needs_no_numbers_and_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4096, 7, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4096 * 109**2, 1000))
    model[0].register_forward_hook(lambda *_: pytest.fail("a hook of the caller ran"))
    layers = rank_analysis(model, (3, 224, 224), batch_size=4)
    assert [layer.name for layer in layers] == ["0", "3"]
    assert layers[1].gradient_constraints == math.prod(model[3].weight.shape)
    assert len(model[0]._forward_hooks) == 1


class Block(nn.Module):
    """A residual block whose values are as many as can be read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv(x))


def test_deep_networks_are_counted() -> None:
    with torch.device("meta"):
        blocks = [Block() for _ in range(300)]
        model = nn.Sequential(nn.Conv2d(1, 4, 1), *blocks, nn.Flatten(), nn.Linear(64, 10))
    assert len(rank_analysis(model, (1, 4, 4))) == 302


def test_arguments_are_refused_in_one_line() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 10))
    with pytest.raises(ValueError, match=r"rank_analysis: batch_size must be at least 1, got 0"):
        rank_analysis(model, (20,), batch_size=0)
    with pytest.raises(TypeError, match=r"rank_analysis: model must be a torch.nn.Module, got int"):
        rank_analysis(3, (20,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input_shape must be one that the model accepts"):
        rank_analysis(model, (21,))

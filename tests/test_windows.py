"""Values that no window of a strided convolution meets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import gradients_of
from rconv_fast import invert, recover_conv_input
from rconv_fast.geometry import ConvGeometry
from rconv_fast.solve import GradientRows, System, WeightRows, within_windows
from rconv_fast.solve.rank import touched


def system_of(size: tuple[int, int], kernel: int, stride: int, padding: int, filters: int = 9) -> System:
    """Both kinds of equations of one layer with two channels, outputs and gradients drawn at random."""
    torch.manual_seed(0)
    g = ConvGeometry.create("test", 2, filters, size, kernel, stride, padding)
    weight = torch.randn(filters, 2, kernel, kernel, dtype=torch.float64)
    output = torch.randn(1, filters, *g.out_size, dtype=torch.float64)
    rows = (
        GradientRows(g, output, torch.randn_like(weight)),
        WeightRows.create(g, weight, output, torch.ones_like(output)),
    )
    return System(torch.Size((1, 2, *size)), rows)


@pytest.mark.parametrize("size", [(8, 9), (9, 10), (11, 7)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 0), (3, 3, 0), (3, 2, 1), (5, 3, 1), (2, 2, 0), (3, 1, 1)]
)
def test_a_cut_system_is_the_same_map_on_the_values_that_windows_meet(
    size: tuple[int, int], kernel: int, stride: int, padding: int
) -> None:
    system = system_of(size, kernel, stride, padding)
    inner = within_windows(system)
    met = torch.nonzero(touched(system)[0, 0]).max(dim=0).values + 1
    assert tuple(inner.shape[2:]) == tuple(met.tolist())
    x = torch.randn(inner.shape, dtype=torch.float64)
    whole = torch.randn(system.shape, dtype=torch.float64)
    whole[..., : inner.shape[2], : inner.shape[3]] = x
    for ours, theirs in zip(inner.apply(x), system.apply(whole), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_windows_meet_is_determined_and_nothing_else_is() -> None:
    torch.manual_seed(1)
    x = torch.rand(1, 2, 10, 10, dtype=torch.float64)
    layer = nn.Conv2d(2, 12, 3, 2, dtype=torch.float64)
    output = layer(x)
    grad_output = torch.randn_like(output)
    grad_weight = torch.autograd.grad(output, layer.weight, grad_output)[0]
    found = recover_conv_input(
        grad_weight, grad_output, x.shape[2:], weight=layer.weight, bias=layer.bias, output=output, stride=2
    )
    assert found.determined[..., :9, :9].all()
    assert not found.determined[..., 9, :].any()
    assert not found.determined[..., 9].any()
    assert found.rank == 2 * 81
    assert found.unknowns == 2 * 100
    torch.testing.assert_close(found.input[..., :9, :9], x[..., :9, :9], rtol=0, atol=1e-10)
    assert not found.input[..., 9, :].any()


def test_a_hidden_layer_whose_last_values_nothing_reads_is_passed_at_once() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2), nn.ReLU(), nn.Conv2d(24, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    ).double()
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    found = invert(model, gradients_of(model, x, torch.tensor([3])), x.shape[1:])
    second = found.layers[0]
    assert (second.rank, second.unknowns) == (24 * 7 * 7, 24 * 8 * 8)
    assert second.proof != "none"
    assert "nonnegative" not in second.solver


def test_a_solution_of_the_whole_is_left_as_it_is() -> None:
    system = system_of((9, 9), 3, 2, 0)
    assert within_windows(system) is system
    system = system_of((9, 9), 1, 2, 0)  # values between windows stay
    assert within_windows(system) is system

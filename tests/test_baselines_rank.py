"""The rank analyses of R-GAP and COPA say what their papers count, and are held against dense derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rconv_fast import models
from rconv_fast.baselines.rank import copa_index, ra_index
from rconv_fast.errors import ArgumentError
from test_baselines import small_cnn


def test_ra_index_counts_values_of_input_weight_and_output_and_what_widening_layers_leave() -> None:
    counts = ra_index(small_cnn(nn.LeakyReLU, 1), (1, 8, 8))
    assert [count.unknowns for count in counts] == [64, 384, 192]
    assert [count.gradient_constraints for count in counts] == [54, 648, 192]
    assert [count.weight_constraints for count in counts] == [384, 192, 1]
    assert [count.virtual_constraints for count in counts] == [0, 320, 320]  # the first layer widens by 384 - 64
    assert [count.index for count in counts] == [64 - 54 - 384, 384 - 648 - 192 - 320, 192 - 192 - 1 - 320]


def test_the_network_that_rgap_passes_has_no_index_above_zero_and_a_narrow_one_has() -> None:
    assert all(count.index <= 0 for count in ra_index(models.cnn6("leaky_relu"), (3, 32, 32)))
    narrow = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(2 * 256, 1))
    assert ra_index(narrow, (3, 32, 32))[0].index > 0


@pytest.mark.parametrize("analysis", [ra_index, copa_index])
def test_a_network_that_is_no_chain_is_refused(analysis: object) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x

    assert callable(analysis)
    with pytest.raises(ArgumentError, match=r"model must be a chain of layers"):
        analysis(Skip(), (1, 8, 8))


def test_copa_index_counts_the_singular_values_of_both_constraints() -> None:
    full, few = small_cnn(nn.LeakyReLU, 1, filters=6), small_cnn(nn.LeakyReLU, 1, filters=1)
    index, layers = copa_index(full, (1, 8, 8))
    assert index == 0
    assert [(layer.rank, layer.unknowns) for layer in layers] == [(64, 64), (384, 384)]
    index, layers = copa_index(few, (1, 8, 8))
    assert index < 0
    # the oracle: derivatives of what the constraints of the second layer (1 to 2 filters, stride 2) say
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 1, generator=generator, dtype=torch.float64)
    conv = few[2]
    z = conv(few[:2](x))
    (k,) = torch.autograd.grad((few[3:](z) * weights).sum(), z)

    def constraints(given: Tensor) -> Tensor:
        return torch.cat(
            [conv(given).flatten(), torch.nn.grad.conv2d_weight(given, conv.weight.shape, k, 2, 1).flatten()]
        )

    rank = int(
        torch.linalg.matrix_rank(
            torch.autograd.functional.jacobian(constraints, torch.rand(1, 1, 8, 8).double()).reshape(-1, 64)
        )
    )
    assert (layers[1].rank, layers[1].unknowns) == (rank, 64)
    assert index == (layers[0].rank - 64) + (rank - 64) / 2  # the first of two layers weighs twice as much

"""Constants that a norm hides of a ReLU's output: the gradient of the bias in front tells zeros from lowest values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rconv_fast.layers.constants import place_by_bias

CLASS = torch.zeros(1, 4, 4, dtype=torch.bool)
CLASS[0, ::2, ::2] = True


def hidden(x: Tensor) -> Tensor:
    """Values as a solve leaves them: the lowest of the class is 0."""
    z = x.clone()
    z[:, :, CLASS[0]] -= x[:, :, CLASS[0]].amin(dim=2, keepdim=True)
    return z


@pytest.mark.parametrize("zeros", [0, 1])
def test_the_bias_tells_whether_the_lowest_value_is_a_zero(zeros: int) -> None:
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64) + 0.1
    x[..., 1, 1] = 0
    x[:, :, 2, 2] *= 1 - zeros
    grad = torch.randn_like(x)
    bias = (grad * (x > 0)).sum(dim=(0, 2, 3))
    unknown = (~CLASS[0]).expand_as(x)
    placed = place_by_bias(hidden(x), unknown, CLASS, grad, bias)
    assert torch.equal(placed.values > 0, x > 0)
    assert bool(placed.determined.all()) == bool(zeros)
    assert torch.equal(placed.determined | placed.positive, torch.ones_like(unknown))
    torch.testing.assert_close(placed.values[placed.determined], x[placed.determined])


def test_a_bias_that_fits_no_choice_places_nothing() -> None:
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64) + 0.1
    unknown = (~CLASS[0]).expand_as(x)
    placed = place_by_bias(hidden(x), unknown, CLASS, torch.randn_like(x), torch.full((2,), 1e3).double())
    assert torch.equal(placed.determined, unknown)
    assert not bool(placed.positive.any())

"""Gradient matching that goes on from what the equations say."""

from __future__ import annotations

import torch
from torch import nn

from attacks import gradients_of, photo
from rconv_fast import invert


def scarce() -> nn.Sequential:
    """A first layer with too few equations."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(3, 12, 3, 1, 1), nn.Sigmoid(), nn.Flatten())
    return body.append(nn.Linear(12 * 16, 10)).double()


def test_only_on_demand_and_never_verified() -> None:
    model, x = scarce(), photo(8)
    shared = gradients_of(model, x)
    plain = invert(model, shared, x.shape[1:])
    assert not plain.verified
    found = invert(model, shared, x.shape[1:], method="optimise", time_limit=1.0)
    assert found.verdict == "approximate"
    assert not found.verified
    assert found.labels.tolist() == [1]
    assert found.gradient_residual <= plain.gradient_residual
    assert [layer.name for layer in found.layers] == [layer.name for layer in plain.layers]


def test_a_verified_answer_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    found = invert(model, gradients_of(model, x), x.shape[1:], method="optimise")
    assert found.verified
    assert found.verdict == "exact"
